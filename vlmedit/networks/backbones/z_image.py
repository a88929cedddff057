"""Z-Image: its time runs from noise (0) to data (1), so time and velocity are reversed. The reference is frame 0 of a two-frame latent under
one modulation, or, with `omni`, an image of its own that is modulated as clean data.

Source: the two frames from the released NP-Edit code, which also modulates reference tokens as clean data: that is `omni=True`, diffusers'
own two-time mode. Shapes: see `_base.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmedit.networks.backbones._base import Backbone, Family, Published, Tiny, from_data_time
from vlmedit.networks.backbones._tiny import full_kl, kl, qwen3_config


def encode_words(pipeline, text, **settings):
    states, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False, **settings)
    return states[0], None


def velocity(transformer, x, t, text, reference=None, omni=False):
    words = text.rows()

    def network(x, time):
        frames, known = list(x.unsqueeze(2)), None if reference is None else reference.unsqueeze(2)  # (C, 1, H, W) each
        if known is None:
            out = transformer(frames, time, words, return_dict=False)[0]
        elif omni:
            out = transformer(
                [list(pair) for pair in zip(known, frames)], time, [[w[:1], w[1:]] for w in words],
                siglip_feats=[None] * len(x), image_noise_mask=[[0, 1]] * len(x), return_dict=False,
            )[0]  # fmt: skip
        else:
            out = transformer(list(torch.cat((known, x.unsqueeze(2)), 2)), time, words, return_dict=False)[0]
        return torch.stack([o[:, -1] for o in out])

    return from_data_time(network, x, t)


class ZImage(Backbone):
    """`omni`: the reference as an image of its own."""

    modes, omni = ("omni",), False

    @staticmethod
    def text_width(config) -> int:
        return config.cap_feat_dim

    def predict(self, x: Tensor, t: Tensor, text, reference: Tensor | None) -> Tensor:
        if reference is not None and self.omni and any(len(w) < 2 for w in text.rows()):
            raise ValueError(
                "omni mode puts the reference after a prompt's first token, so each prompt needs at least 2 tokens; use the family's template"
            )
        if reference is not None and not self.omni and reference.shape != x.shape:
            raise ValueError(
                f"two frames of one latent have one size: x is {tuple(x.shape)}, the reference {tuple(reference.shape)}; resize it, or use omni=True"
            )
        return velocity(self.transformer, x, t, text, reference, self.omni)


def tiny(width: int) -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=width, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip


def words(tokenizer) -> dict:
    """A Qwen3 of two layers."""
    from transformers import Qwen3Model

    return dict(text_encoder=Qwen3Model(qwen3_config(16, 2, 32)), tokenizer=tokenizer(chat=True))


def full() -> nn.Module:
    """Z-Image, 6B: the class's defaults."""
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel()


FAMILY = Family(
    transformer="ZImageTransformer2DModel", adapter=ZImage, calls=(encode_words, velocity), title="Z-Image", text_pipeline="ZImagePipeline",
    tiny=Tiny(tiny, kl, words, "ZImagePipeline", shift=6.0),
    full=Published(("Tongyi-MAI/Z-Image", "Tongyi-MAI/Z-Image-Turbo"), full, full_kl, "FLUX.1's autoencoder"),
)  # fmt: skip
