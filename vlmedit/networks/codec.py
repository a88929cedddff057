"""Codecs: the space in which the flow lives. `PixelCodec` is the identity; `AutoencoderCodec` wraps a diffusers autoencoder.

    latents = (z - shift) * scale       pixels = decode(latents / scale + shift)
with scale and shift from the autoencoder's own configuration: `scaling_factor` and `shift_factor` (AutoencoderKL, DC, Tiny),
`latents_mean` and `latents_std` per channel (Qwen-Image), or running batch statistics of 2x2-packed latents (FLUX.2).
Encoding takes the mode of a variational posterior. Decoding is differentiable in the latents; the weights are frozen. An autoencoder works
in its own precision whatever autocast says, and hands out fp32.

Shapes: pixels (B, 3, S, S) in [-1, 1]; latents (B, `channels`, S / `downscale`, S / `downscale`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from diffusers import AutoModel, ModelMixin
from torch import Tensor, nn

PROBE_SIDE = 64  # pixels of the blank picture that measures an autoencoder's latents


class PixelCodec(nn.Module):
    """Latents are the pixels."""

    def __init__(self, channels: int = 3):
        super().__init__()
        self.channels, self.downscale = channels, 1

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def latent_statistics(autoencoder: ModelMixin) -> tuple[Tensor, Tensor]:
    """Shift and scale of the latents, each broadcastable over (B, C, H, W)."""
    config = autoencoder.config

    def column(values) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32).view(1, -1, 1, 1)

    if hasattr(autoencoder, "bn"):  # FLUX.2
        bn = autoencoder.bn
        return column(bn.running_mean), column((bn.running_var + config.batch_norm_eps).rsqrt())
    if config.get("latents_mean") and config.get("latents_std"):
        return column(config.latents_mean), column(config.latents_std).reciprocal()
    return column([config.get("shift_factor") or 0.0]), column([config.get("scaling_factor") or 1.0])


def downscale_of(config: dict) -> int:
    """Pixels per latent along one side as an autoencoder makes them (before any packing), by its configuration."""
    if "temperal_downsample" in config:  # with an axis of frames
        return 2 ** len(config["temperal_downsample"])
    return 2 ** (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1)


class AutoencoderCodec(nn.Module):
    """Any diffusers image autoencoder, frozen. Raises ValueError when `checkpointing` is asked of a class without it."""

    def __init__(self, autoencoder: ModelMixin, checkpointing: bool = False):
        super().__init__()
        name = type(autoencoder).__name__
        if checkpointing and not autoencoder._supports_gradient_checkpointing:
            raise ValueError(f"{name} does not support gradient checkpointing; pass checkpointing=False or use another class, such as AutoencoderKL")
        if checkpointing:
            autoencoder.enable_gradient_checkpointing()
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.frames = any(isinstance(m, nn.Conv3d) for m in autoencoder.modules())  # (B, C, 1, H, W) inside
        self.packed = hasattr(autoencoder, "bn")  # 2x2 latent pixels per channel group
        shift, scale = latent_statistics(autoencoder)
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        with torch.no_grad():
            probe = self.encode(torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE, device=autoencoder.device, dtype=autoencoder.dtype))
        self.channels, self.downscale = probe.shape[1], PROBE_SIDE // probe.shape[-1]

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, checkpointing: bool = False, **kwargs) -> AutoencoderCodec:
        """The codec of a saved autoencoder; its class is read from the folder."""
        return cls(AutoModel.from_pretrained(str(folder), **kwargs), checkpointing)

    def exactly(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`work` on x in the autoencoder's precision; on the meta device, where nothing is computed, autocast is unknown."""
        with torch.autocast(x.device.type, enabled=False) if not x.is_meta else nullcontext():
            return work(x.to(self.autoencoder.dtype)).float()

    def encode(self, pixels: Tensor) -> Tensor:
        return self.exactly(self.to_latents, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return self.exactly(self.to_pixels, latents)

    def to_latents(self, pixels: Tensor) -> Tensor:
        out = self.autoencoder.encode(pixels.unsqueeze(2) if self.frames else pixels)
        if hasattr(out, "latent_dist"):
            z = out.latent_dist.mode()
        else:
            z = out.latent if hasattr(out, "latent") else out.latents
        z = z.squeeze(2) if self.frames else z
        z = F.pixel_unshuffle(z, 2) if self.packed else z
        return (z - self.shift.to(z)) * self.scale.to(z)

    def to_pixels(self, latents: Tensor) -> Tensor:
        z = latents / self.scale.to(latents) + self.shift.to(latents)
        z = F.pixel_shuffle(z, 2) if self.packed else z
        pixels = self.autoencoder.decode(z.unsqueeze(2) if self.frames else z).sample
        return pixels.squeeze(2) if self.frames else pixels
