"""Real text-to-image transformers behind one `velocity(x, t, text, reference)` in the conventions of flow.py.

Every family hides the same rectified flow behind conventions of its own:

| class                          | latents become tokens       | reference                           | time given   | output |
|--------------------------------|-----------------------------|-------------------------------------|--------------|--------|
| FluxTransformer2DModel         | 2x2 packed here, ids (k,y,x)| more tokens, k = 1                  | t            | v      |
| Flux2Transformer2DModel        | packed by its codec, (T,h,w,l) | more tokens, T = 10              | t            | v      |
| QwenImageTransformer2DModel    | 2x2 packed here, grid sizes | more tokens, a second grid          | t            | v      |
| ZImageTransformer2DModel       | inside                      | frame 0 of two, or omni's first image | 1 - t      | -v     |
| SD3Transformer2DModel          | inside                      | more input channels (`widen`)       | 1000 t       | v      |
| SanaTransformer2DModel         | inside                      | more input channels (`widen`)       | 1000 t, times its scale | v |
| DiT (vlmedit/networks/dit.py)    | inside, of pixels           | keys and values of every block      | t            | v      |

Sources: the edit pipelines of diffusers; Z-Image's two frames from the released NP-Edit code, which also modulates reference tokens as
clean data: that is `omni=True`, diffusers' own two-time mode. SD3 and Sana have no slot for a second picture; channel concatenation with
zero-initialized new weights is InstructPix2Pix's [arXiv:2211.09800].

Shapes: x, reference (B, C, H, W) latents, of one size; t (B,) in [0, 1]; text a `Text`, or numbers (B, 1) of prompts in the bank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import diffusers
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from vlmedit.networks.dit import DiT
from vlmedit.networks.prompts import Text, TextBank


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


class Backbone(nn.Module):
    """A transformer, the prompts it may be asked for, and the translation between its conventions and ours."""

    multiple = 2  # latents' height and width must be multiples of it
    masked = True  # understands prompts of unequal length
    pooled = False  # needs pooled prompts
    pixels = False  # works on pixels, without an autoencoder

    def __init__(self, transformer: ModelMixin, bank: TextBank, checkpointing: bool = False):
        super().__init__()
        self.transformer, self.bank = transformer, bank
        expected = self.text_width()
        if bank.width != expected:
            raise ValueError(f"prompts of width {bank.width}, {type(transformer).__name__} reads {expected}; encode them with this checkpoint's own pipeline")
        if self.pooled and bank.pooled is None:
            raise ValueError(f"{type(transformer).__name__} needs pooled prompts as well; encode them with this checkpoint's own pipeline")
        if not self.masked and len({len(s) for s in bank.states}) > 1:
            raise ValueError(f"{type(transformer).__name__} has no text mask, so all prompts must have one length; its pipeline pads them to max_sequence_length")
        if checkpointing:
            transformer.enable_gradient_checkpointing()

    @property
    def config(self):
        return self.transformer.config

    def text_width(self) -> int:
        return self.config.joint_attention_dim

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self.config.in_channels

    def encode_text(self, numbers: Tensor) -> Text:
        """The states of prompts by their numbers (B, 1) in the bank, in the weights' precision."""
        return self.bank(numbers, self.transformer.device, self.transformer.dtype)

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


class Flux(Backbone):
    """FLUX.1 and FLUX.1-Kontext. `embedded_guidance` is what a guidance-distilled checkpoint is told; 1 asks for the plain velocity."""

    masked, pooled, embedded_guidance = False, True, 1.0

    @property
    def channels(self) -> int:
        return self.config.in_channels // 4

    def predict(self, x, t, text, reference):
        height, width = x.shape[-2:]
        pictures = [x] if reference is None else [x, reference]
        tokens = torch.cat([pack(z) for z in pictures], 1)
        ids = torch.cat([grid_ids(k, z.shape[-2] // 2, z.shape[-1] // 2, device=x.device) for k, z in enumerate(pictures)])
        guidance = torch.full_like(t, self.embedded_guidance) if self.config.guidance_embeds else None
        text_ids = torch.zeros(text.states.shape[1], 3, device=x.device)
        with exact_time(self.transformer.time_text_embed.time_proj, 1000 * t):
            v = self.transformer(
                hidden_states=tokens, encoder_hidden_states=text.states, pooled_projections=text.pooled, timestep=t, img_ids=ids.to(x.dtype),
                txt_ids=text_ids.to(x.dtype), guidance=guidance, return_dict=False,
            )[0]  # fmt: skip
        return unpack(v[:, : height // 2 * (width // 2)], height, width)


class Flux2(Backbone):
    """FLUX.2, dev and klein: its codec packs the latents 2x2 already, so one latent is one token."""

    masked, multiple, embedded_guidance = False, 1, 1.0

    def predict(self, x, t, text, reference):
        pictures = [x] if reference is None else [x, reference]
        tokens = torch.cat([z.flatten(2).transpose(1, 2) for z in pictures], 1)
        ids = torch.cat([grid_ids(10 * k, *z.shape[-2:], last=True, device=x.device) for k, z in enumerate(pictures)])
        words = torch.zeros(text.states.shape[1], 4, device=x.device, dtype=ids.dtype)
        words[:, 3] = torch.arange(len(words))
        guidance = torch.full_like(t, self.embedded_guidance) if self.config.guidance_embeds else None
        with exact_time(self.transformer.time_guidance_embed.time_proj, 1000 * t):
            v = self.transformer(
                hidden_states=tokens, encoder_hidden_states=text.states, timestep=t, img_ids=ids, txt_ids=words, guidance=guidance, return_dict=False,
            )[0]  # fmt: skip
        return v[:, : x[0, 0].numel()].transpose(1, 2).unflatten(2, x.shape[-2:])


class QwenImage(Backbone):
    """Qwen-Image and its edit models. With `zero_cond_t` in the checkpoint's config, reference tokens are modulated as clean data."""

    @property
    def channels(self) -> int:
        return self.config.in_channels // 4

    def predict(self, x, t, text, reference):
        height, width = x.shape[-2:]
        pictures = [x] if reference is None else [x, reference]
        tokens = torch.cat([pack(z) for z in pictures], 1)
        shapes = [[(1, z.shape[-2] // 2, z.shape[-1] // 2) for z in pictures]] * len(x)
        with exact_time(self.transformer.time_text_embed.time_proj, t):
            v = self.transformer(
                hidden_states=tokens, encoder_hidden_states=text.states, encoder_hidden_states_mask=text.mask, timestep=t, img_shapes=shapes,
                return_dict=False,
            )[0]  # fmt: skip
        return unpack(v[:, : height // 2 * (width // 2)], height, width)


class ZImage(Backbone):
    """Z-Image: its time runs from noise (0) to data (1), so time and velocity are reversed. The reference is frame 0 of a two-frame
    latent under one modulation, or, with `omni`, an image of its own that is modulated as clean data."""

    omni = False

    def text_width(self) -> int:
        return self.config.cap_feat_dim

    def predict(self, x, t, text, reference):
        words = text.rows()
        if reference is not None and self.omni and any(len(w) < 2 for w in words):
            raise ValueError("omni mode puts the reference after a prompt's first token, so each prompt needs at least 2 tokens; use the family's template")
        if reference is not None and not self.omni and reference.shape != x.shape:
            raise ValueError(f"two frames of one latent have one size: x is {tuple(x.shape)}, the reference {tuple(reference.shape)}; resize it, or use omni=True")

        def network(x: Tensor, time: Tensor) -> Tensor:
            frames, known = list(x.unsqueeze(2)), None if reference is None else reference.unsqueeze(2)  # (C, 1, H, W) each
            if known is None:
                out = self.transformer(frames, time, words, return_dict=False)[0]
            elif self.omni:
                out = self.transformer(
                    [list(pair) for pair in zip(known, frames)], time, [[w[:1], w[1:]] for w in words],
                    siglip_feats=[None] * len(x), image_noise_mask=[[0, 1]] * len(x), return_dict=False,
                )[0]  # fmt: skip
            else:
                out = self.transformer(list(torch.cat((known, x.unsqueeze(2)), 2)), time, words, return_dict=False)[0]
            return torch.stack([o[:, -1] for o in out])

        return from_data_time(network, x, t)


class Channels(Backbone):
    """A family without a slot for a second picture: the reference's latents stand in further input channels."""

    entry = "pos_embed.proj"  # the patch embedding

    @property
    def channels(self) -> int:
        return self.config.out_channels

    @property
    def wide(self) -> bool:
        return self.config.in_channels == 2 * self.channels

    def beside(self, x: Tensor, reference: Tensor | None) -> Tensor:
        if reference is not None and not self.wide:
            raise ValueError(f"{type(self.transformer).__name__} takes {self.config.in_channels} channels and so no reference; pass it through vlmedit.networks.backbones.widen first")
        return torch.cat((x, torch.zeros_like(x) if reference is None else reference), 1) if self.wide else x


class SD3(Channels):
    """Stable Diffusion 3 and 3.5."""

    masked, pooled = False, True

    def predict(self, x, t, text, reference):
        return self.transformer(
            hidden_states=self.beside(x, reference), encoder_hidden_states=text.states, pooled_projections=text.pooled, timestep=1000 * t, return_dict=False
        )[0]


class Sana(Channels):
    """Sana; its linear attention has no positions, its 3x3 convolutions do."""

    entry, multiple, embedded_guidance = "patch_embed.proj", 1, 1.0

    def text_width(self) -> int:
        return self.config.caption_channels

    def predict(self, x, t, text, reference):
        guidance = torch.full_like(t, self.embedded_guidance * self.config.guidance_embeds_scale) if self.config.guidance_embeds else None
        return self.transformer(
            self.beside(x, reference), encoder_hidden_states=text.states, encoder_attention_mask=text.mask.to(x.dtype),
            timestep=1000 * t * self.config.timestep_scale, guidance=guidance, return_dict=False,
        )[0]  # fmt: skip


class Shapes(Backbone):
    """The suite's own transformer, on pixels of one size. It has its text encoder inside, so a prompt's states are its tokens' ids (L, 1),
    padding included, and the encoder is trained with the rest where all weights are. The reference is encoded anew in each call."""

    masked, pixels = False, True

    @property
    def channels(self) -> int:
        return self.config.channels

    def text_width(self) -> int:
        return 1

    def encode_text(self, numbers: Tensor) -> Text:
        return self.bank(numbers, self.transformer.device)

    def predict(self, x, t, text, reference):
        side = self.config.side
        for name, z in (("x", x), ("reference", reference)):
            if z is not None and z.shape[-2:] != (side, side):
                raise ValueError(f"{name} is {tuple(z.shape)}; this DiT draws {side} x {side} pixels alone: buckets={side}x{side}")
        return self.transformer(x, t, text.states[..., 0].long(), reference)


FAMILIES: dict[str, type[Backbone]] = {
    "FluxTransformer2DModel": Flux,
    "Flux2Transformer2DModel": Flux2,
    "QwenImageTransformer2DModel": QwenImage,
    "ZImageTransformer2DModel": ZImage,
    "SD3Transformer2DModel": SD3,
    "SanaTransformer2DModel": Sana,
    DiT.__name__: Shapes,
}


def family_of(name: str) -> type[Backbone]:
    """The adapter of a transformer's class. Raises ValueError for a class without one."""
    if name not in FAMILIES:
        raise ValueError(f"no adapter for {name}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


@torch.no_grad()
def widen(transformer: ModelMixin) -> ModelMixin:
    """A copy of an SD3 or Sana transformer with room for a reference: twice the input channels, the new weights zero, so that it
    draws what it drew before. Raises ValueError for another class, or one that is widened already."""
    family = family_of(type(transformer).__name__)
    if not issubclass(family, Channels):
        raise ValueError(f"{type(transformer).__name__} takes its reference as tokens; only SD3Transformer2DModel and SanaTransformer2DModel are widened")
    config = transformer.config
    channels, out = config.in_channels, config.out_channels or config.in_channels
    if channels != out:
        raise ValueError(f"{type(transformer).__name__} takes {channels} channels and returns {out}: it is widened already")
    with torch.device(transformer.device):
        wide = type(transformer).from_config({**config, "in_channels": 2 * channels, "out_channels": out})
    weights = transformer.state_dict()
    key = f"{family.entry}.weight"
    weights[key] = torch.cat((weights[key], torch.zeros_like(weights[key])), 1)
    wide.load_state_dict(weights)
    return wide if wide.dtype == transformer.dtype else wide.to(transformer.dtype)


class ModelConfig(ConfigMixin):
    """Reads a model's config.json, whatever its class."""

    config_name = "config.json"


def load_transformer(folder: str | os.PathLike, subfolder: str | None = None, **kwargs) -> ModelMixin:
    """A saved transformer of a known family, its class read from config.json before any weight is. `folder` may be an id of the Hub.
    Raises ValueError for a class without an adapter, FileNotFoundError for a folder or an id that does not lead to a model."""
    place = f"{folder}" + (f"/{subfolder}" if subfolder else "")
    try:
        config = ModelConfig.load_config(str(folder), subfolder=subfolder)
    except OSError as error:
        raise FileNotFoundError(f"no model config at {place}: give a folder with config.json, or an id of the Hub and a network ({str(error).splitlines()[0]})") from error
    name = config.get("_class_name", "a model without a class name")
    family_of(name)
    try:
        return getattr(diffusers, name).from_pretrained(str(folder), subfolder=subfolder, **kwargs)
    except (OSError, SafetensorError) as error:
        raise FileNotFoundError(f"{place} has a config but not all of its weights; download it again ({str(error).splitlines()[0]})") from error


def backbone_of(transformer: ModelMixin, bank: TextBank, checkpointing: bool = False) -> Backbone:
    """The adapter around a loaded transformer."""
    return family_of(type(transformer).__name__)(transformer, bank, checkpointing)
