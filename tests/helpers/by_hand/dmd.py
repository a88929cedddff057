"""Notebook 02."""

import torch


def dmd_gradient(x, x0_real, x0_fake, norm="sample"):
    """Sample by sample, from plain numbers."""
    rows = []
    for a, real, fake in zip(*(v.detach() for v in (x, x0_real, x0_fake))):
        weight = (a - real).abs()
        rows.append((fake - real) / (weight.mean() if norm == "sample" else weight.mean(0)))
    return torch.stack(rows)


def dmd_loss(x, gradient):
    """A scalar product with a constant has the same derivative and another value."""
    return (x * gradient.detach()).mean()


def fake_score_loss(fake, samples, text, t, eps):
    with torch.no_grad():
        noisy = torch.stack([s + u * (e - s) for s, e, u in zip(samples, eps, t)])
        target = eps - samples
    return torch.nn.functional.mse_loss(fake(noisy, t, text), target)


ANSWERS = {"DMD_GRADIENT": dmd_gradient, "DMD_LOSS": dmd_loss, "FAKE_SCORE_LOSS": fake_score_loss}
