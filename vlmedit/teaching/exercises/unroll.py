"""Notebook 04: the chain rule across two calls by hand, the unroll, and the norm's density that ReNO adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlmedit.equations.search import norm_penalty
from vlmedit.equations.unroll import rollout
from vlmedit.flow import Velocity, interpolate, to_x0
from vlmedit.teaching.checking import Exercise

# the chain rule by hand


def two_call_slope(a: float, eps: Tensor, fresh: Tensor, t: float) -> Tensor:
    """d x0 / d a of a two-call unroll of v(x, t) = a x, from noise `eps` (B,), re-noised with `fresh` (B,) to time t."""
    first = (1 - a) * eps  # x0 after the first call, at time 1
    x = (1 - t) * first + t * fresh
    through_last = -t * x  # the second call's own a: x0 = (1 - t a) x
    through_first = (1 - t * a) * (1 - t) * -eps  # d x0 / d x, times d x / d first, times d first / d a
    return through_first + through_last


def slope_cases() -> list[tuple[float, Tensor, Tensor, float]]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(n, generator=generator)
    return [(0.7, draw(5), draw(5), 0.3), (-0.4, draw(4), draw(4), 0.75), (1.6, draw(1), draw(1), 0.25)]


def _slope(first: Callable[..., Tensor], last: Callable[..., Tensor]) -> Callable:
    return lambda a, e, f, t: first(a, e, f, t) + last(a, e, f, t)


_last = lambda a, e, f, t: -t * ((1 - t) * (1 - a) * e + t * f)
_first = lambda a, e, f, t: -(1 - t * a) * (1 - t) * e
_none = lambda a, e, f, t: torch.zeros_like(e)

TWO_CALL_SLOPE = Exercise(
    two_call_slope,
    slope_cases,
    {
        "only the last call's own `a` is counted: that is the truncated gradient": _slope(_none, _last),
        "only the first call's `a` is counted; the second call has one of its own": _slope(_first, _none),
        "the sign is flipped: x0 falls when the velocity grows": lambda a, e, f, t: -two_call_slope(a, e, f, t),
        "the first call's part must still pass through the second call: the factor 1 - t a is missing": _slope(lambda a, e, f, t: -(1 - t) * e, _last),
        "the first call's part must pass the re-noising: the factor 1 - t is missing": _slope(lambda a, e, f, t: -(1 - t * a) * e, _last),
        "the second call sees the re-noised x, not the first call's x0": _slope(_first, lambda a, e, f, t: -t * (1 - a) * e),
        "the second call reaches back by t, not by 1: the factor t is missing": _slope(_first, lambda a, e, f, t: _last(a, e, f, t) / t),
        "the re-noising's weights are swapped: 1 - t belongs to the picture, t to the noise": _slope(
            lambda a, e, f, t: -(1 - t * a) * t * e, lambda a, e, f, t: -t * (t * (1 - a) * e + (1 - t) * f)
        ),
        "the re-noising uses the first noise again; it is given a fresh one": lambda a, e, f, t: two_call_slope(a, e, e, t),
        "that is x0 itself; its derivative by `a` is asked": lambda a, e, f, t: (1 - t * a) * ((1 - t) * (1 - a) * e + t * f),
    },
)


# the unroll


class Net:
    """A velocity of one weight that depends on place and time."""

    def __init__(self, weight: float):
        self.weight = torch.tensor(weight, requires_grad=True)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.weight * x + t.view(-1, *[1] * (x.ndim - 1))) + 0.3 * x.flip(-1)


NETS = Net(0.9), Net(-0.6)


def rollout_cases() -> list[tuple[Velocity, Tensor, tuple[float, ...], str, int | None]]:
    generator = torch.Generator().manual_seed(1)
    noise = lambda *shape: torch.randn(*shape, generator=generator).requires_grad_()
    return [
        (NETS[0], noise(5, 2), (1.0, 0.75, 0.5, 0.25), "fresh", None),
        (NETS[1], noise(3, 2), (1.0, 0.9, 0.4), "same", None),
        (NETS[0], noise(2, 3, 4, 4), (1.0, 0.8, 0.3), "fresh", 2),
        (NETS[1], noise(4, 2), (1.0, 0.7, 0.2), "same", 1),
        (NETS[0], noise(4, 2), (1.0,), "fresh", 3),
    ]


def value_and_slopes(out: Tensor, arguments: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """The picture, and what arrives at the weight and at the noise when a fixed weighted sum of it is derived."""
    inputs = (arguments[0].weight, arguments[1])
    if not out.requires_grad:
        return out, *(torch.zeros_like(v) for v in inputs)
    weights = torch.linspace(-1, 2, out.numel()).sin().view_as(out)
    found = torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)
    return out, *(torch.zeros_like(v) if g is None else g for v, g in zip(inputs, found))


def _unrolled(
    level: Callable[[Sequence[float], int], float] = lambda times, i: times[i],
    told: Callable[[Sequence[float], int], float] = lambda times, i: times[i],
    renoised: Callable[[Tensor, Tensor, float], Tensor] = interpolate,
    drawn: Callable[[str, Tensor], Tensor] = lambda renoise, noise: noise if renoise == "same" else torch.randn_like(noise),
    clean: Callable[[Tensor, Tensor, float], Tensor] = to_x0,
    carries: Callable[[int, int, int | None], bool] = lambda i, n, kept: kept is None or i >= n - kept,
) -> Callable:
    """An unroll of which one part can be done differently."""

    def unrolled(velocity: Velocity, noise: Tensor, times: Sequence[float], renoise: str, gradient_calls: int | None) -> Tensor:
        x = noise
        for i in range(len(times)):
            if i > 0:
                x = renoised(x, drawn(renoise, noise), level(times, i))
            with torch.set_grad_enabled(carries(i, len(times), gradient_calls)):
                x = clean(x, velocity(x, torch.full((len(x),), told(times, i))), times[i])
        return x

    return unrolled


def _detached_between(velocity: Velocity, noise: Tensor, times: Sequence[float], renoise: str, gradient_calls: int | None) -> Tensor:
    x = noise
    for i, t in enumerate(times):
        if i > 0:
            x = interpolate(x.detach(), noise if renoise == "same" else torch.randn_like(noise), t)
        with torch.set_grad_enabled(gradient_calls is None or i >= len(times) - gradient_calls):
            x = to_x0(x, velocity(x, torch.full((len(x),), t)), t)
    return x


ROLLOUT = Exercise(
    rollout,
    rollout_cases,
    {
        "the re-noising's weights are swapped: 1 - t belongs to the picture, t to the noise": _unrolled(renoised=lambda x, e, t: interpolate(e, x, t)),
        "nothing is re-noised: the next call is given a clean picture and told that it is not": _unrolled(renoised=lambda x, e, t: x),
        "the picture is re-noised to the time of the call before": _unrolled(level=lambda times, i: times[i - 1]),
        "the network is told the time of the call before": _unrolled(told=lambda times, i: times[max(i - 1, 0)]),
        "x0 = x - v holds at t = 1 alone; at t it is x - t v": _unrolled(clean=lambda x, v, t: x - v),
        "the first noise is used again everywhere; `renoise` may ask for a fresh one": _unrolled(drawn=lambda renoise, noise: noise),
        "fresh noise is drawn everywhere; `renoise` may ask for the same": _unrolled(drawn=lambda renoise, noise: torch.randn_like(noise)),
        "`gradient_calls` is ignored: every call carries a graph": _unrolled(carries=lambda i, n, kept: True),
        "the first calls carry the graph; it must be the last ones": _unrolled(carries=lambda i, n, kept: kept is None or i < kept),
        "one call too many carries a graph": _unrolled(carries=lambda i, n, kept: kept is None or i >= n - kept - 1),
        "the picture is detached between the calls: a detach too many, for only the last call learns then": _detached_between,
        "no call carries a graph": _unrolled(carries=lambda i, n, kept: False),
    },
    observe=value_and_slopes,
)


# the norm's density


def penalty_cases() -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator) * torch.linspace(0.4, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return [(draw(*shape),) for shape in ((4, 5), (3, 3, 2, 2), (1, 7))]


_length = lambda z: z.flatten(1).norm(dim=1)
_count = lambda z: z[0].numel()

NORM_PENALTY = Exercise(
    norm_penalty,
    penalty_cases,
    {
        "the sign is flipped: that is the log density, which one wants large": lambda z: -norm_penalty(z),
        "without the logarithm the typical noise is no minimum: everything is drawn to zero": lambda z: _length(z).square() / 2,
        "the dimension counts, not the dimension minus one": lambda z: _length(z).square() / 2 - _count(z) * _length(z).log(),
        "the dimension is that of one sample, not of the batch": lambda z: _length(z).square() / 2 - (z.numel() - 1) * _length(z).log(),
        "the dimension is all numbers of a sample, not its first axis": lambda z: _length(z).square() / 2 - (z.shape[1] - 1) * _length(z).log(),
        "the norm goes over the whole batch; each sample has one": lambda z: (z.norm().square() / 2 - (_count(z) - 1) * z.norm().log()).expand(len(z)),
        "the norm is not squared": lambda z: _length(z) / 2 - (_count(z) - 1) * _length(z).log(),
        "the half is missing: the minimum would lie at another norm": lambda z: _length(z).square() - (_count(z) - 1) * _length(z).log(),
        "the logarithm is of the squared norm, twice too much": lambda z: _length(z).square() / 2 - (_count(z) - 1) * _length(z).square().log(),
    },
)
