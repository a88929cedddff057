"""The unroll: from noise to a clean picture in a few differentiable calls of the student.

One home, used by student updates (with gradient) and fake-score updates (without) alike.
    x0 = eps - v(eps, 1);  x_t = (1 - t) x0 + t eps';  x0 = x_t - t v(x_t, t)          [arXiv:2510.14978, Sec. 3.1]
The paper re-noises with the same eps, the released code with a fresh one; the paper's gradient flows through every call.

Shapes: noise (B, C, H, W). Deviates from the paper: fresh noise by default, as the code (`renoise="same"` is the paper's).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlmedit.flow import Velocity, few_step_times, interpolate, to_x0

Times = tuple[float, ...]
RENOISE = ("fresh", "same")


def two(rng: random.Random, grid: Times) -> Times:
    if len(grid) < 2:
        raise ValueError(f"unroll 'two' needs at least 2 steps, got {len(grid)}")
    return grid[0], rng.choice(grid[1:])


def mixed(rng: random.Random, grid: Times) -> Times:
    k = rng.randrange(len(grid))
    return grid[:1] if k == 0 else (grid[0], grid[k])


CALLS: dict[str, Callable[[random.Random, Times], Times]] = {  # which of the sampler's times an unroll calls the student at
    "one": lambda rng, grid: grid[:1],
    "two": two,  # (1, t_k), k uniform
    "mixed": mixed,  # k uniform over the whole grid, so that one in `steps` unrolls is a single call, as released
    "all": lambda rng, grid: grid,
}


def draw_times(rng: random.Random, calls: str = "mixed", steps: int = 4, shift: float = 1.0) -> Times:
    """Times of one unroll on the sampler's own grid, by one of `CALLS`. Raises ValueError for an unknown one, or too few steps."""
    if calls not in CALLS:
        raise ValueError(f"unknown unroll {calls!r}; known: {', '.join(CALLS)}")
    return CALLS[calls](rng, few_step_times(steps, shift))


def rollout(velocity: Velocity, noise: Tensor, times: Sequence[float], renoise: str = "fresh", gradient_calls: int | None = None) -> Tensor:
    """Clean picture after one call per entry of `times`. `gradient_calls`: the last K calls carry a graph, None is all.
    Raises ValueError for an unknown re-noise rule or fewer than one call with gradient."""
    if renoise not in RENOISE:
        raise ValueError(f"unknown renoise {renoise!r}; known: {', '.join(RENOISE)}")
    if gradient_calls is not None and gradient_calls < 1:
        raise ValueError(f"gradient_calls is {gradient_calls}; at least the last call must carry a gradient")
    x = noise
    for i, t in enumerate(times):
        if i > 0:
            x = interpolate(x, noise if renoise == "same" else torch.randn_like(noise), t)  # Eq. E5, x_t
        with_graph = torch.is_grad_enabled() and (gradient_calls is None or i >= len(times) - gradient_calls)
        with torch.set_grad_enabled(with_graph):
            x = to_x0(x, velocity(x, torch.full((len(x),), t, device=x.device, dtype=x.dtype)), t)  # Eq. E5, x0
    return x
