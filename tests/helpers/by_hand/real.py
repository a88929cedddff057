"""Notebook 08."""

import torch


def pack(x):
    """The four corners of each square, stacked as the last axis of the channels."""
    corners = torch.stack((x[:, :, ::2, ::2], x[:, :, ::2, 1::2], x[:, :, 1::2, ::2], x[:, :, 1::2, 1::2]), 2)
    return torch.stack([c.reshape(-1, c.shape[-2] * c.shape[-1]).T for c in corners])


def two_row_margin(states, lengths, weight, yes, no):
    """Row by row, through both logits."""
    ends = [row[int(n) - 1] for row, n in zip(states, lengths)]
    return torch.stack([torch.dot(end, weight[yes]) - torch.dot(end, weight[no]) for end in ends])


def standing(sizes, roles, weight, gradient, moments):
    """Role by role."""
    if roles == "modules":
        stored, learnt = [sizes.backbone] * 3, [sizes.backbone] * 2
    else:
        stored, learnt = [sizes.backbone, sizes.adapter, sizes.adapter], [sizes.adapter, sizes.adapter]
    return {
        "moments": sum(n * moments for n in learnt),
        "gradients": sum(n * gradient for n in learnt),
        "judge and encoders": sizes.judge * weight + sizes.rest * weight,
        "backbone weights": sum(n * weight for n in stored),
    }


ANSWERS = {"PACK": pack, "TWO_ROW_MARGIN": two_row_margin, "STANDING": standing}
