"""What backbone families share: the adapter's base class, packing into tokens, and `Family`, by which the rest of the suite knows one.

A family hides a rectified flow behind conventions of its own. Its `calls` translate: plain functions of torch and diffusers alone, which the
adapter calls in training and whose source an exported pipeline carries, so that the two cannot disagree:

    encode_words(pipeline, text, **settings) -> states (L, d), pooled (p,) or None       through the family's diffusers pipeline
    velocity(transformer, x, t, text, reference, **modes) -> v (B, C, H, W)

Shapes: x, reference (B, C, H, W) latents, in the weights' precision; t (B,) in [0, 1], float32; text a `vlmedit.networks.prompts.Text`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from vlmedit.networks.prompts import PromptEmbeddings, Text


# what calls are made of


def pack(x: Tensor) -> Tensor:
    """Latents (B, C, H, W) as tokens (B, H/2 * W/2, 4 C): each token is a 2x2 square, channel first, then row, then column."""
    return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for latents of this height and width."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def grid_ids(first: int, height: int, width: int, last: bool = False, device=None) -> Tensor:
    """Positions (height * width, 3) = (first, row, column), with a fourth 0 if `last`."""
    axes = [torch.tensor([first]), torch.arange(height), torch.arange(width)] + [torch.arange(1)] * last
    return torch.cartesian_prod(*axes).to(device)


def from_data_time(network: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    """Our velocity of a network whose time runs from noise (0) to data (1) and which predicts x0 - eps."""
    return -network(x, 1 - t)


@contextmanager
def exact_time(embedder: nn.Module, time: Tensor) -> Iterator[None]:
    """Within it, the first call of a sinusoidal embedder is about `time` (B,), unrounded: the forward passes of some transformers cast
    it to the precision of their tokens, where 0.9474 is 0.9492. Rows that a family appends stay as they are."""

    def replace(_, given: tuple[Tensor]) -> tuple[Tensor]:
        handle.remove()
        return (torch.cat((time, given[0][len(time) :].to(time))),)

    handle = embedder.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def beside(transformer: nn.Module, x: Tensor, reference: Tensor | None) -> Tensor:
    """Latents with the reference's in further channels, zeros where there is none; x alone for a transformer without room for them."""
    if transformer.config.in_channels == x.shape[1]:
        return x
    return torch.cat((x, torch.zeros_like(x) if reference is None else reference), 1)


# the adapter


class Backbone(nn.Module):
    """A transformer, the prompts it may be asked for, and the translation between its conventions and ours."""

    multiple = 2  # latents' height and width must be multiples of it
    masked = True  # understands prompts of unequal length
    modes: tuple[str, ...] = ()  # attributes that a caller may set and that a copy takes over
    entry: str | None = None  # patch embedding, where the reference stands in further input channels (`Channels`)

    def __init__(self, transformer: nn.Module, prompts: PromptEmbeddings, checkpointing: bool = False):
        super().__init__()
        self.transformer, self.prompts = transformer, prompts
        name, expected = type(transformer).__name__, self.text_width(transformer.config)
        if prompts.width != expected:
            raise ValueError(f"prompts of width {prompts.width}, {name} reads {expected}; encode them with this checkpoint's own pipeline")
        if self.pooled_width(transformer.config) and prompts.pooled is None:
            raise ValueError(f"{name} needs pooled prompts as well; encode them with this checkpoint's own pipeline")
        if not self.masked and len({len(s) for s in prompts.states}) > 1:
            raise ValueError(f"{name} has no text mask, so all prompts must have one length; its pipeline pads them to max_sequence_length")
        if checkpointing:
            transformer.enable_gradient_checkpointing()

    @property
    def config(self):
        return self.transformer.config

    @staticmethod
    def text_width(config) -> int:
        """Of a prompt's states."""
        return config.joint_attention_dim

    @staticmethod
    def pooled_width(config) -> int | None:
        """Of pooled prompts, None where the family has none."""
        return None

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self.config.in_channels

    def encode_text(self, ids: Tensor) -> Text:
        """The states of prompts by their numbers (B, 1), in the weights' precision."""
        return self.prompts(ids, self.transformer.device, self.transformer.dtype)

    def hold_reference(self, reference: Tensor, text: Text) -> Tensor:
        """What all calls of an unroll share: the reference's latents."""
        return reference

    def velocity(self, x: Tensor, t: Tensor, text: Text | Tensor, reference: Tensor | None = None) -> Tensor:
        """v (B, C, H, W) at x_t, in the precision of x. The weights' precision rounds latents and words; time stays in float32 up to the
        sinusoids of its embedder. Raises ValueError for latents of another model."""
        if isinstance(text, Tensor):
            text = self.encode_text(text)
        for name, z in (("x", x), ("reference", reference)):
            if z is not None and (z.shape[1] != self.channels or z.shape[-1] % self.multiple or z.shape[-2] % self.multiple):
                raise ValueError(
                    f"{name} is {tuple(z.shape)}; {type(self.transformer).__name__} takes latents (B, {self.channels}, H, W), "
                    f"H and W multiples of {self.multiple}: encode pictures with this checkpoint's autoencoder"
                )
        dtype = self.transformer.dtype
        v = self.predict(x.to(dtype), t.float(), text, None if reference is None else reference.to(dtype))
        return v.to(x.dtype)

    forward = velocity

    def predict(self, x: Tensor, t: Tensor, text: Text, reference: Tensor | None) -> Tensor:
        """`velocity` by the family's own call: x and reference in the weights' precision, t in float32."""
        raise NotImplementedError


class Channels(Backbone):
    """A family without a slot for a second picture: the reference's latents stand in further input channels, with zero-initialized new
    weights, as in InstructPix2Pix [arXiv:2211.09800]."""

    @property
    def channels(self) -> int:
        return self.config.out_channels

    def velocity(self, x: Tensor, t: Tensor, text: Text | Tensor, reference: Tensor | None = None) -> Tensor:
        if reference is not None and self.config.in_channels != 2 * self.channels:
            raise ValueError(
                f"{type(self.transformer).__name__} takes {self.config.in_channels} channels and so no reference; "
                "pass it through vlmedit.networks.load.widen first"
            )
        return super().velocity(x, t, text, reference)

    forward = velocity


# the family


@dataclass(frozen=True)
class Stock:
    """Diffusers' own edit pipeline, which shows its transformer the reference as it was trained here."""

    name: str
    settings: Callable[[int, int], dict]  # further arguments of a call that draws a picture of this width and height
    code: str  # the same in a program, where the picture is `image`; may be empty
    least: int = 0  # pixels along both sides


@dataclass(frozen=True)
class Tiny:
    """A pipeline of a few thousand random weights. What is small is width and depth alone; class and conventions are the real ones."""

    transformer: Callable[[int], nn.Module]  # for prompts of this width
    autoencoder: Callable[[], nn.Module]
    words: Callable[[Callable], dict]  # text encoders and tokenizers by the pipeline's names, from `tokenizer(chat=False, length=None)`
    pipeline: str  # of diffusers
    width: int = 16  # of the prompts that `words` makes
    shift: float = 3.0


@dataclass(frozen=True)
class Published:
    """The real size. What is called builds a network with its weights, so call it on the meta device."""

    places: tuple[str, ...]  # ids of the Hub
    transformer: Callable[[], nn.Module]
    autoencoder: Callable[[], nn.Module]
    note: str  # whose autoencoder


@dataclass(frozen=True)
class Family:
    """A kind of transformer."""

    transformer: str  # its class
    adapter: type[Backbone] | None = None  # None: the transformer is a `Backbone` itself and works on pixels
    calls: tuple[Callable, ...] = ()  # encode_words and velocity
    tiny: Tiny | None = None
    full: Published | None = None
    title: str = ""
    stock: Stock | None = None  # None: an exported pipeline is ours, with the source of `calls`
    text_pipeline: str | None = None  # of diffusers, encodes words; None: the checkpoint's own
    multiple: int = 2  # latent pixels per token along a side: of a picture's size, one is as many of the autoencoder's pixels
    library: str = "diffusers"  # where the class stands

    def model_class(self) -> type:
        """The transformer's class, imported now."""
        return getattr(import_module(self.library), self.transformer)

    def call(self, name: str) -> Callable:
        """One of `calls` by its name."""
        return next(call for call in self.calls if call.__name__ == name)

    @property
    def pixels(self) -> bool:
        """Whether it works on pixels, without an autoencoder."""
        return self.adapter is None

    @property
    def widened(self) -> bool:
        """Whether its transformer is widened for the reference."""
        return self.adapter is not None and self.adapter.entry is not None
