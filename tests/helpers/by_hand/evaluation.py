"""Notebook 06."""

import math

import torch
from scipy.stats import binomtest, norm


def hacking_gap(p, done, kept):
    """Edit by edit."""
    rows = []
    for edit, identity, d, k in zip(*p.tolist(), done.tolist(), kept.tolist()):
        rows.append((edit + identity) / 2 - (1.0 if d and k else 0.0))
    return torch.tensor(rows)


def wilson_interval(successes, n, z=1.96):
    level = 2 * norm.cdf(z) - 1
    found = binomtest(successes, n).proportion_ci(level, method="wilson")
    return found.low, found.high


def calibration_error(p, truth, bins=10):
    """Bin by bin, with edges."""
    edges, error = torch.linspace(0, 1, bins + 1).tolist(), 0.0
    for k, (low, high) in enumerate(zip(edges, edges[1:])):
        here = (p >= low) & ((p <= high) if k == bins - 1 else (p < high))
        if here.any():
            error += here.float().mean().item() * abs(p[here].mean().item() - truth[here].mean().item())
    return error


def viescore(consistency, quality):
    return torch.tensor([math.sqrt(min(c) * min(q)) for c, q in zip(consistency.tolist(), quality.tolist())])


ANSWERS = {"HACKING_GAP": hacking_gap, "WILSON_INTERVAL": wilson_interval, "CALIBRATION_ERROR": calibration_error, "VIESCORE": viescore}
