"""Text to image with the teacher: captions in, pictures out, with classifier-free guidance.

The unconditional call reads an empty caption (padding alone), as the teacher's text dropout taught it
[conventions: flow.py; the dropout: train/teacher.py]. Both calls of a guided step run as one batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmedit import flow
from vlmedit.networks.dit import DiT
from vlmedit.world.tokenizer import UNK, build_tokenizer, encode


def caption_ids(captions: Sequence[str], length: int) -> Tensor:
    """Token ids (B, length) of captions. Raises ValueError for a word that the world does not have."""
    tokenizer = build_tokenizer()
    ids = encode(list(captions), length, tokenizer)
    for text, row in zip(captions, ids):
        unknown = [w for w, i in zip(text.split(), row) if i == tokenizer.convert_tokens_to_ids(UNK)]
        if unknown:
            raise ValueError(f"unknown word {', '.join(map(repr, unknown))} in the caption {text!r}; captions read like 'red circle and blue square on white background'")
    return ids


@torch.no_grad()
def generate(
    dit: DiT,
    captions: Sequence[str] | Tensor,
    steps: int = 30,
    guidance: float = 2.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    sampler: str = "euler",
    shift: float = 1.0,
) -> Tensor:
    """Pictures (B, C, S, S) in [-1, 1] for captions, given as texts or ids (B, L). A list of generators holds one per picture."""
    side, channels, length = dit.config.side, dit.config.channels, dit.config.text_length
    ids = (captions if isinstance(captions, Tensor) else caption_ids(captions, length)).to(dit.device)
    noise = flow.noise_like((len(ids), channels, side, side), generator, dit.device, dit.dtype)
    guided = guidance != 1
    text = dit.encode_text(torch.cat((ids, torch.zeros_like(ids))) if guided else ids)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if not guided:
            return dit(x, t, text)
        cond, uncond = dit(torch.cat((x, x)), torch.cat((t, t)), text).chunk(2)
        return flow.guide(cond, uncond, guidance)

    return flow.sample(velocity, noise, flow.few_step_times(steps, shift), sampler, generator).clamp(-1, 1)
