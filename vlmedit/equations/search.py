"""Search at test time under a frozen judge, no weight changed: over pixels, as an adversary does, and over a sampler's noise.

* Pixels: normalized L2 gradient steps within a ball around the start                                        [arXiv:1706.06083]
* Noise (ReNO): min over eps of L(G(eps)) + w (|eps|^2 / 2 - (d - 1) log |eps|), by Nesterov descent with a clipped gradient.
  The bracket is -log p(|eps|) of d normal numbers up to a constant, least at |eps|^2 = d - 1                [arXiv:2406.04312]
* Samples (FK steering): several particles of one request, resampled between a sampler's steps with weights
  exp(strength (r(x0 now) - r(x0 before))), r the reward of the clean estimates; the best at the end           [arXiv:2501.06848]
  One particle is plain sampling, one step or strength 0 is best-of-N.
`SEARCHES` has them as an editor's user calls them; a new one is a function and a line there.

`loss` maps pictures (B, 3, S, S) to one value per picture (B,); a picture's search does not depend on the batch it is in.
The first two searches are generators: a step is yielded before it is taken, the last after the last update.

Shapes: pictures, noise, delta, gradient (B, C, H, W); radius a float or (B,). Defaults of `optimise_noise`: the released
code's. Deviates from the paper: the gradient is clipped per picture (the paper optimizes one), and no best step is picked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmedit.flow import SAMPLERS, Velocity, noise_like, to_x0

Loss = Callable[[Tensor], Tensor]  # pictures (B, 3, S, S) -> (B,)


@dataclass(frozen=True)
class Step:
    """Where a search is, detached: `x` is what it moves (pixels' delta, or noise), `loss` (B,) without the penalty."""

    index: int
    x: Tensor
    pictures: Tensor
    loss: Tensor


def size(x: Tensor) -> Tensor:
    """L2 norm per sample, shaped to broadcast over it: (B, 1, 1, 1)."""
    return x.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, *[1] * (x.ndim - 1))


def ascend(delta: Tensor, gradient: Tensor, length: float, radius: float | Tensor) -> Tensor:
    """A step of `length` along the gradient, then back into the L2 ball of `radius`, each sample by itself."""
    delta = delta + length * gradient / size(gradient)  # Eq. ascent [arXiv:1706.06083]
    radius = torch.as_tensor(radius, dtype=delta.dtype, device=delta.device).view(-1, *[1] * (delta.ndim - 1))
    return delta * (radius / size(delta)).clamp(max=1)


def norm_penalty(noise: Tensor) -> Tensor:
    """Minus the log density of the noise's norm up to a constant, (B,): |eps|^2 / 2 - (d - 1) log |eps|."""
    norm, d = noise.flatten(1).norm(dim=1), noise[0].numel()
    return norm.square() / 2 - (d - 1) * norm.log()  # Eq. ReNO [arXiv:2406.04312]


def optimise_pixels(loss: Loss, start: Tensor, radius: float | Tensor, steps: int = 20, length: float = 0.4) -> Iterator[Step]:
    """Pictures in [-1, 1] within `radius` of `start` that lower `loss`: `steps` updates, `steps` + 1 records."""
    delta = torch.zeros_like(start)
    for index in range(steps + 1):
        delta.requires_grad_(True)
        values = loss(start + delta)
        (gradient,) = torch.autograd.grad(values.sum(), delta)
        delta = delta.detach()
        yield Step(index, delta, (start + delta).clamp(-1, 1), values.detach())
        delta = ascend(delta, -gradient, length, radius)


def optimise_noise(
    generate: Callable[[Tensor], Tensor], loss: Loss, noise: Tensor, steps: int = 50, lr: float = 5.0, momentum: float = 0.9, clip: float = 0.1, weight: float = 0.01
) -> Iterator[Step]:
    """Noise whose picture `generate(noise)` lowers `loss`: `steps` updates, `steps` + 1 records. `weight` is the norm penalty's."""
    noise = noise.detach().clone().requires_grad_(True)
    optimizer = torch.optim.SGD([noise], lr=lr, momentum=momentum, nesterov=True)
    for index in range(steps + 1):
        pictures = generate(noise)
        values = loss(pictures)
        yield Step(index, noise.detach().clone(), pictures.detach(), values.detach())
        if index < steps:
            (gradient,) = torch.autograd.grad((values + weight * norm_penalty(noise)).sum(), noise)
            noise.grad = gradient * (clip / size(gradient)).clamp(max=1)
            optimizer.step()


def resample(log_weights: Tensor, particles: int, generator: torch.Generator | None = None) -> Tensor:
    """Rows that survive: within each group of `particles` neighbors, drawn with replacement in proportion to exp(log_weights), (B,)."""
    odds = log_weights.detach().float().cpu().view(-1, particles).softmax(1)
    picked = torch.multinomial(odds, particles, replacement=True, generator=generator)
    return (picked + particles * torch.arange(len(odds))[:, None]).flatten().to(log_weights.device)


@torch.no_grad()
def steer(
    velocity: Velocity, reward: Loss, noise: Tensor, times: Sequence[float], particles: int, strength: float = 1.0, sampler: str = "renoise",
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """The best picture of each group of `particles` neighboring rows of `noise`, (B / particles, 3, S, S). `reward` maps clean pictures
    (B, 3, S, S) to (B,); `generator` draws the sampler's noise and the survivors. Raises ValueError for broken groups."""
    if particles < 1 or len(noise) % particles:
        raise ValueError(f"{len(noise)} rows of noise in groups of {particles} particles; all groups must be whole")
    x, before, stops = noise, 0.0, [*times, 0.0]
    for t, s in zip(stops, stops[1:]):
        v = velocity(x, torch.full((len(x),), t, device=x.device, dtype=x.dtype))
        if particles > 1 and strength and s > 0:
            now = reward(to_x0(x, v, t))
            rows = resample(strength * (now - before), particles, generator)  # Eq. weights [arXiv:2501.06848]
            x, v, before = x[rows], v[rows], now[rows]
        eps = noise_like(x.shape, generator, x.device, x.dtype) if sampler != "euler" else None
        x = SAMPLERS[sampler](x, v, t, s, eps)
    if particles == 1:
        return x
    best = reward(x).view(-1, particles).argmax(1)
    return x.unflatten(0, (-1, particles))[torch.arange(len(best), device=x.device), best]


# in use: an editor's requests, searched


@dataclass(frozen=True)
class Query:
    """What a search may do with a batch of B requests. `copies(k)` gives each request k times over, side by side: noise (k B, 3, S, S), the
    student's velocity there, and the log probability (k B,) of the judge's right answers about pictures."""

    copies: Callable[[int], tuple[Tensor, Velocity, Loss]]
    times: Sequence[float]
    sampler: str = "renoise"
    generator: torch.Generator | None = None


@torch.no_grad()
def best_samples(query: Query, particles: int, strength: float = 0.0) -> Tensor:
    """The judge's favorite of several samples of each request: best-of-N, or with `strength` FK steering."""
    noise, velocity, reward = query.copies(particles)
    return steer(velocity, reward, noise, query.times, particles, strength, query.sampler, query.generator)


def best_noise(query: Query, descents: int) -> Tensor:
    """One call's picture from the noise that pleases the judge most after so many steps of descent: ReNO."""
    if len(query.times) > 1:
        raise ValueError(f"search 'noise' with {len(query.times)} steps; the search is for the noise of one call: leave steps at 1")
    noise, velocity, reward = query.copies(1)
    (t,) = query.times
    generate = lambda eps: to_x0(eps, velocity(eps, eps.new_full((len(eps),), t)), t)
    with torch.enable_grad():
        *_, last = optimise_noise(generate, lambda pictures: -reward(pictures), noise, descents)
    return last.pictures


@dataclass(frozen=True)
class Search:
    """A way to search in use: `run(query, **settings)` gives pictures (B, 3, S, S); `calls(steps, **settings)` counts the student's per edit."""

    run: Callable[..., Tensor]
    calls: Callable[..., int]


SEARCHES = {
    "samples": Search(best_samples, lambda steps, particles, strength=0.0: steps * particles),
    "noise": Search(best_noise, lambda steps, descents: steps * (1 + descents)),
}
