"""Distribution Matching Distillation: pull student samples towards the teacher's image manifold.

The gradient of KL(student || teacher) at noise level t is the difference of two denoised pictures, of the frozen teacher
(x0_real, guided) and of an online model of the student's own distribution (x0_fake) [arXiv:2311.18828, Eq. 7, 8 in
x0-prediction form]. NP-Edit conditions both on the *target caption*, never on the reference [arXiv:2510.14978, Sec. 3.3].

Shapes: x (B, C, H, W), t (B,). Conventions: flow.py. Deviates: the normalizer is clamped at 1e-6 (the released code: 1e-8).
The two normalizers: per sample (DMD2, Self-Forcing) and per pixel (the released code; method.md 1.7).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlmedit.flow import flow_matching_loss, guide, interpolate, to_x0

NORMS = ("sample", "pixel")


def dmd_gradient(x: Tensor, x0_real: Tensor, x0_fake: Tensor, norm: str = "sample", eps: float = 1e-6) -> Tensor:
    """(x0_fake - x0_real) / mean|x - x0_real|: Eq. 7 over Eq. 8. Never carries a graph."""
    if norm not in NORMS:
        raise ValueError(f"unknown normalizer {norm!r}; known: {', '.join(NORMS)}")
    x, x0_real, x0_fake = x.detach(), x0_real.detach(), x0_fake.detach()
    axes = tuple(range(1, x.ndim)) if norm == "sample" else (1,)
    scale = (x - x0_real).abs().mean(axes, keepdim=True).clamp(min=eps)  # Eq. 8
    return torch.nan_to_num((x0_fake - x0_real) / scale)  # Eq. E8, 7


def dmd_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """Surrogate 0.5 ||x - sg(x - gradient)||^2 / numel, whose derivative is gradient / numel; its value means nothing."""
    return 0.5 * (x - (x - gradient).detach()).square().mean()  # Eq. E9


Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]  # velocity(x_t, t, text)


def guided_velocity(teacher: Denoiser, x_t: Tensor, t: Tensor, text: Tensor, guidance: float | Tensor) -> Tensor:
    """The teacher's velocity, guided against the empty caption: by one scale, 1 asks for no unconditional score, or by a
    scale per row (B,), which always asks for it, so that processes that share weights call them equally often."""
    v = teacher(x_t, t, text)
    if isinstance(guidance, Tensor) or guidance != 1:
        v = guide(v, teacher(x_t, t, torch.zeros_like(text)), guidance)  # Eq. E3
    return v


@torch.no_grad()  # both scores are constants of the student's loss
def dmd_scores(
    x: Tensor, text: Tensor, teacher: Denoiser, fake: Denoiser, guidance: float | Tensor, t: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """x0_real (guided) and x0_fake at level t of pictures x with target caption ids `text`."""
    x_t = interpolate(x.detach(), eps, t)
    v_real = guided_velocity(teacher, x_t, t, text, guidance)
    return to_x0(x_t, v_real, t), to_x0(x_t, fake(x_t, t, text), t)


def draw_dmd_time(batch: int, low: float = 0.02, high: float = 0.98, device=None) -> Tensor:
    """Noise levels of the DMD gradient, uniform [released: 0.02 to 0.98]."""
    return low + (high - low) * torch.rand(batch, device=device)


def fake_score_loss(fake: Denoiser, samples: Tensor, text: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Flow matching on the student's own (detached) samples with the target caption."""
    return flow_matching_loss(lambda x, time: fake(x, time, text), samples.detach(), t, eps).mean()  # Eq. E10
