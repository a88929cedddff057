"""Qwen-Image and its edit models: tokens are 2x2 squares of latents, the reference a second grid of them. With `zero_cond_t` in the
checkpoint's config, reference tokens are modulated as clean data. Words are encoded without the picture.

Source: `QwenImageEditPipeline` of diffusers. Shapes: see `_base.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmedit.networks.backbones._base import Backbone, Family, Published, Tiny, exact_time, pack, unpack
from vlmedit.networks.backbones._tiny import VOCABULARY


def encode_words(pipeline, text, **settings):
    states, mask = pipeline.encode_prompt(text, **settings)[:2]
    return states[0] if mask is None else states[0][mask[0].bool()], None


def velocity(transformer, x, t, text, reference=None):
    height, width = x.shape[-2:]
    pictures = [x] if reference is None else [x, reference]
    tokens = torch.cat([pack(z) for z in pictures], 1)
    shapes = [[(1, z.shape[-2] // 2, z.shape[-1] // 2) for z in pictures]] * len(x)
    with exact_time(transformer.time_text_embed.time_proj, t):
        v = transformer(
            hidden_states=tokens, encoder_hidden_states=text.states, encoder_hidden_states_mask=text.mask, timestep=t, img_shapes=shapes,
            return_dict=False,
        )[0]  # fmt: skip
    return unpack(v[:, : height // 2 * (width // 2)], height, width)


class QwenImage(Backbone):
    """Its latents are a quarter of the channels that its tokens have."""

    @property
    def channels(self) -> int:
        return self.config.in_channels // 4

    def predict(self, x: Tensor, t: Tensor, text, reference: Tensor | None) -> Tensor:
        return velocity(self.transformer, x, t, text, reference)


def tiny(width: int) -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=width,
        axes_dims_rope=(8, 4, 4), zero_cond_t=True,
    )  # fmt: skip


def autoencoder() -> nn.Module:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 2.0, 1.0])


def words(tokenizer) -> dict:
    """A Qwen2.5-VL of two layers; the processor that shows it pictures is left out, because words alone are encoded."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=16, patch_size=4, spatial_merge_size=2, temporal_patch_size=2,
        window_size=16, fullatt_block_indexes=[1],
    )  # fmt: skip
    text = dict(
        hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCABULARY,
        max_position_embeddings=1024, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0},
    )  # fmt: skip
    chatting = tokenizer(chat=True)
    ids = {name: chatting.convert_tokens_to_ids(f"<|{token}|>") for name, token in PLACES.items()}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, text_config=text, **ids))
    return dict(text_encoder=encoder, tokenizer=chatting, processor=None)


PLACES = {"image_token_id": "image_pad", "video_token_id": "video_pad", "vision_start_token_id": "vision_start"}  # of pictures in a text


def full() -> nn.Module:
    """Qwen-Image-Edit, 20B: the class's defaults."""
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel()


def full_autoencoder() -> nn.Module:
    """16 channels, 8 pixels per latent: the class's defaults."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage()


FAMILY = Family(
    transformer="QwenImageTransformer2DModel", adapter=QwenImage, calls=(encode_words, velocity), title="Qwen-Image-Edit", text_pipeline="QwenImagePipeline",
    tiny=Tiny(tiny, autoencoder, words, "QwenImageEditPipeline"),
    full=Published(("Qwen/Qwen-Image-Edit",), full, full_autoencoder, "Qwen-Image's autoencoder"),
)  # fmt: skip
