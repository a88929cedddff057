"""The suite's tokenizer: one token per word of the world of shapes, and texts as rows of ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vlmedit.world.language import vocabulary

PAD, UNK, YES, NO, END = "[pad]", "[unk]", "yes", "no", "[end]"
SPECIAL = (PAD, UNK, YES, NO, END)


@cache
def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer of the shape world, a transformers fast tokenizer with right padding."""
    words = (*SPECIAL, *(w for w in vocabulary() if w not in SPECIAL))
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=UNK))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, unk_token=UNK, eos_token=END, padding_side="right")


def encode(texts: list[str], length: int, tokenizer: PreTrainedTokenizerFast | None = None) -> Tensor:
    """Token ids (B, length), right-padded. Raises ValueError for a text longer than `length` words."""
    tokenizer = tokenizer or build_tokenizer()
    ids = tokenizer(texts, padding="max_length", max_length=length)["input_ids"]
    longest = max(range(len(texts)), key=lambda i: len(ids[i]), default=None)
    if longest is not None and len(ids[longest]) > length:
        raise ValueError(f"a text of {len(ids[longest])} words, at most {length} fit: {texts[longest]!r}")
    return torch.tensor(ids)


@dataclass(frozen=True)
class Words:
    """Texts as ids of their words, in rows of one `length`: the prompts of a network that has a text encoder of its
    own."""

    length: int

    def ids(self, texts: Sequence[str]) -> Tensor:
        """(B, length) ids. Raises ValueError for a text that is longer."""
        return encode(list(texts), self.length)

    def empty(self, ids: Tensor) -> Tensor:
        """The unconditional prompt in the shape of `ids`: padding alone."""
        return torch.zeros_like(ids)

    def look_up(self, ids: Tensor) -> list[str]:
        """The words again."""
        return build_tokenizer().batch_decode(ids, skip_special_tokens=True)


def words(ids: Tensor) -> str:
    """The text of one row of ids (L,), without padding."""
    return build_tokenizer().decode(ids, skip_special_tokens=True)
