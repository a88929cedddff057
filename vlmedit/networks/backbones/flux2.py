"""FLUX.2, dev and klein: its codec packs the latents 2x2 already, so one latent is one token, at (T, row, column, 0); of the reference T = 10.

Source: `Flux2KleinPipeline` of diffusers. Shapes: see `_base.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmedit.networks.backbones._base import Backbone, Family, Published, Stock, Tiny, exact_time, grid_ids
from vlmedit.networks.backbones._tiny import qwen3_config


def encode_words(pipeline, text, **settings):
    return pipeline.encode_prompt(text, **settings)[0][0], None


def velocity(transformer, x, t, text, reference=None, embedded_guidance=1.0):
    pictures = [x] if reference is None else [x, reference]
    tokens = torch.cat([z.flatten(2).transpose(1, 2) for z in pictures], 1)
    ids = torch.cat([grid_ids(10 * k, *z.shape[-2:], last=True, device=x.device) for k, z in enumerate(pictures)])
    words = torch.zeros(text.states.shape[1], 4, device=x.device, dtype=ids.dtype)
    words[:, 3] = torch.arange(len(words))
    guidance = torch.full_like(t, embedded_guidance) if transformer.config.guidance_embeds else None
    with exact_time(transformer.time_guidance_embed.time_proj, 1000 * t):
        v = transformer(
            hidden_states=tokens, encoder_hidden_states=text.states, timestep=t, img_ids=ids, txt_ids=words, guidance=guidance, return_dict=False,
        )[0]  # fmt: skip
    return v[:, : x[0, 0].numel()].transpose(1, 2).unflatten(2, x.shape[-2:])


class Flux2(Backbone):
    """`embedded_guidance` as in FLUX.1."""

    masked, multiple, modes, embedded_guidance = False, 1, ("embedded_guidance",), 1.0

    def predict(self, x: Tensor, t: Tensor, text, reference: Tensor | None) -> Tensor:
        return velocity(self.transformer, x, t, text, reference, self.embedded_guidance)


def tiny(width: int) -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=width,
        timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip


def autoencoder() -> nn.Module:
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
        latent_channels=4, norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip


def words(tokenizer) -> dict:
    """Prompts are three of a Qwen3's layers side by side, the deepest the 27th, so there are as many."""
    from transformers import Qwen3ForCausalLM

    return dict(text_encoder=Qwen3ForCausalLM(qwen3_config(16, 28, 16)), tokenizer=tokenizer(chat=True), is_distilled=True)


def full() -> nn.Module:
    """FLUX.2 klein base, 4B: 5 double and 20 single blocks of 24 heads of 128, prompts of 3 x 2560, no guidance embedding (`Klein4BParams` of
    black-forest-labs/flux2, the released model's own code); the rest are the class's defaults."""
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False)


def full_autoencoder() -> nn.Module:
    """32 channels, packed 2 x 2: the class's defaults, with four stages of blocks."""
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2()


def nothing_more(width: int, height: int) -> dict:
    return {}


FAMILY = Family(
    transformer="Flux2Transformer2DModel", adapter=Flux2, calls=(encode_words, velocity), title="FLUX.2 klein",
    tiny=Tiny(tiny, autoencoder, words, "Flux2KleinPipeline", width=48),
    full=Published(("black-forest-labs/FLUX.2-klein-base-4B", "black-forest-labs/FLUX.2-klein-4B"), full, full_autoencoder, "FLUX.2's autoencoder"),
    stock=Stock("Flux2KleinPipeline", nothing_more, "", least=64),
)  # fmt: skip
