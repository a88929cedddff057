"""The losses of the unpaired rivals without a VLM: a cycle, an adversary, a frozen model's direction of change.

    |F(G(y, c), c^-1) - y|_1                                      cycle        [CycleGAN-Turbo, arXiv:2403.12036; F is G itself]
    softplus(-D(x_t, c*))                                         adversary: pictures with captions, real or the student's
    |y + (mu(z_t, c*) - mu(y_t, c_y)) - mu_theta(z_t, y, c)|^2     direction prior [Bootstrap Your Generator, arXiv:2606.03911]

A cycle asks a student for an edit and then for its inverse, and wants the reference back; `data.cycles` has the words
for it. Shapes: pictures (B, 3, S, S) in [-1, 1]; ids (B, L).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmedit.equations.matching import log_ratio
from vlmedit.flow import Velocity, interpolate, to_x0

# what both rivals pay for


def cycle_loss(back: Tensor, reference: Tensor, reversible: Tensor) -> Tensor:
    """Mean |back - reference| over the rows that can be undone, over the whole batch's size."""
    return ((back - reference).abs().flatten(1).mean(1) * reversible).mean()  # Eq. cycle [arXiv:2403.12036]


def copy_loss(output: Tensor, reference: Tensor, nothing: Tensor) -> Tensor:
    """CycleGAN's identity term: mean |output - reference| where nothing is to be done."""
    return ((output - reference).abs().flatten(1).mean(1) * nothing).mean()


# CycleGAN-Turbo's adversary


def critic_loss(critic: nn.Module, output: Tensor, captions: Tensor, real: Tensor, real_captions: Tensor, t: Tensor, eps: Tensor, mismatch: float = 0.0) -> Tensor:
    """Cross-entropy of a critic of noised pictures with captions: true are references with theirs, false the student's
    pictures with the captions they should fulfill, and, weighted by `mismatch`, references with the next row's caption
    [arXiv:1605.05396]."""
    score = lambda x, text: log_ratio(critic, interpolate(x, eps, t), t, text)[0]
    false = F.softplus(score(output.detach(), captions)).mean()
    if mismatch:
        other = real_captions.roll(1, 0)
        strange = (other != real_captions).any(1).float()  # two references may well have one caption
        false = (1 - mismatch) * false + mismatch * (F.softplus(score(real, other)) * strange).mean()
    return F.softplus(-score(real, real_captions)).mean() + false


def adversarial_loss(critic: nn.Module, output: Tensor, captions: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """-log D of the student's noised pictures under the captions they should fulfill."""
    return F.softplus(-log_ratio(critic, interpolate(output, eps, t), t, captions)[0]).mean()  # Eq. adversary [arXiv:2403.12036]


# Bootstrap Your Generator's prior


@torch.no_grad()  # the direction is a constant of the student's loss
def direction(source: Velocity, target: Velocity, y: Tensor, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Where the frozen model would move the reference: its clean estimate of the noised pseudo-target z under the
    target caption, minus that of the reference y under the same noise and its own caption. At z = y that is FlowEdit's
    first step; where z is the right edit, both estimates err alike and the direction is z - y, so that a finished edit
    is left alone."""
    z_t, y_t = interpolate(z, eps, t), interpolate(y, eps, t)
    return to_x0(z_t, target(z_t, t), t) - to_x0(y_t, source(y_t, t), t)


def prior_loss(estimate: Tensor, reference: Tensor, towards: Tensor) -> Tensor:
    """Mean squared distance of the student's clean estimate to the reference moved by `towards`, per picture, (B,)."""
    return (estimate - (reference + towards).clamp(-1, 1)).square().flatten(1).mean(1)  # Eq. prior [arXiv:2606.03911]


def route(clean: Tensor, estimate: Tensor) -> Tensor:
    """The value of `clean`, sampled without a graph, the gradient of `estimate`, made from a noisy state: straight
    through."""
    return clean.detach() + estimate - estimate.detach()
