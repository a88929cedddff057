"""Notebook 03."""

import torch


def answer_loss(logits, answer, yes, no, gain):
    """The two-class cross-entropy over the pair (no, yes), as the released critic writes it."""
    pair = gain * torch.stack((logits[:, no], logits[:, yes]), 1)
    return torch.logsumexp(pair, 1) - pair.gather(1, answer.long()[:, None])[:, 0]


class Clamp(torch.autograd.Function):
    """Forward a clamp, backward as if there were none."""

    @staticmethod
    def forward(context, x):
        return x.minimum(torch.ones_like(x)).maximum(-torch.ones_like(x))

    @staticmethod
    def backward(context, gradient):
        return gradient


def see(pictures, side):
    shown = Clamp.apply(pictures)
    if shown.shape[-1] != side:
        shown = torch.nn.functional.interpolate(shown, (side, side), mode="bicubic", antialias=True, align_corners=False)
    return shown


def ascend(delta, gradient, length, radius):
    """Picture by picture."""
    rows = []
    for d, g in zip(delta, gradient):
        d = d + length * g / g.square().sum().sqrt()
        far = float(d.square().sum().sqrt())
        rows.append(d if far <= radius else d * radius / far)
    return torch.stack(rows)


ANSWERS = {"ANSWER_LOSS": answer_loss, "SEE": see, "ASCEND": ascend}
