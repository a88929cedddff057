"""Editing without any training: the text-to-image teacher, what the reference shows and what it should show, in words.

    sdedit:    x at `start` = (1 - start) y + start eps, then the flow under the target caption                   [arXiv:2108.01073]
    inversion: the flow backwards from y to `start` under the source caption, then forwards under the target's    [arXiv:2010.02502, Eq. 14]
               Each backward step solves x_t = x_s + (t - s) v(x_t, t) by fixed-point iteration: with enough of them it
               undoes the
               sampler's Euler step exactly; one iteration is DDIM inversion                                      [arXiv:2403.14602]
    flowedit:  dz = E_eps[v(z + y_t - y, t, target) - v(y_t, t, source)] dt, y_t = (1 - t) y + t eps, from z = y
    [arXiv:2412.08629]

They ask for two captions where a trained editor asks for an instruction, and for many guided calls where it makes four.
Shapes: pictures (B, 3, S, S); velocities (x, t) -> v as in flow.py. The reference's caption is given with it.
Deviates: `flowedit` integrates to t = 0 (n_min = 0), as its authors do by default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vlmedit.flow import Velocity, few_step_times, guide, interpolate, sample, step_euler


def guided(teacher: nn.Module, ids: Tensor, w: float = 1.0) -> Velocity:
    """A frozen text-to-image model's flow under caption ids (B, L), guided against the empty caption."""
    text, empty = teacher.encode_text(ids), teacher.encode_text(torch.zeros_like(ids))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        v = teacher(x, t, text)
        return v if w == 1 else guide(v, teacher(x, t, empty), w)

    return velocity


def times_below(start: float, steps: int) -> tuple[float, ...]:
    """`steps` equal steps from `start` to 0: their start times."""
    if not 0 < start <= 1:
        raise ValueError(f"start is {start}; it is a time in (0, 1]")
    return tuple(start * t for t in few_step_times(steps))


def at(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t, device=x.device, dtype=x.dtype)


@torch.no_grad()
def sdedit(source: Velocity, target: Velocity, y: Tensor, start: float = 0.6, steps: int = 15, generator=None) -> Tensor:
    """Noise the reference to `start` and denoise it under the target caption; the source caption is not used."""
    eps = torch.randn(y.shape, generator=generator).to(y)
    return sample(target, interpolate(y, eps, start), times_below(start, steps))  # Eq. SDEdit [arXiv:2108.01073]


@torch.no_grad()
def invert(velocity: Velocity, y: Tensor, times: Sequence[float], iterations: int = 3) -> Tensor:
    """The x at times[0] from which the Euler sampler on `times` draws y, up to the fixed point's error."""
    x, stops = y, [*times, 0.0]
    for t, s in reversed(list(zip(stops, stops[1:]))):
        guess = x
        for _ in range(iterations):
            guess = step_euler(x, velocity(guess, at(x, t)), s, t)  # Eq. 14 [arXiv:2010.02502]
        x = guess
    return x


@torch.no_grad()
def inversion(source: Velocity, target: Velocity, y: Tensor, start: float = 0.8, steps: int = 15, iterations: int = 3, generator=None) -> Tensor:
    """Back to `start` under the source caption, forth under the target caption. Deterministic."""
    times = times_below(start, steps)
    return sample(target, invert(source, y, times, iterations), times)


@torch.no_grad()
def flowedit(source: Velocity, target: Velocity, y: Tensor, start: float = 0.8, steps: int = 15, average: int = 1, generator=None) -> Tensor:
    """Follow the difference of the two flows, from the reference itself; `average` noises per step."""
    z, stops = y, [*times_below(start, steps), 0.0]
    for t, s in zip(stops, stops[1:]):
        total = torch.zeros_like(y)
        for _ in range(average):
            y_t = interpolate(y, torch.randn(y.shape, generator=generator).to(y), t)
            total += target(z + y_t - y, at(y, t)) - source(y_t, at(y, t))  # Eq. FlowEdit [arXiv:2412.08629]
        z = step_euler(z, total / average, t, s)
    return z


EDITORS: dict[str, Callable] = {"sdedit": sdedit, "inversion": inversion, "flowedit": flowedit}


def calls(editor: str, steps: int = 15, iterations: int = 3, average: int = 1, guidance: float = 1.0, source_guidance: float = 1.0, **_) -> int:
    """Network calls on one picture; a guided velocity takes two."""
    forth, back = (2 if w != 1 else 1 for w in (guidance, source_guidance))
    return steps * {"sdedit": forth, "inversion": forth + iterations * back, "flowedit": average * (forth + back)}[editor]
