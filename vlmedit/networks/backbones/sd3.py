"""Stable Diffusion 3 and 3.5: no slot for a second picture, so the reference's latents stand in further input channels of a widened transformer.

Source: `StableDiffusion3Pipeline` of diffusers. Shapes: see `_base.py`.
"""

from __future__ import annotations

from torch import Tensor, nn

from vlmedit.networks.backbones._base import Channels, Family, Tiny, beside
from vlmedit.networks.backbones._tiny import clip_config, kl, t5


def encode_words(pipeline, text, **settings):
    states, _, pooled, _ = pipeline.encode_prompt(text, None, None, do_classifier_free_guidance=False, **settings)
    return states[0], pooled[0]


def velocity(transformer, x, t, text, reference=None):
    return transformer(
        hidden_states=beside(transformer, x, reference), encoder_hidden_states=text.states, pooled_projections=text.pooled,
        timestep=1000 * t, return_dict=False,
    )[0]  # fmt: skip


class SD3(Channels):
    """Its prompts all have one length."""

    masked, entry = False, "pos_embed.proj"

    @staticmethod
    def pooled_width(config) -> int:
        return config.pooled_projection_dim

    def predict(self, x: Tensor, t: Tensor, text, reference: Tensor | None) -> Tensor:
        return velocity(self.transformer, x, t, text, reference)


def tiny(width: int) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=width,
        caption_projection_dim=32, pooled_projection_dim=width, pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip


def words(tokenizer) -> dict:
    """Two CLIPs and a T5 of one layer."""
    from transformers import CLIPTextModelWithProjection

    first, config = tokenizer(length=77), clip_config(8, 16)
    clips = dict(text_encoder=CLIPTextModelWithProjection(config), tokenizer=first, text_encoder_2=CLIPTextModelWithProjection(config), tokenizer_2=first)
    return clips | dict(text_encoder_3=t5(16), tokenizer_3=tokenizer())


FAMILY = Family(
    transformer="SD3Transformer2DModel", adapter=SD3, calls=(encode_words, velocity), title="Stable Diffusion 3", text_pipeline="StableDiffusion3Pipeline",
    tiny=Tiny(tiny, kl, words, "StableDiffusion3Pipeline"),
)  # fmt: skip
