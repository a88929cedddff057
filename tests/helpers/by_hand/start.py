"""Notebook 00."""

import numpy as np
import torch


def psnr(a, b, weight):
    """The same in numpy, picture by picture."""
    rows = []
    for x, y, w in zip(a.double().numpy(), b.double().numpy(), weight.numpy()):
        error = ((x - y) ** 2)[:, w[0] > 0]
        rows.append(10 * np.log10(4 / error.mean()))
    return torch.tensor(rows).float()


def recolored(before, after, edit):
    for thing in after.things:
        if thing.shape == edit.shape:
            return thing.color == edit.color
    return False


ANSWERS = {"PSNR": psnr, "RECOLORED": recolored}
