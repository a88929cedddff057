"""Models that answer in words: any judge of `judges`, any causal language model, and what identifies them in a record.

Answers are greedy: temperature 0, no penalties. Shapes: a picture (3, H, W) in [-1, 1].
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Protocol

import torch
import transformers
from torch import Tensor

from vlmedit.networks.checks import reachable
from vlmedit.networks.judges import FAMILIES, load_judge


class Writer(Protocol):
    """Answers texts about pictures, greedily."""

    def write(self, images: Sequence[Sequence[Tensor]], texts: Sequence[str], length: int) -> list[str]:
        """One answer of at most `length` tokens per text; `images` are the pictures of each."""
        ...


class Scribe:
    """A causal language model without eyes as a `Writer`; pictures are refused."""

    sees = False

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    def to(self, *where) -> Scribe:
        """Move the model, as torch's `to`."""
        self.model.to(*where)
        return self

    @torch.no_grad()
    def write(self, images: Sequence[Sequence[Tensor]], texts: Sequence[str], length: int = 128) -> list[str]:
        """Greedy answers of at most `length` tokens. Raises ValueError for a text with a picture."""
        if any(len(row) for row in images):
            raise ValueError("a language model without eyes was shown a picture; give it texts alone")
        if self.tokenizer.chat_template:
            texts = [self.tokenizer.apply_chat_template([{"role": "user", "content": t}], tokenize=False, add_generation_prompt=True) for t in texts]
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        self.tokenizer.padding_side, self.tokenizer.pad_token_id = "left", pad
        special = not self.tokenizer.chat_template  # a template writes them itself
        inputs = self.tokenizer(list(texts), return_tensors="pt", padding=True, add_special_tokens=special).to(self.model.device)
        inputs.pop("token_type_ids", None)
        stop = self.model.generation_config.eos_token_id
        stop = self.tokenizer.eos_token_id if stop is None else stop
        config = transformers.GenerationConfig(max_new_tokens=length, do_sample=False, num_beams=1, eos_token_id=stop, pad_token_id=pad)
        out = self.model.generate(**inputs, generation_config=config)
        return [t.strip() for t in self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]


def load_writer(folder: str | os.PathLike, **kwargs) -> Writer:
    """A vision-language model of a known family, or any causal language model, by folder or id. `kwargs` go to `from_pretrained`.
    Raises ValueError for another class, FileNotFoundError for a folder or an id that does not lead to a model."""
    here = {"trust_remote_code": False, "local_files_only": not reachable()}  # without a network the client would try for half a minute
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), **here)
    except OSError as error:
        raise FileNotFoundError(f"no model at {folder}: give a folder with config.json, or an id of the Hub and a network ({str(error).splitlines()[0]})") from error
    except ValueError as error:
        raise ValueError(f"{folder} is of a class that transformers does not have, or brings code of its own, which is not run ({str(error).splitlines()[0]})") from error
    name = (config.architectures or ["a model without architectures"])[0]
    if name in FAMILIES:
        return load_judge(folder, **kwargs)
    if not name.endswith("ForCausalLM"):
        raise ValueError(f"{folder} is {name}; a writer is a causal language model or one of {', '.join(FAMILIES)}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **here)
        model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), **here, **kwargs)
    except OSError as error:
        raise FileNotFoundError(f"{folder} has a config but not all of its files; download it again ({str(error).splitlines()[0]})") from error
    return Scribe(model, tokenizer)


def identity_of(writer: Writer | None) -> dict | None:
    """What a model is, for the record: class, revision where the Hub gave one, and a digest of some weights of each tensor."""
    model = getattr(writer, "model", None)
    if model is None:
        return None
    digest = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        digest.update(name.encode() + p.detach().flatten()[:16].float().cpu().numpy().tobytes())
    revision = getattr(model.config, "_commit_hash", None)
    return {"class": type(model).__name__, "revision": revision, "weights": digest.hexdigest()[:16], "transformers": transformers.__version__}
