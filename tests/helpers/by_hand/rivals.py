"""Notebook 07."""

import torch


def euler_policy(x, v, t, s, noise_level):
    """By the two estimates: dx is split into what happens to the clean picture and to the noise."""
    x0, eps = x - t * v, x + (1 - t) * v
    variance = noise_level**2 * t / ((1 - t) if t < 1 else (1 - s)) * (t - s)
    return (1 - s) * x0 + (s - variance / (2 * t)) * eps, variance**0.5


def group_advantage(rewards, group):
    """Group by group, from plain numbers."""
    out = []
    for first in range(0, len(rewards), group):
        mine = rewards[first : first + group].tolist()
        mean = sum(mine) / group
        std = (sum((r - mean) ** 2 for r in mine) / group) ** 0.5
        out += [(r - mean) / (std + 1e-4) for r in mine]
    return torch.tensor(out)


def clipped_objective(log_prob, old_log_prob, advantage, clip):
    """By cases: a gain stops at the edge of the band on the advantage's own side, and nowhere else."""
    ratio = torch.exp(log_prob - old_log_prob.detach())
    edge = 1 + clip * advantage.sign()
    beyond = (ratio - edge) * advantage.sign() > 0
    return -advantage * torch.where(beyond, edge, ratio)


ANSWERS = {"RANDOM_STEP": euler_policy, "GROUP_ADVANTAGE": group_advantage, "CLIPPED_OBJECTIVE": clipped_objective}
