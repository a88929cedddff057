"""Notebook 01."""

import torch


def sample(velocity, x, times):
    """By the estimate of the clean end: x at s lies on the straight line from there to x at t."""
    times = list(times)
    while times:
        t = times.pop(0)
        s = times[0] if times else 0.0
        x0 = x - t * velocity(x, torch.full((x.shape[0],), float(t)))
        x = x0 + s / t * (x - x0)
    return x


def flow_matching_loss(velocity, x0, t, eps):
    """Sample by sample."""
    noisy = torch.stack([a + u * (e - a) for a, e, u in zip(x0, eps, t)])
    v = velocity(noisy, t)
    return torch.stack([((p - e + a) ** 2).mean() for p, a, e in zip(v, x0, eps)])


def guide(cond, uncond, w):
    return torch.lerp(uncond, cond, w)


ANSWERS = {"SAMPLE": sample, "FLOW_LOSS": flow_matching_loss, "GUIDE": guide}
