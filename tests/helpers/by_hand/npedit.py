"""Notebook 05."""

import torch


def send_back(output, losses, weights):
    """By one scalar whose derivative is the sum of the gradients."""
    gradients, point = {}, output.detach()
    for name in losses:
        x = point.clone().requires_grad_()
        losses[name](x).backward()
        gradients[name] = x.grad * weights[name]
    (output * torch.stack(list(gradients.values())).sum(0)).sum().backward()
    return gradients


def fake_loss(fake, output, batch, t, eps):
    samples = output.detach()
    noisy = torch.stack([s + u * (e - s) for s, e, u in zip(samples, eps, t)])
    return torch.nn.functional.mse_loss(fake(noisy, t, batch.target_caption), eps - samples)


def nothing_loss(output, reference, nothing):
    """Row by row."""
    total = (output * 0).sum()
    for row, (x, y) in enumerate(zip(output, reference)):
        if nothing[row]:
            total = total + torch.nn.functional.mse_loss(x, y)
    return total / len(output)


ANSWERS = {"SEND_BACK": send_back, "FAKE_LOSS": fake_loss, "NOTHING_LOSS": nothing_loss}
