"""Notebook 04."""

import math

import torch


def two_call_slope(a, eps, fresh, t):
    """x0 = (1 - t a) ((1 - t) (1 - a) eps + t fresh), multiplied out and derived term by term."""
    of_eps = (1 - t) * (2 * t * a - 1 - t)
    return of_eps * eps - t * t * fresh


def rollout(velocity, noise, times, renoise, gradient_calls):
    """Two loops: first the calls without a graph, then those with one."""
    cut = 0 if gradient_calls is None else max(0, len(times) - gradient_calls)

    def call(x, t, first):
        if not first:
            eps = {"same": lambda: noise, "fresh": lambda: torch.randn_like(noise)}[renoise]()
            x = x + t * (eps - x)
        return x - t * velocity(x, torch.ones(len(x)) * t)

    x = noise
    for i in range(cut):
        with torch.no_grad():
            x = call(x, times[i], i == 0)
    for i in range(cut, len(times)):
        x = call(x, times[i], i == 0)
    return x


def norm_penalty(noise):
    rows = []
    for z in noise:
        squared = float(z.square().sum())
        rows.append(squared / 2 - (z.numel() - 1) * math.log(squared) / 2)
    return torch.tensor(rows)


ANSWERS = {"TWO_CALL_SLOPE": two_call_slope, "ROLLOUT": rollout, "NORM_PENALTY": norm_penalty}
