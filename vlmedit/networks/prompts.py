"""Prompts: what a batch carries instead of words, and what a backbone reads instead of them.

A batch carries ids. Of the suite's own transformer they are the words of the world themselves (`Words`). A real text encoder is larger
than the student of the miniature, so every prompt of a real run is encoded once, before training, and a batch carries row numbers of a
`PromptTable`; `PromptEmbeddings` holds the states of its rows (on the CPU, in any precision) and hands out a padded batch by number.

Row 0 of a table is the prompt of the unconditional score (empty, or a negative prompt), as the miniature's empty caption is all padding:
zeros mean "no prompt" in both, so `vlmedit.equations.dmd` guides all models alike. Padding is on the right. Families without a text mask
need prompts of one length, as their pipelines make them.

Shapes: ids (B, L) or (B, 1); states (B, L, d); mask (B, L), True where there is a word; pooled (B, p) or None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Text:
    """Prompts as a backbone takes them."""

    states: Tensor  # (B, L, d)
    mask: Tensor  # (B, L) bool
    pooled: Tensor | None = None  # (B, p)

    def rows(self) -> list[Tensor]:
        """Each prompt without its padding."""
        return [s[m] for s, m in zip(self.states, self.mask)]


def padded(rows: Sequence[Tensor], pooled: Sequence[Tensor] | None, device=None, dtype: torch.dtype | None = None) -> Text:
    """States (L_i, d) of several prompts, and pooled states (p,) where the family has them, as one batch."""
    lengths = torch.tensor([len(r) for r in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    states = pad_sequence(list(rows), batch_first=True).to(device, dtype)
    return Text(states, mask.to(device), None if pooled is None else torch.stack(list(pooled)).to(device, dtype))


class Words:
    """The world's own words: ids (B, length), and zeros for no words at all."""

    def __init__(self, length: int, tokenizer=None):
        from vlmedit.world.tokenizer import build_tokenizer

        self.length, self.tokenizer = length, tokenizer or build_tokenizer()

    def ids(self, texts: Sequence[str]) -> Tensor:
        from vlmedit.world.tokenizer import encode

        return encode(list(texts), self.length, self.tokenizer)

    def empty(self, ids: Tensor) -> Tensor:
        return torch.zeros_like(ids)

    def look_up(self, ids: Tensor) -> list[str]:
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in ids.tolist()]


@dataclass
class PromptTable:
    """Texts and their numbers. `negative`, the prompt of the unconditional score, is number 0."""

    negative: str = ""
    texts: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.texts = [self.negative, *(t for t in self.texts if t != self.negative)]
        self._number = {t: i for i, t in enumerate(self.texts)}

    def number(self, text: str) -> int:
        """The text's number, a new one if it is new."""
        if text not in self._number:
            self._number[text] = len(self.texts)
            self.texts.append(text)
        return self._number[text]

    def ids(self, texts: Sequence[str]) -> Tensor:
        """(B, 1), as a column of ids."""
        return torch.tensor([[self.number(t)] for t in texts])

    def empty(self, ids: Tensor) -> Tensor:
        return torch.zeros_like(ids)

    def look_up(self, ids: Tensor) -> list[str]:
        """The texts of numbers of any shape."""
        return [self.texts[i] for i in ids.flatten().tolist()]


class PromptEmbeddings:
    """States (L_i, d) of each prompt of a table, and pooled states (p,) where the family has them."""

    def __init__(self, states: Sequence[Tensor], pooled: Sequence[Tensor] | None = None, table: PromptTable | None = None):
        if not len(states) or any(s.ndim != 2 or not len(s) for s in states):
            raise ValueError("a text bank needs at least the empty prompt, each prompt as states (length, width) of at least one token")
        if pooled is not None and len(pooled) != len(states):
            raise ValueError(f"{len(states)} prompts but {len(pooled)} pooled states; there must be one each")
        self.states: Sequence[Tensor] = [s.detach().cpu() for s in states]
        self.pooled: Sequence[Tensor] | None = None if pooled is None else [p.detach().cpu() for p in pooled]
        self.table = table or PromptTable()

    def __len__(self) -> int:
        return len(self.states)

    @property
    def width(self) -> int:
        return self.states[0].shape[1]

    def ids(self, texts: Sequence[str]) -> Tensor:
        return self.table.ids(texts)

    def empty(self, ids: Tensor) -> Tensor:
        return self.table.empty(ids)

    def look_up(self, ids: Tensor) -> list[str]:
        return self.table.look_up(ids)

    def __call__(self, ids: Tensor, device=None, dtype: torch.dtype | None = None) -> Text:
        """The prompts with these numbers (B, 1) or (B,)."""
        chosen = ids.flatten().tolist()
        if max(chosen) >= len(self.states) or min(chosen) < 0:
            raise IndexError(f"prompt number {max(chosen)} of a bank of {len(self.states)}; encode the whole table's prompts before training")
        pooled = None if self.pooled is None else [self.pooled[i] for i in chosen]
        return padded([self.states[i] for i in chosen], pooled, device, dtype)


EncodeWords = Callable[..., tuple[Tensor, Tensor | None]]  # a family's: (pipeline, text, **settings) -> states (L, d), pooled (p,)


@torch.no_grad()
def encode_prompts(encode_words: EncodeWords, pipeline, texts: Sequence[str], **settings) -> PromptEmbeddings:
    """`texts` through a diffusers pipeline's own encoder (built with `transformer=None, vae=None`). `encode_words` is the family's;
    `settings` go to it: `max_sequence_length`, for instance."""
    found = [encode_words(pipeline, text, **settings) for text in texts]  # one at a time: prompts of a batch would be padded together
    states, pooled = zip(*found)
    return PromptEmbeddings(states, None if pooled[0] is None else pooled)
