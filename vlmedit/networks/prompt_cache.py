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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import diffusers
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vlmedit.errors import InputError
from vlmedit.io import save_json
from vlmedit.networks.dit import DiT
from vlmedit.networks.prompts import TextBank, encode_prompts
from vlmedit.networks.text import encode
from vlmedit.pipelines.shapes import EditPipeline

DTYPE = "dtype" if hasattr(diffusers.utils.deprecation_utils, "_TORCH_DTYPE_DEPRECATION_MESSAGE") else "torch_dtype"  # renamed in diffusers
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

    def fill(self, prompts: Sequence[str], encode: Callable[[list[str]], TextBank], at_once: int = SHARD) -> Iterator[int]:
        """Encode and store what is lacking; yields the prompts stored so far."""
        todo, done = self.lacking(prompts), 0
        self.folder.mkdir(parents=True, exist_ok=True)
        save_json(self.encoder, self.folder / "encoder.json")
        for i in range(0, len(todo), at_once):
            texts = todo[i : i + at_once]
            bank = encode(texts)
            shard = f"{len(list(self.folder.glob('[0-9]*.json'))):06d}"
            tensors = {name_of(t): s.contiguous() for t, s in zip(texts, bank.states)}
            if bank.pooled is not None:
                tensors |= {f"{name_of(t)}.pooled": p.contiguous() for t, p in zip(texts, bank.pooled)}
            partial = self.folder / f".{shard}.part"
            save_file(tensors, partial)
            os.replace(partial, self.folder / f"{shard}.safetensors")
            lengths = {name_of(t): len(s) for t, s in zip(texts, bank.states)}
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

    def bank(self, prompts: Sequence[str]) -> CachedBank:
        """These prompts by number. Raises `InputError` when one has not been encoded."""
        if lacking := self.lacking(prompts):
            raise InputError(f"{self.folder} lacks {len(lacking)} prompts, the first {lacking[0]!r}; fill it before training")
        return CachedBank(self, [name_of(p) for p in prompts])


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


class CachedBank(TextBank):
    """A `TextBank` whose states stay on disk."""

    def __init__(self, cache: PromptCache, names: list[str]):
        self.states = _Rows(cache, names)
        self.pooled = _Rows(cache, names, ".pooled") if cache.read(names[0], ".pooled") is not None else None

    def __deepcopy__(self, memo):  # roles share it
        return self


WORDS_ALONE = {"QwenImageEditPipeline": "QwenImagePipeline", "QwenImageEditPlusPipeline": "QwenImagePipeline"}  # instead of one that shows the encoder pictures


def _token_ids(place: str) -> Callable[[list[str]], TextBank]:
    """Prompts of the suite's own pipeline: its transformer reads tokens, ids (L, 1)."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(place, subfolder="tokenizer")
    length = DiT.load_config(place, subfolder="transformer")["text_length"]
    return lambda texts: TextBank([ids[:, None].float() for ids in encode(list(texts), length, tokenizer)])


def pipeline_encoder(place: str, device: torch.device, dtype: torch.dtype, length: int, trust: bool = False) -> Callable[[list[str]], TextBank]:
    """`encode_prompts` through the pipeline at `place`, loaded without transformer and autoencoder. `trust` allows a pipeline of its own as code."""
    name = diffusers.DiffusionPipeline.load_config(place)["_class_name"]
    if name == EditPipeline.__name__:
        return _token_ids(place)
    pipeline_class = getattr(diffusers, WORDS_ALONE.get(str(name), "DiffusionPipeline"))  # a list names a class in the folder's own code
    own = {"trust_remote_code": True} if trust else {}
    pipeline = pipeline_class.from_pretrained(place, transformer=None, vae=None, **{DTYPE: dtype}, **own).to(device)
    settings = {"max_sequence_length": length} if "max_sequence_length" in inspect.signature(pipeline.encode_prompt).parameters else {}
    return lambda texts: encode_prompts(pipeline, texts, **settings)
