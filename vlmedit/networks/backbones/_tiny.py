"""Parts that several families' tiny pipelines, and several real ones, have in common. Nothing heavy is imported before it is called."""

from __future__ import annotations

from torch import nn

VOCABULARY = 400  # of every tiny tokenizer


def kl() -> nn.Module:
    """The autoencoder of the first FLUX and its relatives, 4 pixels per latent instead of 8."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 8, 16),
        latent_channels=4, norm_num_groups=4, scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip


def full_kl() -> nn.Module:
    """The same at its size: 16 channels, 8 pixels per latent."""
    from diffusers import AutoencoderKL

    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512))
    return AutoencoderKL(**blocks, layers_per_block=2, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)


def qwen3_config(width: int, layers: int, inner: int):
    """Of a text encoder with causal attention."""
    from transformers import Qwen3Config

    return Qwen3Config(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        vocab_size=VOCABULARY, max_position_embeddings=1024,
    )  # fmt: skip


def clip_config(width: int, inner: int):
    """Of a text encoder with pooled states."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCABULARY, projection_dim=width,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def t5(width: int) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(d_model=width, d_ff=32, d_kv=8, num_layers=1, num_heads=2, vocab_size=VOCABULARY))
