"""Flow-GRPO: teach a flow model from rewards alone, with no gradient through whoever gives them [arXiv:2505.05470].

A deterministic sampler has no probabilities to compare. So each of its steps, from time t to s < t, becomes a Gaussian policy
x_s ~ N(mean, std^2), by the stochastic equation that has the same marginals as the flow dx = v dt:

    dx = [v + sigma^2 / (2t) (x + (1 - t) v)] dt + sigma dw,    sigma = a sqrt(t / (1 - t))        (paper, "From ODE to SDE")

* `euler_policy`, the paper's, takes one Euler-Maruyama step of it. In few steps it leaves more noise in x_s than level s has.
* `exponential_policy` solves it exactly for a fixed clean estimate x0 = x - t v: the noise eps = x + (1 - t) v shrinks by kappa and
  is filled up, so x_s has noise s however long the step; in small steps both are the same. a = 0 is `flow.step_euler`,
  a = inf `flow.step_renoise`.

Of a group of samples of one request, each is told how it compares (`group_advantage`), and the probability of its steps is moved:

    A_i = (r_i - mean_g r) / (std_g r + 1e-4)                                                      (paper, "GRPO on Flow Matching")
    L   = mean_i,t max(-A_i rho, -A_i clip(rho, 1 - e, 1 + e)) + beta KL,      rho = exp(log p - log p_old)
    KL  = |mean - mean_ref|^2 / (2 std^2)                                      of two Gaussians of one std

Shapes: x, v, means, samples (B, C, H, W) or any trailing shape; t, s, std floats; rewards, advantages, log-probabilities (B,).
The samples of a group are neighbors: rows g * G to (g + 1) * G - 1.

Deviates from the paper, as its released code does: log-probabilities and KL are means over the elements of a sample, not sums (a sum
over thousands of pixels makes every ratio 0 or huge), and at t = 1, where sigma is infinite, 1 - s stands for 1 - t.
Deviates from both: the last step, to t = 0, is the flow's own and is not trained (its noise would stay in the picture).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmedit.flow import Velocity, step_euler, to_eps, to_x0

Policy = Callable[[Tensor, Tensor, float, float, float], tuple[Tensor, float]]  # (x, v, t, s, a) -> mean, std


def euler_policy(x: Tensor, v: Tensor, t: float, s: float, noise_level: float) -> tuple[Tensor, float]:
    """Mean and standard deviation of x at time s after one Euler-Maruyama step from x at time t."""
    sigma = noise_level * math.sqrt(t / (1 - t if t < 1 else 1 - s))
    drift = v + sigma**2 / (2 * t) * to_eps(x, v, t)  # Eq. SDE, where to_eps is x + (1 - t) v
    return x + drift * (s - t), sigma * math.sqrt(t - s)


def exponential_policy(x: Tensor, v: Tensor, t: float, s: float, noise_level: float) -> tuple[Tensor, float]:
    """The same for the exact solution with x0 = x - t v held fixed: eps decays by kappa = exp(-int_s^t sigma^2 / (2 u^2) du),
    which is (s / (1 - s) * (1 - t) / t)^(a^2 / 2)."""
    kappa = (s / (1 - s) * (1 - t) / t) ** (noise_level**2 / 2)  # Eq. SDE, solved exactly
    return (1 - s) * to_x0(x, v, t) + s * kappa * to_eps(x, v, t), s * math.sqrt(1 - kappa**2)


POLICIES: dict[str, Policy] = {"euler": euler_policy, "exponential": exponential_policy}


def log_probability(sample: Tensor, mean: Tensor, std: float) -> Tensor:
    """log N(sample; mean, std^2), the mean over the elements of each sample, (B,). The sample is a constant."""
    z = (sample.detach() - mean) / std
    return (-0.5 * z.square() - math.log(std) - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def policy_kl(mean: Tensor, reference_mean: Tensor, std: float) -> Tensor:
    """KL divergence of two Gaussians of the same `std`, the mean over the elements of each sample, (B,)."""
    return ((mean - reference_mean) / std).square().flatten(1).mean(1) / 2  # Eq. KL


def group_advantage(rewards: Tensor, group: int, clip: float = 5.0, spread: str = "group") -> Tensor:
    """How each sample's reward compares with those of its group, in standard deviations of the group (or, with `spread="batch"`,
    of all rewards), cut off at `clip`. Rewards (B,), groups of `group` neighbors -> (B,)."""
    if group < 2 or len(rewards) % group:
        raise ValueError(f"{len(rewards)} rewards in groups of {group}; a group needs at least 2 samples, and all of them whole")
    if spread not in ("group", "batch"):
        raise ValueError(f"unknown spread {spread!r}; known: group, batch")
    rows = rewards.detach().view(-1, group)
    std = rows.std(1, correction=0, keepdim=True) if spread == "group" else rewards.detach().std(correction=0)
    return ((rows - rows.mean(1, keepdim=True)) / (std + 1e-4)).clamp(-clip, clip).flatten()  # Eq. advantage


def clipped_objective(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """The loss to be minimised, per sample: max(-A rho, -A clip(rho, 1 - e, 1 + e)), (B,). No gain is to be had from moving the
    ratio further than `clip` in the direction that the advantage asks for."""
    ratio = (log_prob - old_log_prob.detach()).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))  # Eq. objective


@dataclass(frozen=True)
class Trajectory:
    """What a stochastic sampler did. Of T times there are T states and T - 1 random steps between them."""

    times: tuple[float, ...]
    states: tuple[Tensor, ...]  # x at each of `times`
    log_probs: tuple[Tensor, ...]  # (B,), of each random step
    output: Tensor  # x at time 0


@torch.no_grad()
def explore(velocity: Velocity, noise: Tensor, times: Sequence[float], noise_level: float, policy: Policy) -> Trajectory:
    """Sample from `noise` at times[0] by random steps; the last, from times[-1] to 0, is the flow's own."""
    x, states, log_probs = noise, [noise], []
    at = lambda t: torch.full((len(x),), t, device=x.device, dtype=x.dtype)
    for t, s in zip(times, times[1:]):
        mean, std = policy(x, velocity(x, at(t)), t, s, noise_level)
        x = mean + std * torch.randn_like(mean)
        states.append(x)
        log_probs.append(log_probability(x, mean, std))
    output = step_euler(x, velocity(x, at(times[-1])), times[-1], 0.0)
    return Trajectory(tuple(times), tuple(states), tuple(log_probs), output)


def policy_means(velocity: Velocity, trajectory: Trajectory, noise_level: float, policy: Policy) -> tuple[list[Tensor], list[float]]:
    """Means and standard deviations that another velocity (or the same, now with a graph) gives to the steps of a trajectory."""
    means, stds = [], []
    for x, t, s in zip(trajectory.states, trajectory.times, trajectory.times[1:]):
        at = torch.full((len(x),), t, device=x.device, dtype=x.dtype)
        mean, std = policy(x, velocity(x, at), t, s, noise_level)
        means.append(mean)
        stds.append(std)
    return means, stds
