"""Sana: its linear attention has no positions, its 3x3 convolutions do. No slot for a second picture, so the reference's latents stand in
further input channels of a widened transformer.

Source: `SanaPipeline` of diffusers. Shapes: see `_base.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmedit.networks.backbones._base import Channels, Family, Tiny, beside
from vlmedit.networks.backbones._tiny import VOCABULARY


def encode_words(pipeline, text, **settings):
    states, mask = pipeline.encode_prompt(text, do_classifier_free_guidance=False, **settings)[:2]
    return states[0] if mask is None else states[0][mask[0].bool()], None


def velocity(transformer, x, t, text, reference=None, embedded_guidance=1.0):
    config = transformer.config
    guidance = torch.full_like(t, embedded_guidance * config.guidance_embeds_scale) if config.guidance_embeds else None
    return transformer(
        beside(transformer, x, reference), encoder_hidden_states=text.states, encoder_attention_mask=text.mask.to(x.dtype),
        timestep=1000 * t * config.timestep_scale, guidance=guidance, return_dict=False,
    )[0]  # fmt: skip


class Sana(Channels):
    """`embedded_guidance` is what a guidance-distilled checkpoint is told."""

    entry, multiple, modes, embedded_guidance = "patch_embed.proj", 1, ("embedded_guidance",), 1.0

    @staticmethod
    def text_width(config) -> int:
        return config.caption_channels

    def predict(self, x: Tensor, t: Tensor, text, reference: Tensor | None) -> Tensor:
        return velocity(self.transformer, x, t, text, reference, self.embedded_guidance)


def tiny(width: int) -> nn.Module:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_cross_attention_heads=2,
        cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=width, sample_size=16,
    )  # fmt: skip


def autoencoder() -> nn.Module:
    from diffusers import AutoencoderDC

    return AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip


def words(tokenizer) -> dict:
    """A Gemma 2 of one layer."""
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8,
        vocab_size=VOCABULARY,
    )  # fmt: skip
    return dict(text_encoder=Gemma2Model(config), tokenizer=tokenizer())


FAMILY = Family(
    transformer="SanaTransformer2DModel", adapter=Sana, calls=(encode_words, velocity), title="Sana", text_pipeline="SanaPipeline", multiple=1,
    tiny=Tiny(tiny, autoencoder, words, "SanaPipeline"),
)  # fmt: skip
