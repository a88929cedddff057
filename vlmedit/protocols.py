"""What the parts of the suite ask of each other: a network that edits, its prompts, the space it works in.

Conventions: flow.py (t = 0 is data, v = eps - x0). B rows, h w latent sides, H W picture sides. A class meets a protocol by having its members.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

Text = Any  # encoded prompts, as a backbone's own `encode_text` makes them
Reference = Any  # what a backbone keeps of a reference: its latents, or keys and values of every block


class Prompts(Protocol):
    """What a batch carries instead of words: ids (B, L), which are words of the world, or (B, 1), rows of an encoded table."""

    def ids(self, texts: Sequence[str]) -> Tensor: ...

    def empty(self, ids: Tensor) -> Tensor:
        """The prompts of the unconditional score in the shape of `ids`: zeros, in both kinds."""
        ...

    def look_up(self, ids: Tensor) -> list[str]:
        """The texts behind ids, for whoever shows them."""
        ...


class Backbone(Protocol):
    """A velocity network. `DiT` is one itself; an adapter wraps a diffusers transformer."""

    channels: int  # of latents
    multiple: int  # of latents' height and width
    prompts: Prompts

    def encode_text(self, ids: Tensor) -> Text:
        """Once per unroll."""
        ...

    def hold_reference(self, reference: Tensor, text: Text) -> Reference:
        """What all calls of an unroll share, from latents (B, C, h, w). Once per unroll."""
        ...

    def velocity(self, x: Tensor, t: Tensor, text: Text | Tensor, reference: Reference | Tensor | None = None) -> Tensor:
        """v (B, C, h, w) at x_t, t (B,) in float32; `text` encoded, or ids."""
        ...


class Codec(Protocol):
    """The space in which the flow lives."""

    channels: int
    downscale: int

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, channels, H / downscale, W / downscale)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """The way back, differentiable."""
        ...
