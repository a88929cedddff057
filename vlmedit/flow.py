"""Rectified flow: the one home of every convention of the suite.

    x_t = (1 - t) x0 + t eps          t = 0 is data, t = 1 is noise                  (interpolate)
    v   = eps - x0                    what a network predicts                        (velocity_target)
    x0  = x_t - t v,  eps = x_t + (1 - t) v                                          (to_x0, to_eps)
    guided = u + w (c - u)            off at w = 1, the negative prompt at w = 0      (guide)
    shift(u) = s u / (1 + (s - 1) u)  moves a schedule towards noise                  (shift_time)

Shapes: x (B, C, H, W) or any trailing shape; t (B,) or a float. No other file writes an interpolation by hand.
Source: [arXiv:2209.03003], shift from SD3 [arXiv:2403.03206, Eq. 23]. Deviates from the sources: nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> v
Generators = torch.Generator | list[torch.Generator] | None


def _like(t: Tensor | float, x: Tensor) -> Tensor:
    """`t` shaped to broadcast over the trailing axes of `x`."""
    t = torch.as_tensor(t, device=x.device, dtype=x.dtype)
    return t.view(-1, *[1] * (x.ndim - 1)) if t.ndim else t


def interpolate(x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
    """x_t between data (t = 0) and noise (t = 1)."""
    t = _like(t, x0)
    return (1 - t) * x0 + t * eps  # Eq. E1


def velocity_target(x0: Tensor, eps: Tensor) -> Tensor:
    return eps - x0  # Eq. E1


def to_x0(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    return x - _like(t, x) * v  # Eq. E1


def to_eps(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    return x + (1 - _like(t, x)) * v  # Eq. E1


def to_velocity(x: Tensor, x0: Tensor, t: Tensor | float) -> Tensor:
    """Velocity of an x0 prediction, the inverse of `to_x0`; t must be positive."""
    return (x - x0) / _like(t, x)


def guide(cond: Tensor, uncond: Tensor, w: Tensor | float) -> Tensor:
    """Classifier-free guidance in NP-Edit's form (method.md 1.7): w = 1 is `cond`, w = 0 is `uncond`; w (B,) is by row."""
    return uncond + (_like(w, cond) if isinstance(w, Tensor) else w) * (cond - uncond)


def noise_like(shape: Sequence[int], generator: Generators = None, device=None, dtype=None) -> Tensor:
    """Standard normal noise of a shape, to the bit what diffusers draws. A list of generators holds one per row.

    Generators of the CPU draw there, so that a seed means the same noise on every device; torch raises a RuntimeError
    for generators of any other device than the noise's.
    """
    device = torch.device("cpu" if device is None else device)
    each = generator if isinstance(generator, list) else [generator]
    place = torch.device("cpu") if each[0] is not None and each[0].device.type == "cpu" else device
    if len(each) == 1:
        return torch.randn(tuple(shape), generator=each[0], device=place, dtype=dtype).to(device)
    rows = [torch.randn((1, *shape[1:]), generator=each[row], device=place, dtype=dtype) for row in range(shape[0])]
    return torch.cat(rows).to(device)


def shift_time(u: Tensor | float, shift: float) -> Tensor | float:
    """Move times towards noise; the identity at shift = 1."""
    return shift * u / (1 + (shift - 1) * u)  # Eq. E4, 23 [arXiv:2403.03206]


def unshift_time(t: Tensor | float, shift: float) -> Tensor | float:
    """Inverse of `shift_time`."""
    return t / (shift - (shift - 1) * t)


def few_step_times(steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """Start times of a few-step sampler: shift(1), shift(1 - 1/n), ..., shift(1/n). At 4 steps and shift 6 this
    is the released [1, .9474, .8571, .6667]."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; a sampler needs at least 1")
    return tuple(float(shift_time(1 - i / steps, shift)) for i in range(steps))


def flow_matching_loss(velocity: Velocity, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Mean squared velocity error per sample, (B,)."""
    error = velocity(interpolate(x0, eps, t), t) - velocity_target(x0, eps)
    return error.square().flatten(1).mean(1)  # Eq. E2


def logit_normal_time(batch: int, shift: float = 1.0, device=None, generator=None) -> Tensor:
    """Training times, sigmoid of a standard normal, shifted [arXiv:2403.03206, Eq. 19]."""
    u = torch.randn(batch, device=device, generator=generator).sigmoid()  # Eq. E2, 19 [arXiv:2403.03206]
    return shift_time(u, shift)


def step_euler(x: Tensor, v: Tensor, t: float, s: float, noise: Tensor | None = None) -> Tensor:
    """One Euler step from t to s < t."""
    return x + (s - t) * v


def step_renoise(x: Tensor, v: Tensor, t: float, s: float, noise: Tensor | None = None) -> Tensor:
    """Jump to x0, then back to level s with fresh noise: the rule the unroll trains (same as diffusers'
    `FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)`)."""
    x0 = to_x0(x, v, t)
    return interpolate(x0, torch.randn_like(x) if noise is None else noise, s)


def step_corrector(x: Tensor, v: Tensor, t: float, s: float, noise: Tensor | None = None) -> Tensor:
    """The released sampler at eta = 1: x = (1 - s) x0 + (s^2/t) eps + sqrt(s^2 - s^4/t^2) noise [npedit sampler.py]."""
    x0, eps = to_x0(x, v, t), to_eps(x, v, t)
    noise = torch.randn_like(x) if noise is None else noise
    return (1 - s) * x0 + s * s / t * eps + (s * s - (s * s / t) ** 2) ** 0.5 * noise  # Eq. corrector [npedit sampler.py]


SAMPLERS = {"euler": step_euler, "renoise": step_renoise, "corrector": step_corrector}


@torch.no_grad()
def sample(
    velocity: Velocity, x: Tensor, times: Sequence[float], sampler: str = "euler", generator: Generators = None
) -> Tensor:
    """Integrate from noise `x` at times[0] down to 0, one network call per entry of `times`. A list of generators holds one
    per sample.

    Raises ValueError for an unknown sampler or times that do not fall.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
    stops = [*times, 0.0]
    if not len(times) or any(a <= b for a, b in zip(stops, stops[1:])):
        raise ValueError(f"times must fall strictly towards 0, at least one of them, got {list(times)}")
    for t, s in zip(stops, stops[1:]):
        v = velocity(x, torch.full((len(x),), t, device=x.device, dtype=x.dtype))
        noise = noise_like(x.shape, generator, x.device, x.dtype) if sampler != "euler" else None
        x = SAMPLERS[sampler](x, v, t, s, noise)
    return x
