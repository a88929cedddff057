"""Encoded prompts on disk: a text encoder runs once per prompt, before training, and is gone when training begins.

A folder holds numbered shards, `000000.safetensors` with the states of up to `SHARD` prompts and `000000.json` with their lengths, and
`encoder.json`, which says whose states they are. A shard is written beside its place and renamed, its .json last, so an interrupted run
leaves whole shards and goes on after them. Prompts are named by a hash of their text.

Shapes: states (L, d) of each prompt; pooled (p,) where the family has them.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmedit.errors import InputError
from vlmedit.io import check_space, save_json
from vlmedit.networks.backbones import family_of
from vlmedit.networks.checks import read_json, text_pipeline
from vlmedit.networks.load import DTYPE, frozen_dtype
from vlmedit.networks.prompts import PromptEmbeddings, PromptTable, encode_prompts

SHARD = 512  # prompts


def name_of(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:32]


class PromptCache:
    """The folder. Raises `InputError` when it holds another encoder's states."""

    def __init__(self, folder: str | Path, encoder: dict):
        self.folder = Path(folder)
        self.places: dict[str, tuple[str, int]] = {}  # name: shard, length
        self._open: dict[str, object] = {}
        about = self.folder / "encoder.json"
        if about.is_file() and (found := json.loads(about.read_text())) != encoder:
            raise InputError(f"{self.folder} holds prompts of another encoder ({found}, now {encoder}); choose another folder with text_cache=FOLDER")
        self.encoder = encoder
        for file in sorted(self.folder.glob("[0-9]*.json")):
            self.places |= {name: (file.stem, length) for name, length in json.loads(file.read_text()).items()}

    def lacking(self, prompts: Sequence[str]) -> list[str]:
        return [p for p in dict.fromkeys(prompts) if name_of(p) not in self.places]

    def fill(self, prompts: Sequence[str], encode: Callable[[list[str]], PromptEmbeddings], at_once: int = SHARD) -> Iterator[int]:
        """Encode and store what is lacking; yields the prompts stored so far."""
        todo, done = self.lacking(prompts), 0
        self.folder.mkdir(parents=True, exist_ok=True)
        save_json(self.encoder, self.folder / "encoder.json")
        for i in range(0, len(todo), at_once):
            texts = todo[i : i + at_once]
            found = encode(texts)
            shard = f"{len(list(self.folder.glob('[0-9]*.json'))):06d}"
            tensors = {name_of(t): s.contiguous() for t, s in zip(texts, found.states)}
            if found.pooled is not None:
                tensors |= {f"{name_of(t)}.pooled": p.contiguous() for t, p in zip(texts, found.pooled)}
            partial = self.folder / f".{shard}.part"
            save_file(tensors, partial)
            os.replace(partial, self.folder / f"{shard}.safetensors")
            lengths = {name_of(t): len(s) for t, s in zip(texts, found.states)}
            save_json(lengths, self.folder / f"{shard}.json")
            self.places |= {name: (shard, length) for name, length in lengths.items()}
            done += len(texts)
            yield done

    def read(self, name: str, part: str = "") -> Tensor | None:
        """A prompt's states, or its `.pooled` part; None where there is no such part."""
        shard = self.places[name][0]
        if shard not in self._open:
            self._open[shard] = safe_open(self.folder / f"{shard}.safetensors", "pt")
        return self._open[shard].get_tensor(name + part) if name + part in self._open[shard].keys() else None

    def embeddings(self, table: PromptTable) -> CachedEmbeddings:
        """The prompts of a table. Raises `InputError` when one has not been encoded."""
        if lacking := self.lacking(table.texts):
            raise InputError(f"{self.folder} lacks {len(lacking)} prompts, the first {lacking[0]!r}; fill it before training")
        return CachedEmbeddings(self, table)


class _Rows(Sequence):
    """States by number, read when they are asked for. Iterating gives lengths without reading: each item only has one."""

    def __init__(self, cache: PromptCache, names: list[str], part: str = ""):
        self.cache, self.names, self.part = cache, names, part

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Tensor:
        return self.cache.read(self.names[i], self.part)

    def __iter__(self):
        return (range(self.cache.places[name][1]) for name in self.names)


class CachedEmbeddings(PromptEmbeddings):
    """`PromptEmbeddings` whose states stay on disk."""

    def __init__(self, cache: PromptCache, table: PromptTable):
        names = [name_of(text) for text in table.texts]
        self.table, self.states = table, _Rows(cache, names)
        self.pooled = _Rows(cache, names, ".pooled") if cache.read(names[0], ".pooled") is not None else None

    def __deepcopy__(self, memo):  # roles share it
        return self


# where the states come from


def pipeline_encoder(place: str, device: torch.device, dtype: torch.dtype, length: int, trust: bool = False) -> Callable[[list[str]], PromptEmbeddings]:
    """`encode_prompts` through the pipeline at `place`, or the one of its family that reads words alone, loaded without transformer and
    autoencoder. `trust` allows a pipeline of its own as code."""
    family = family_of(read_json(place, "transformer/config.json")["_class_name"])
    name = text_pipeline(diffusers.DiffusionPipeline.load_config(place), family)
    own = {"trust_remote_code": True} if trust else {}
    pipeline = getattr(diffusers, name or "DiffusionPipeline").from_pretrained(place, transformer=None, vae=None, **{DTYPE: dtype}, **own).to(device)
    settings = {"max_sequence_length": length} if "max_sequence_length" in inspect.signature(pipeline.encode_prompt).parameters else {}
    return lambda texts: encode_prompts(family.call("encode_words"), pipeline, texts, **settings)


def encoder_of(config) -> dict[str, str | int]:
    """Whose prompts a cache holds: the backbone's whole place, its text encoders' configurations as a hash, length and precision."""
    place, index = config.backbone, read_json(config.backbone, "model_index.json") or {}
    names = sorted(n for n, v in index.items() if n.startswith("text_encoder") and isinstance(v, list) and all(v))
    told = json.dumps([read_json(place, f"{n}/config.json") for n in names], sort_keys=True)
    where = str(Path(place).resolve()) if Path(place).is_dir() else place
    return {
        "backbone": where, "text_encoder": hashlib.sha256(told.encode()).hexdigest()[:16], "length": config.text_length, "dtype": str(frozen_dtype(config)),
    }  # fmt: skip


def encoded(config, table: PromptTable, accelerator: Accelerator) -> PromptEmbeddings:
    """The states of all prompts. Each process encodes its share of what the cache lacks, into a part of its own; the main process gathers the
    parts, those of an interrupted run too. Raises `InputError` where the disk is too small for the rest."""
    folder = Path(config.text_cache or Path(config.out) / "text")
    about = encoder_of(config)
    rank, processes = accelerator.process_index, accelerator.num_processes
    if accelerator.is_main_process:
        gather_parts(folder, about)
    accelerator.wait_for_everyone()
    if todo := PromptCache(folder, about).lacking(table.texts):
        encode = pipeline_encoder(config.backbone, accelerator.device, frozen_dtype(config), config.text_length, config.trust_remote_code)
        check_space(folder, encoded_bytes(todo, encode))
        accelerator.wait_for_everyone()  # all have looked before one writes
        for done in PromptCache(folder if processes == 1 else folder / f"part-{rank:03d}", about).fill(todo[rank::processes], encode):
            accelerator.print(f"encoded {min(done * processes, len(todo))} of {len(todo)} prompts")
        del encode
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            gather_parts(folder, about)
        accelerator.wait_for_everyone()
    return PromptCache(folder, about).embeddings(table)


def encoded_bytes(texts: list[str], encode: Callable[[list[str]], PromptEmbeddings], sample: int = 8) -> int:
    """What the states of these prompts will take on disk, from the first few in an even spread."""
    some = texts[:: -(-len(texts) // sample)]
    found = encode(some)
    return sum(x.numel() * x.element_size() for x in (*found.states, *(found.pooled or ()))) * len(texts) // len(some)


def gather_parts(folder: Path, about: dict) -> None:
    """Move the shards of every `part-*` folder into the cache, each a file of states and then, last, its .json: what is cut short is whole."""
    for part in sorted(folder.glob("part-*")):
        PromptCache(part, about)  # refuses another encoder's
        save_json(about, folder / "encoder.json")
        for lengths in sorted(part.glob("[0-9]*.json")):
            states = lengths.with_suffix(".safetensors")
            if states.is_file():
                place = folder / f"{len(list(folder.glob('[0-9]*.json'))):06d}"
                os.replace(states, place.with_suffix(".safetensors"))
                os.replace(lengths, place.with_suffix(".json"))
        shutil.rmtree(part)
