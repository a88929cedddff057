"""Notebook 01: the sampler, the loss and the guidance of a rectified flow. Conventions: vlmedit/flow.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlmedit.flow import Velocity, flow_matching_loss, guide, sample
from vlmedit.teaching.checking import Exercise


def _column(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.ndim - 1))


def bent(x: Tensor, t: Tensor) -> Tensor:
    """A velocity that depends on place and time."""
    return torch.sin(2 * x) + _column(t, x).square() + 0.3 * x


def turning(x: Tensor, t: Tensor) -> Tensor:
    """Another one, in which the axes of a sample mix."""
    return x.flip(-1) * torch.cos(3 * _column(t, x)) - 0.5


# the sampler


def sample_cases() -> list[tuple[Velocity, Tensor, tuple[float, ...]]]:
    generator = torch.Generator().manual_seed(0)
    noise = lambda *shape: torch.randn(*shape, generator=generator)
    # grids with unequal steps: on an equal one a step of 1 / n would be right
    return [
        (bent, noise(5, 2), (1.0, 0.75, 0.5, 0.25)),
        (turning, noise(3, 2), (1.0, 0.9, 0.4)),
        (bent, noise(2, 3, 4, 4), (1.0, 0.8, 0.3, 0.1)),
        (turning, noise(4, 2), (1.0,)),
    ]


def _walk(step: Callable[[Velocity, Tensor, float, float], Tensor], stops: Callable[[Sequence[float]], Sequence[float]] = lambda times: [*times, 0.0]):
    """A sampler that makes `step` between neighbors of `stops`."""

    def walk(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
        places = stops(times)
        for t, s in zip(places, places[1:]):
            x = step(velocity, x, t, s)
        return x

    return walk


def _told(velocity: Velocity, x: Tensor, t: float) -> Tensor:
    return velocity(x, torch.full((len(x),), t))


def _equal_steps(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    for t in times:
        x = x - _told(velocity, x, t) / len(times)
    return x


def _asked_once(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    return x - times[0] * _told(velocity, x, times[0])


SAMPLE = Exercise(
    sample,
    sample_cases,
    {
        "it stops at the last of `times`; the last step goes from there to 0": _walk(
            lambda velocity, x, t, s: x + (s - t) * _told(velocity, x, t), lambda times: list(times)
        ),
        "it walks towards more noise: s - t is negative, and v points to the noise": _walk(lambda velocity, x, t, s: x + (t - s) * _told(velocity, x, t)),
        "the network is told the time of the step's end; it must know where it is now": _walk(lambda velocity, x, t, s: x + (s - t) * _told(velocity, x, s)),
        "the network is told 1 - t; t = 1 is noise": _walk(lambda velocity, x, t, s: x + (s - t) * _told(velocity, x, 1 - t)),
        "each step goes all the way to t = 0": _walk(lambda velocity, x, t, s: x - t * _told(velocity, x, t)),
        "all steps have length 1 / n; the lengths are the differences of `times`": _equal_steps,
        "the network is asked once; ask again after every step": _asked_once,
    },
)


# the loss


def loss_cases() -> list[tuple[Velocity, Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    cases = []
    for velocity, shape in ((bent, (5, 2)), (turning, (2, 2)), (bent, (3, 3, 4, 4)), (turning, (1, 2))):
        t = torch.rand(shape[0], generator=generator) * 0.4 + 0.05  # never 0.5, where both directions of time agree
        cases.append((velocity, draw(*shape), t, draw(*shape)))
    return cases


def _mean(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(1)


def _at(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    return (1 - _column(t, x0)) * x0 + _column(t, x0) * eps


FLOW_LOSS = Exercise(
    flow_matching_loss,
    loss_cases,
    {
        "time runs the wrong way: t = 0 is data": lambda v, x0, t, eps: _mean(v(_at(eps, x0, t), t) - (eps - x0)),
        "the target has the wrong sign: the velocity points from data to noise": lambda v, x0, t, eps: _mean(v(_at(x0, eps, t), t) - (x0 - eps)),
        "the target is the noise; it must be the velocity": lambda v, x0, t, eps: _mean(v(_at(x0, eps, t), t) - eps),
        "the target is the data; it must be the velocity": lambda v, x0, t, eps: _mean(v(_at(x0, eps, t), t) - x0),
        "the network sees clean data; it must see x_t": lambda v, x0, t, eps: _mean(v(x0, t) - (eps - x0)),
        "the network is told 1 - t": lambda v, x0, t, eps: _mean(v(_at(x0, eps, t), 1 - t) - (eps - x0)),
        "the squares are summed; take their mean": lambda v, x0, t, eps: (v(_at(x0, eps, t), t) - (eps - x0)).square().flatten(1).sum(1),
        "the error is not squared": lambda v, x0, t, eps: (v(_at(x0, eps, t), t) - (eps - x0)).abs().flatten(1).mean(1),
        "the mean goes over the whole batch; every sample has a loss of its own": lambda v, x0, t, eps: (
            (v(_at(x0, eps, t), t) - (eps - x0)).square().mean().expand(len(x0))
        ),
    },
)


# guidance


def guide_cases() -> list[tuple[Tensor, Tensor, float]]:
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    return [(draw(*shape), draw(*shape), w) for shape, w in (((4, 2), 2.0), ((2, 3, 4, 4), 3.5), ((3, 2), 1.0), ((3, 2), 0.0), ((1, 2), 0.5))]


GUIDE = Exercise(
    guide,
    guide_cases,
    {
        "it counts from the other end: w = 1 must be off; in the form c + w (c - u) it is w = 0 that is": lambda c, u, w: c + w * (c - u),
        "the two answers are swapped: w = 1 must give the one with the caption": lambda c, u, w: c + w * (u - c),
        "the difference has the wrong sign: it must point towards the caption": lambda c, u, w: u + w * (u - c),
        "the answer without the caption is not subtracted": lambda c, u, w: u + w * c,
        "the answer without the caption is not added back": lambda c, u, w: w * (c - u),
        "the answer with the caption is scaled and the other ignored": lambda c, u, w: w * c,
        "w is cut off at 1; guidance goes beyond the answer with the caption": lambda c, u, w: u + min(w, 1.0) * (c - u),
    },
)
