"""The joints of the house: what a part must offer so that another part can stand in its place.

Shapes as in flow.py: t = 0 is data, v = eps - x0. B rows, N questions, h and w the sides of latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

# what the trainer takes


class Data(Protocol):
    """What a method is trained on: the world of shapes, or a manifest."""

    def gives(self, kind: type) -> bool:
        """Whether batches of this kind can be had; asked before one is drawn."""

    def batches(self, kind: type, key: tuple, size: int, total: int, mine: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """An update's batches of `size` samples, numbered over all processes up to `total`; of these the ones in `mine`, each drawn when it is
        asked for. `key` seeds what is random in them."""

    def labels(self, batch: Any) -> list[tuple[str, str]]:
        """Kind and words of each request of a batch, for strips of pictures."""

    def state_dict(self) -> dict:
        """{} for the world, a position for a manifest."""

    def load_state_dict(self, state: dict) -> None: ...


@dataclass(frozen=True)
class Phase:
    """A part of an update that ends in optimizer steps, or in none."""

    name: str  # such as "student", "fake", "critic", "rollout"
    trains: tuple[str, ...] = ()  # whose gradients are averaged, clipped and applied when it ends
    batch: type | None = None  # a fresh draw of this kind; None is the last draw again
    key: tuple = ()  # of a fresh draw, such as ("fake", 0)
    size: int | None = None  # samples of a fresh draw; None is the configuration's `batch`


@dataclass(frozen=True)
class Trained:
    """A module that a method trains."""

    module: nn.Module
    lr: float | None = None  # its peak; None is the configuration's
    ema: float = 0.0  # decay of its averaged weights; 0 keeps none


class Method(Protocol):
    """Equations and phases; no loop, optimizer, process or checkpoint."""

    trained: dict[str, Trained]  # by role; checkpoints call them so
    kept: dict[str, nn.Module]  # modules without an optimizer that a checkpoint holds: a pool of pairs, a follower
    frozen: dict[str, nn.Module]  # roles that nobody trains
    result: str  # whose (averaged) weights are the run's model
    resident: dict[str, tuple[str, ...]]  # roles that a part of the update needs; the others may wait elsewhere
    part: Callable[[str], AbstractContextManager]  # the trainer's hook around a timed part of `backward`

    def phases(self, index: int) -> Iterator[Phase]:
        """The phases of update `index`, lazily: a later one may depend on what an earlier one left."""

    def backward(self, phase: Phase, batch: Any, memory: dict, index: int) -> dict[str, float | int]:
        """Add to the gradients of what the phase trains, and return what was measured: floats are averaged over batches, ints added up.
        `memory` is the update's, of this batch's number."""

    def after(self, index: int) -> None:
        """When all phases are done: a target network follows; usually nothing."""

    def pictures(self, batch: Any, memory: dict) -> dict[str, Tensor]:
        """Pictures (B, 3, H, W) of the update, by title, of its first batch; {} where there are none."""

    def save(self, state: dict[str, Tensor], folder: Path) -> None:
        """Write the result with these weights, and what belongs to it, into a folder of its own."""


# networks

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


class Judge(Protocol):
    """A frozen vision-language model that answers yes or no, differentiably in the pixels."""

    def eval(self) -> Judge: ...
