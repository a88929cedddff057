"""FLUX.1 and FLUX.1-Kontext: tokens are 2x2 squares of latents at positions (k, row, column), of the reference with k = 1.

Source: `FluxKontextPipeline` of diffusers. Shapes: see `_base.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmedit.networks.backbones._base import (
    Backbone,
    Family,
    Published,
    Stock,
    Tiny,
    exact_time,
    grid_ids,
    pack,
    unpack,
)
from vlmedit.networks.backbones._tiny import clip_config, full_kl, kl, t5


def encode_words(pipeline, text, **settings):
    states, pooled, _ = pipeline.encode_prompt(text, None, **settings)
    return states[0], pooled[0]


def velocity(transformer, x, t, text, reference=None, embedded_guidance=1.0):
    height, width = x.shape[-2:]
    pictures = [x] if reference is None else [x, reference]
    tokens = torch.cat([pack(z) for z in pictures], 1)
    ids = torch.cat([grid_ids(k, z.shape[-2] // 2, z.shape[-1] // 2, device=x.device) for k, z in enumerate(pictures)])
    guidance = torch.full_like(t, embedded_guidance) if transformer.config.guidance_embeds else None
    text_ids = torch.zeros(text.states.shape[1], 3, device=x.device)
    with exact_time(transformer.time_text_embed.time_proj, 1000 * t):
        v = transformer(
            hidden_states=tokens, encoder_hidden_states=text.states, pooled_projections=text.pooled, timestep=t, img_ids=ids.to(x.dtype),
            txt_ids=text_ids.to(x.dtype), guidance=guidance, return_dict=False,
        )[0]  # fmt: skip
    return unpack(v[:, : height // 2 * (width // 2)], height, width)


class Flux(Backbone):
    """`embedded_guidance` is what a guidance-distilled checkpoint is told; 1 asks for the plain velocity."""

    masked, modes, embedded_guidance = False, ("embedded_guidance",), 1.0

    @property
    def channels(self) -> int:
        return self.config.in_channels // 4

    @staticmethod
    def pooled_width(config) -> int:
        return config.pooled_projection_dim

    def predict(self, x: Tensor, t: Tensor, text, reference: Tensor | None) -> Tensor:
        return velocity(self.transformer, x, t, text, reference, self.embedded_guidance)


def tiny(width: int) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=width,
        pooled_projection_dim=width, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def words(tokenizer) -> dict:
    """A CLIP and a T5 of a layer each."""
    from transformers import CLIPTextModel

    clip = CLIPTextModel(clip_config(16, 32))
    return dict(text_encoder=clip, tokenizer=tokenizer(length=77), text_encoder_2=t5(16), tokenizer_2=tokenizer())


def full() -> nn.Module:
    """FLUX.1-Kontext-dev, 12B: the class's defaults, with guidance embedding."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def unscaled(width: int, height: int) -> dict:
    """The pipeline would scale every picture to an area of its own."""
    return dict(max_area=width * height, _auto_resize=False)


FAMILY = Family(
    transformer="FluxTransformer2DModel", adapter=Flux, calls=(encode_words, velocity), title="FLUX.1-Kontext",
    tiny=Tiny(tiny, kl, words, "FluxKontextPipeline"),
    full=Published(("black-forest-labs/FLUX.1-Kontext-dev",), full, full_kl, "FLUX.1's autoencoder"),
    stock=Stock("FluxKontextPipeline", unscaled, "max_area=image.height * image.width, _auto_resize=False"),
)  # fmt: skip
