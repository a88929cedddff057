"""Notebook 07: a sampler's step as a policy, a group's advantages, and the objective that goes no further than it should. Equations: vlmedit/equations/flow_grpo.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vlmedit.equations.flow_grpo import clipped_objective, euler_policy, group_advantage
from vlmedit.teaching.checking import Exercise

# the random step


def step_cases() -> list[tuple[Tensor, Tensor, float, float, float]]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    # no level at which t = 1 - t, no step as long as its end; the first step starts at pure noise
    steps = ((0.8, 0.7, 0.7), (0.3, 0.1, 1.2), (1.0, 0.75, 0.7), (0.6, 0.35, 0.3))
    return [(draw(*shape), draw(*shape), t, s, a) for shape, (t, s, a) in zip(((5, 2), (3, 3, 4, 4), (4, 2), (1, 2)), steps)]


def _sigma(t: float, s: float, a: float) -> float:
    return a * math.sqrt(t / (1 - t if t < 1 else 1 - s))


def _step(
    pull: Callable[[Tensor, Tensor, float, float, float, float], Tensor] = lambda x, v, t, s, a, g: v + g * g / (2 * t) * (x + (1 - t) * v),
    std: Callable[[float, float, float], float] = lambda g, t, s: g * math.sqrt(t - s),
    sigma: Callable[[float, float, float], float] = _sigma,
) -> Callable:
    """The step with another drift, standard deviation or sigma."""

    def step(x: Tensor, v: Tensor, t: float, s: float, a: float) -> tuple[Tensor, float]:
        g = sigma(t, s, a)
        return x + pull(x, v, t, s, a, g) * (s - t), std(g, t, s)

    return step


RANDOM_STEP = Exercise(
    euler_policy,
    step_cases,
    {
        "the drift is the flow's own; noise is added and nothing taken away for it": _step(pull=lambda x, v, t, s, a, g: v),
        "the correction has the wrong sign: it must remove as much noise as is added": _step(
            pull=lambda x, v, t, s, a, g: v - g * g / (2 * t) * (x + (1 - t) * v)
        ),
        "the correction pulls the clean estimate x - t v; it must shrink the noise, x + (1 - t) v": _step(
            pull=lambda x, v, t, s, a, g: v + g * g / (2 * t) * (x - t * v)
        ),
        "the half is missing in sigma^2 / (2t)": _step(pull=lambda x, v, t, s, a, g: v + g * g / t * (x + (1 - t) * v)),
        "sigma is not squared in the correction": _step(pull=lambda x, v, t, s, a, g: v + g / (2 * t) * (x + (1 - t) * v)),
        "the standard deviation grows with the step's length; it must grow with its root": _step(std=lambda g, t, s: g * (t - s)),
        "that is the variance; return its root": _step(std=lambda g, t, s: g * g * (t - s)),
        "sigma is upside down: t / (1 - t), much noise where there is much": _step(sigma=lambda t, s, a: a * math.sqrt((1 - t if t < 1 else 1 - s) / t)),
        "the root in sigma is missing": _step(sigma=lambda t, s, a: a * t / (1 - t if t < 1 else 1 - s)),
        "1 - s stands for 1 - t at every step; only at t = 1 must it": _step(sigma=lambda t, s, a: a * math.sqrt(t / (1 - s))),
        "the mean walks towards more noise: s - t is negative": lambda x, v, t, s, a: (
            x + (v + _sigma(t, s, a) ** 2 / (2 * t) * (x + (1 - t) * v)) * (t - s),
            _sigma(t, s, a) * math.sqrt(t - s),
        ),
    },
)


# the advantage


def advantage_cases() -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(1)
    # groups of different levels and spreads, so that a batch-wide mean or spread shows; and one whose rewards are all equal
    levels = lambda groups, size: (torch.rand(groups, size, generator=generator) * torch.linspace(0.1, 0.6, groups)[:, None] + torch.linspace(0, 0.4, groups)[:, None]).flatten()
    equal = levels(3, 4)
    equal[4:8] = 0.7
    return [(levels(4, 5), 5), (equal, 4), (levels(1, 6), 6), (levels(3, 2), 2)]


def _rows(rewards: Tensor, group: int) -> Tensor:
    return rewards.view(-1, group)


def _centered(rewards: Tensor, group: int) -> Tensor:
    return _rows(rewards, group) - _rows(rewards, group).mean(1, keepdim=True)


def _spread(rewards: Tensor, group: int) -> Tensor:
    return _rows(rewards, group).std(1, correction=0, keepdim=True) + 1e-4


GROUP_ADVANTAGE = Exercise(
    group_advantage,
    advantage_cases,
    {
        "the mean goes over the whole batch: a sample is compared with samples of other requests": lambda r, g: (
            ((_rows(r, g) - r.mean()) / _spread(r, g)).flatten()
        ),
        "the standard deviation is that of the whole batch": lambda r, g: (_centered(r, g) / (r.std(correction=0) + 1e-4)).flatten(),
        "the mean is not subtracted": lambda r, g: (_rows(r, g) / _spread(r, g)).flatten(),
        "it is not divided by the group's standard deviation": lambda r, g: _centered(r, g).flatten(),
        "it is divided by the variance; take its root": lambda r, g: (_centered(r, g) / (_rows(r, g).var(1, correction=0, keepdim=True) + 1e-4)).flatten(),
        "the standard deviation divides by n - 1; the group is all there is: divide by n": lambda r, g: (
            _centered(r, g) / (_rows(r, g).std(1, keepdim=True) + 1e-4)
        ).flatten(),
        "the groups are taken across: rows 0, G, 2G ... are not of one request, neighbors are": lambda r, g: (
            ((r.view(g, -1) - r.view(g, -1).mean(0)) / (r.view(g, -1).std(0, correction=0) + 1e-4)).flatten()
        ),
        "the sign is flipped: a better sample must get the larger advantage": lambda r, g: (-_centered(r, g) / _spread(r, g)).flatten(),
        "one row per group is left; return one value per sample, (B,)": lambda r, g: _centered(r, g) / _spread(r, g),
    },
)


# the objective


def objective_cases() -> list[tuple[Tensor, Tensor, Tensor, float]]:
    """Advantages of both signs, each with a ratio below, within and above the band."""
    cases = []
    for clip, scale in ((0.2, 1.0), (0.05, 2.5)):
        off = torch.tensor([-3.0, -1.5, -0.4, 0.0, 0.4, 1.5, 3.0]) * clip
        old = torch.linspace(-2, 1, 14)
        now = old + off.repeat(2)
        advantage = scale * torch.cat((torch.linspace(0.5, 1.5, 7), -torch.linspace(1.5, 0.5, 7)))
        cases.append((now.requires_grad_(), old.requires_grad_(), advantage, clip))
    return cases


def values_and_slopes(loss: Tensor, arguments: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each sample, and its derivative by the new and the old log-probability."""
    if not loss.requires_grad:
        found = (None, None)
    else:
        found = torch.autograd.grad(loss.sum(), arguments[:2], allow_unused=True)
    return (loss.detach(), *(torch.zeros_like(a) if g is None else g for a, g in zip(arguments, found)))


def _ratio(now: Tensor, old: Tensor) -> Tensor:
    return (now - old.detach()).exp()


CLIPPED_OBJECTIVE = Exercise(
    clipped_objective,
    objective_cases,
    {
        "the smaller of the two losses is taken; a loss takes the larger (the paper maximizes, and takes the smaller gain)": lambda n, o, a, e: torch.minimum(
            -a * _ratio(n, o), -a * _ratio(n, o).clamp(1 - e, 1 + e)
        ),
        "the sign is flipped: this makes bad samples likelier": lambda n, o, a, e: torch.maximum(a * _ratio(n, o), a * _ratio(n, o).clamp(1 - e, 1 + e)),
        "nothing is clipped": lambda n, o, a, e: -a * _ratio(n, o),
        "only the clipped ratio counts: a step that went the wrong way gets no gradient back": lambda n, o, a, e: -a * _ratio(n, o).clamp(1 - e, 1 + e),
        "the ratio is upside down; it must be new over old": lambda n, o, a, e: torch.maximum(-a / _ratio(n, o), -a * (1 / _ratio(n, o)).clamp(1 - e, 1 + e)),
        "the ratio is a difference of logarithms; take exp": lambda n, o, a, e: torch.maximum(
            -a * (n - o.detach()), -a * (n - o.detach()).clamp(1 - e, 1 + e)
        ),
        "the ratio is cut off above alone; a bad sample may then be pushed away without end": lambda n, o, a, e: torch.maximum(
            -a * _ratio(n, o), -a * _ratio(n, o).clamp(max=1 + e)
        ),
        "the clip is on the loss; it belongs on the ratio": lambda n, o, a, e: torch.maximum(-a * _ratio(n, o), (-a * _ratio(n, o)).clamp(1 - e, 1 + e)),
        "the old probability is not detached: what the sampler did is a constant": lambda n, o, a, e: torch.maximum(
            -a * (n - o).exp(), -a * (n - o).exp().clamp(1 - e, 1 + e)
        ),
        "the ratio is detached: nothing is left to learn from": lambda n, o, a, e: torch.maximum(
            -a * _ratio(n, o), -a * _ratio(n, o).clamp(1 - e, 1 + e)
        ).detach(),
        "the mean over the samples is taken; return one value per sample": lambda n, o, a, e: torch.maximum(
            -a * _ratio(n, o), -a * _ratio(n, o).clamp(1 - e, 1 + e)
        ).mean(),
    },
    observe=values_and_slopes,
)
