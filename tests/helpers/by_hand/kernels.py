"""Notebook 09."""

import torch


def gated_block(x, branch, gate, program, block, tokens, width):
    """Lane by lane, as one would do it on paper; what lies outside is never touched."""
    size = len(x)
    at = torch.arange(program * block, (program + 1) * block)
    values = torch.zeros(block)
    for lane, address in enumerate(at.tolist()):
        if address < size:
            row, column = divmod(address, width)
            one = torch.tensor([address])
            values[lane] = (x.load(one) + branch.load(one) * gate.load(torch.tensor([row // tokens * width + column]))).item()
    return at, values, at < size


def normed_row(x, program, block, width, stride, eps):
    """No padding at all: the row, torch's own norm, and a store of exactly `width` numbers."""
    row = x.load(program * stride + torch.arange(width))
    at = program * width + torch.arange(width)
    return at, torch.nn.functional.layer_norm(row, (width,), eps=eps), torch.ones(width, dtype=torch.bool)


def modulation_backward(grad, y, scale, eps):
    """Autograd."""
    y, scale = y.clone().requires_grad_(), scale.clone().requires_grad_()
    shift = torch.zeros_like(scale, requires_grad=True)
    with torch.enable_grad():
        h = torch.nn.functional.layer_norm(y, y.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]
    return torch.autograd.grad(h, (y, scale, shift), grad)


ANSWERS = {"GATED_BLOCK": gated_block, "NORMED_ROW": normed_row, "MODULATION_BACKWARD": modulation_backward}
