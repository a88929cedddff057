"""Notebook 02: the gradient of distribution matching, the loss that carries it, and the fake score's own loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlmedit.equations.dmd import dmd_gradient, dmd_loss, fake_score_loss
from vlmedit.flow import interpolate
from vlmedit.teaching.checking import Exercise

# the gradient


def gradient_cases() -> list[tuple[Tensor, Tensor, Tensor, str]]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    cases = []
    for shape, norm in (((4, 2), "sample"), ((3, 3, 4, 4), "sample"), ((3, 3, 4, 4), "pixel"), ((1, 3, 2, 2), "sample")):
        # every sample at another distance from the teacher: a batch of one, or of equals, would not tell a batch-wide normalizer
        distance = torch.arange(1.0, shape[0] + 1).view(-1, *[1] * (len(shape) - 1))
        x, real, fake = draw(*shape), draw(*shape) * distance, draw(*shape)
        cases.append((x.requires_grad_(), real, fake.requires_grad_(), norm))
    return cases


def _normed(x: Tensor, real: Tensor, norm: str) -> Tensor:
    return (x - real).abs().mean(tuple(range(1, x.ndim)) if norm == "sample" else (1,), keepdim=True)


def _wrong(scale: Callable[[Tensor, Tensor, Tensor, str], Tensor]) -> Callable:
    """The gradient over another normalizer."""
    return lambda x, real, fake, norm: ((fake - real) / scale(x, real, fake, norm)).detach()


_samples = lambda x: tuple(range(1, x.ndim))

DMD_GRADIENT = Exercise(
    dmd_gradient,
    gradient_cases,
    {
        "the sign is flipped: a step against the gradient must lead from the student to the teacher": lambda x, real, fake, norm: (
            (real - fake) / _normed(x, real, norm)
        ).detach(),
        "the normalizer is one for the whole batch; each sample needs its own": _wrong(lambda x, real, fake, norm: (x - real).abs().mean()),
        "a graph is left; the gradient is a constant": lambda x, real, fake, norm: (fake - real) / _normed(x, real, norm),
        "the normalizer measures the distance to the fake's opinion; it must be the teacher's": _wrong(lambda x, real, fake, norm: _normed(x, fake, norm)),
        "the normalizer measures the two opinions' distance; it must be that of the picture to the teacher's": _wrong(
            lambda x, real, fake, norm: _normed(fake, real, norm)
        ),
        "the normalizer is a sum; it must be a mean": _wrong(lambda x, real, fake, norm: (x - real).abs().sum(_samples(x) if norm == "sample" else (1,), True)),
        "the normalizer is a mean of signed differences; take their absolute values": _wrong(
            lambda x, real, fake, norm: (x - real).mean(_samples(x) if norm == "sample" else (1,), True)
        ),
        "`norm` is ignored: for 'pixel' the mean goes over the channels alone": _wrong(lambda x, real, fake, norm: _normed(x, real, "sample")),
        "`norm` is ignored: for 'sample' the mean goes over all axes but the first": _wrong(lambda x, real, fake, norm: _normed(x, real, "pixel")),
        "there is no normalizer": _wrong(lambda x, real, fake, norm: torch.ones(())),
    },
)


# the surrogate


def surrogate_cases() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator).requires_grad_()
    return [(draw(*shape), draw(*shape)) for shape in ((4, 2), (3, 3, 4, 4), (1, 2))]


def slopes(loss: Tensor, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The derivative of a loss by each argument, zeros where none arrives."""
    if not loss.requires_grad:
        return tuple(torch.zeros_like(a) for a in arguments)
    found = torch.autograd.grad(loss, arguments, allow_unused=True)
    return tuple(torch.zeros_like(a) if g is None else g for a, g in zip(arguments, found))


DMD_LOSS = Exercise(
    dmd_loss,
    surrogate_cases,
    {
        "nothing is detached: the value is right, but x cancels and the student learns nothing": lambda x, g: 0.5 * (x - (x - g)).square().mean(),
        "x is detached on both sides: nothing reaches the student": lambda x, g: 0.5 * (x.detach() - (x - g).detach()).square().mean(),
        "the wrong side is detached, which flips the sign": lambda x, g: 0.5 * (x.detach() - (x - g)).square().mean(),
        "the target is x + gradient: one walks downhill, against the gradient": lambda x, g: 0.5 * (x - (x + g).detach()).square().mean(),
        "the target is the gradient itself; it must be x - gradient": lambda x, g: 0.5 * (x - g.detach()).square().mean(),
        "the squares are summed; take their mean": lambda x, g: 0.5 * (x - (x - g).detach()).square().sum(),
        "the half is missing: the derivative of a square is twice its root": lambda x, g: (x - (x - g).detach()).square().mean(),
        "the difference is not squared: only the gradient's sign is left": lambda x, g: (x - (x - g).detach()).abs().mean(),
        "the gradient is not detached: the loss flows into both scores": lambda x, g: (x * g).mean(),
    },
    observe=slopes,
)


# the fake score


def denoiser(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """A velocity that depends on place, time and text."""
    wide = (-1, *[1] * (x.ndim - 1))
    return torch.sin(2 * x) + t.view(wide).square() + 0.2 * text.float().mean(1).view(wide)


def other_denoiser(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    wide = (-1, *[1] * (x.ndim - 1))
    return x.flip(-1) * torch.cos(3 * t.view(wide)) - 0.1 * text.float().sum(1).view(wide)


def fake_cases() -> list[tuple[Callable, Tensor, Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    cases = []
    for fake, shape in ((denoiser, (5, 2)), (other_denoiser, (3, 3, 4, 4)), (denoiser, (2, 2))):
        text = torch.randint(1, 9, (shape[0], 3), generator=generator)
        t = torch.rand(shape[0], generator=generator) * 0.4 + 0.05  # never 0.5, where both directions of time agree
        cases.append((fake, draw(*shape).requires_grad_(), text, t, draw(*shape)))
    return cases


def _off(fake: Callable, samples: Tensor, text: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The velocity error, nothing detached."""
    return fake(interpolate(samples, eps, t), t, text) - (eps - samples)


FAKE_SCORE_LOSS = Exercise(
    fake_score_loss,
    fake_cases,
    {
        "the samples are not detached: the student learns to be easy for its own critic": lambda f, x, text, t, eps: _off(f, x, text, t, eps).square().mean(),
        "time runs the wrong way: t = 0 is data": lambda f, x, text, t, eps: (f(interpolate(eps, x, t), t, text) - (eps - x)).square().mean().detach(),
        "the target has the wrong sign: the velocity points from data to noise": lambda f, x, text, t, eps: (
            (f(interpolate(x, eps, t), t, text) - (x - eps)).square().mean().detach()
        ),
        "the fake sees clean samples; it must see them at level t": lambda f, x, text, t, eps: (f(x, t, text) - (eps - x)).square().mean().detach(),
        "the fake is told 1 - t": lambda f, x, text, t, eps: (f(interpolate(x, eps, t), 1 - t, text) - (eps - x)).square().mean().detach(),
        "the text is left out; the fake's opinion must be about the same caption as the teacher's": lambda f, x, text, t, eps: (
            _off(f, x, torch.zeros_like(text), t, eps).square().mean().detach()
        ),
        "the target is the sample; it must be the velocity": lambda f, x, text, t, eps: (f(interpolate(x, eps, t), t, text) - x).square().mean().detach(),
        "the squares are summed; take their mean": lambda f, x, text, t, eps: _off(f, x, text, t, eps).square().sum().detach(),
        "one value per sample is left; take the mean over the batch as well": lambda f, x, text, t, eps: (
            _off(f, x, text, t, eps).square().flatten(1).mean(1).detach()
        ),
    },
)
