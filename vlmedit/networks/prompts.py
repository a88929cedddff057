"""Prompts encoded once: what a backbone reads instead of words.

A `TextBank` holds the states of every prompt of a `Book` (on the CPU, in any precision) and hands out a padded batch by number.
`encode_prompts` fills it through the family's own diffusers pipeline, loaded without transformer and autoencoder, so that template,
layer and length are the checkpoint's. Padding is on the right. Families without a text mask need prompts of one length, as their
pipelines make them.

Shapes: states (B, L, d); mask (B, L), True where there is a word; pooled (B, p) or None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


class TextBank:
    """States (L_i, d) of each prompt, and pooled states (p,) where the family has them."""

    def __init__(self, states: Sequence[Tensor], pooled: Sequence[Tensor] | None = None):
        if not len(states) or any(s.ndim != 2 or not len(s) for s in states):
            raise ValueError("a text bank needs at least the empty prompt, each prompt as states (length, width) of at least one token")
        if pooled is not None and len(pooled) != len(states):
            raise ValueError(f"{len(states)} prompts but {len(pooled)} pooled states; there must be one each")
        self.states, self.pooled = [s.detach().cpu() for s in states], None if pooled is None else [p.detach().cpu() for p in pooled]

    def __len__(self) -> int:
        return len(self.states)

    @property
    def width(self) -> int:
        return self.states[0].shape[1]

    def __call__(self, numbers: Tensor, device=None, dtype: torch.dtype | None = None) -> Text:
        """The prompts with these numbers (B, 1) or (B,)."""
        chosen = numbers.flatten().tolist()
        if max(chosen) >= len(self.states) or min(chosen) < 0:
            raise IndexError(f"prompt number {max(chosen)} of a bank of {len(self.states)}; encode the prompts of the whole book before training")
        rows = [self.states[i] for i in chosen]
        lengths = torch.tensor([len(r) for r in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        pooled = None if self.pooled is None else torch.stack([self.pooled[i] for i in chosen]).to(device, dtype)
        return Text(pad_sequence(rows, batch_first=True).to(device, dtype), mask.to(device), pooled)


@torch.no_grad()
def encode_prompts(pipeline, texts: Sequence[str], **settings) -> TextBank:
    """A bank of `texts` through a diffusers pipeline's own `encode_prompt` (built with `transformer=None, vae=None`).
    `settings` go to it: `max_sequence_length`, for instance. Raises ValueError for a pipeline whose answer is unknown."""
    name, states, pooled = type(pipeline).__name__, [], []
    for text in texts:  # one at a time: prompts of a batch would be padded together
        if name.startswith("ZImage"):
            out, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False, **settings)
            states.append(out[0])
        elif name.startswith(("QwenImage", "Sana")):
            more = {"do_classifier_free_guidance": False} if name.startswith("Sana") else {}
            out, mask = pipeline.encode_prompt(text, **more, **settings)[:2]
            states.append(out[0] if mask is None else out[0][mask[0].bool()])
        elif name.startswith("StableDiffusion3"):
            out, _, pool, _ = pipeline.encode_prompt(text, None, None, do_classifier_free_guidance=False, **settings)
            states.append(out[0])
            pooled.append(pool[0])
        elif name.startswith("Flux2"):
            states.append(pipeline.encode_prompt(text, **settings)[0][0])
        elif name.startswith("Flux"):
            out, pool, _ = pipeline.encode_prompt(text, None, **settings)
            states.append(out[0])
            pooled.append(pool[0])
        else:
            raise ValueError(f"do not know what {name}.encode_prompt returns; known: ZImage, QwenImage, Sana, StableDiffusion3, Flux, Flux2")
    return TextBank(states, pooled or None)
