"""Notebook 09: what one program of a kernel reads, computes and writes; and the backward pass of the modulation.

`Memory` plays a GPU's memory: what lies beyond a tensor is somebody else's, can be read without an error, and shows in the result. So the
exercises need neither a GPU nor Triton, and a wrong mask is a wrong answer, as in life: that of a store by what it writes, that of a load by
the addresses it reads, also where the numbers are thrown away (on a GPU such a load may end the program).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmedit.teaching.checking import Exercise

GUARD = 64  # addresses watched before and after a tensor


class Memory:
    """A tensor as a flat run of addresses, with strangers' numbers around it. `log` holds the addresses of every load."""

    def __init__(self, values: Tensor):
        self.values = values.detach().flatten()
        self.log: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.values)

    def __eq__(self, other) -> bool:  # the log is no part of what is stored
        return isinstance(other, Memory) and torch.equal(self.values, other.values)

    def __repr__(self) -> str:
        return f"Memory({self.values.tolist()})"

    def load(self, at: Tensor, inside: Tensor | None = None, other: float = 0.0) -> Tensor:
        """The numbers at the addresses, `other` where not `inside`; a stranger's number where an address is not ours."""
        inside = torch.ones_like(at, dtype=torch.bool) if inside is None else inside
        self.log.append(at[inside])
        ours = (at >= 0) & (at < len(self))
        stranger = 100 + (at * 37 % 101).to(self.values.dtype)
        found = torch.where(ours, self.values[at.clamp(0, len(self) - 1)], stranger)
        return torch.where(inside, found, torch.full_like(found, other))


def stored(result: tuple[Tensor, Tensor, Tensor], size: int) -> Tensor:
    """What memory holds after a program's store (addresses, values, inside): `size` addresses of ours with `GUARD` strangers' on each side.
    Nothing was there before."""
    at, values, inside = result
    inside = inside & (at >= -GUARD) & (at < size + GUARD)
    memory = torch.full((size + 2 * GUARD,), -7.0, dtype=values.dtype)
    memory[at[inside] + GUARD] = values[inside]
    return memory


def strays(arguments: tuple) -> str:
    """What was read beside the tensors among the arguments, in words."""
    for memory in (a for a in arguments if isinstance(a, Memory)):
        read = torch.cat(memory.log) if memory.log else torch.zeros(0)
        outside = sorted({int(at) for at in read[(read < 0) | (read >= len(memory))]})
        if outside:
            return f"a load reads address {', '.join(map(str, outside[:3]))}{', ...' if len(outside) > 3 else ''} of a tensor that ends at {len(memory) - 1}"
    return "every load stays within its tensor"


# one program of the gated residual

Store = tuple[Tensor, Tensor, Tensor]


def gated_block(x: Memory, branch: Memory, gate: Memory, program: int, block: int, tokens: int, width: int) -> Store:
    """Addresses, values and mask of what one program stores of y = x + gate * branch. x, branch and y are dense (B, tokens, width),
    gate is (B, width); the program takes `block` addresses."""
    at = program * block + torch.arange(block)
    inside = at < len(x)
    sample, column = at // (tokens * width), at % width
    value = x.load(at, inside) + gate.load(sample * width + column, inside) * branch.load(at, inside)
    return at, value, inside


def gated_cases() -> list[tuple]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: Memory(torch.randn(*shape, generator=generator))
    cases = []
    # (batch, tokens, width), block, program: the last program is cut, by an odd and an even number; in the third a block is larger than all there is
    for (b, n, d), block, program in (((2, 3, 5), 8, 1), ((2, 3, 5), 8, 3), ((1, 2, 3), 16, 0), ((3, 2, 7), 16, 2), ((2, 4, 3), 8, 0), ((5, 1, 7), 8, 4)):
        cases.append((draw(b, n, d), draw(b, n, d), draw(b, d), program, block, n, d))
    return cases


def _gated(at=None, inside=None, gate_at=None, last=None, first=None):
    """The gated residual with one part replaced; parts see (program, block, tokens, width, size) or (address, ...)."""

    def wrong(x, branch, gate, program, block, tokens, width):
        where = at(program, block) if at else program * block + torch.arange(block)
        mask = inside(where, block, len(x)) if inside else where < len(x)
        of_gate = gate_at(where, tokens, width) if gate_at else where // (tokens * width) * width + where % width
        read = first(mask) if first else mask
        value = x.load(where, read) + gate.load(of_gate, read) * branch.load(where, read)
        return where, value, last(mask) if last else mask

    return wrong


GATED_BLOCK = Exercise(
    gated_block,
    gated_cases,
    {
        "the mask lets one address too many through: addresses start at 0, so the last of ours is size - 1": _gated(inside=lambda at, block, size: at <= size),
        "the mask cuts the last address off: addresses start at 0, so size - 1 is ours": _gated(inside=lambda at, block, size: at < size - 1),
        "there is no mask: the last program writes into somebody else's memory": _gated(inside=lambda at, block, size: torch.ones(block, dtype=torch.bool)),
        "the mask compares lanes, not addresses, with the size": _gated(inside=lambda at, block, size: torch.arange(block) < size),
        "the loads are masked and the store is not": _gated(last=torch.ones_like),
        "the store is masked and the loads are not": _gated(first=torch.ones_like),
        "`program` is ignored: every program does the first block": _gated(at=lambda program, block: torch.arange(block)),
        "program and lane are added without the block between them": _gated(at=lambda program, block: program + torch.arange(block)),
        "all samples get the gate of the first": _gated(gate_at=lambda at, tokens, width: at % width),
        "the gate's row is counted in tokens; it has one row per sample": _gated(gate_at=lambda at, tokens, width: at),
        "the gate's address counts `tokens` as its width": _gated(gate_at=lambda at, tokens, width: at // (tokens * width) * tokens + at % width),
    },
    observe=lambda result, arguments: (stored(result, len(arguments[0])), strays(arguments)),
)


# one program of the norm, on strided rows


def normed_row(x: Memory, program: int, block: int, width: int, stride: int, eps: float) -> Store:
    """Addresses, values and mask of what one program stores of a layer norm. Row `program` of x starts at program * stride and holds
    `width` numbers; the result is dense. `block` is a power of two, at least `width`."""
    lane = torch.arange(block)
    inside = lane < width
    value = x.load(program * stride + lane, inside)
    mean = value.sum() / width
    centered = torch.where(inside, value - mean, torch.zeros_like(value))
    deviation = (centered.square().sum() / width + eps).sqrt()
    return program * width + lane, centered / deviation, inside


def normed_cases() -> list[tuple]:
    generator = torch.Generator().manual_seed(1)
    cases = []
    for rows, width, stride, block, program in ((4, 5, 7, 8, 2), (3, 9, 9, 16, 2), (2, 1 + 2, 11, 4, 1), (3, 8, 13, 8, 1), (2, 5, 6, 16, 0)):
        # a mean away from 0, or its absence would hardly show; eps large enough to be seen where it stands
        cases.append((Memory(2 + torch.randn(rows * stride, generator=generator)), program, block, width, stride, 0.03))
    return cases


def _normed(start=None, to=None, mean=None, variance=None, deviation=None, inside=None):
    def wrong(x, program, block, width, stride, eps):
        lane = torch.arange(block)
        mask = inside(lane, width) if inside else lane < width
        value = x.load((start(program, width, stride) if start else program * stride) + lane, mask)
        m = mean(value, width) if mean else value.sum() / width
        centered = value - m
        v = variance(centered, lane < width, width) if variance else torch.where(lane < width, centered, 0 * centered).square().sum() / width
        d = deviation(v, eps) if deviation else (v + eps).sqrt()
        return (to(program, width, stride) if to else program * width) + lane, centered / d, mask

    return wrong


NORMED_ROW = Exercise(
    normed_row,
    normed_cases,
    {
        "the rows are read as if they were dense: one row starts `stride` after the other, not `width`": _normed(start=lambda p, width, stride: p * width),
        "the result is written with the input's stride; it is dense": _normed(to=lambda p, width, stride: p * stride),
        "input and result have their strides swapped": _normed(start=lambda p, width, stride: p * width, to=lambda p, width, stride: p * stride),
        "the mean is over the block; divide by the width": _normed(mean=lambda value, width: value.mean()),
        "the padding counts in the variance: outside the row, 0 - mean is not 0": _normed(variance=lambda c, inside, width: c.square().sum() / width),
        "the variance is over the block; divide by the width": _normed(variance=lambda c, inside, width: torch.where(inside, c, 0 * c).square().mean()),
        "the variance is divided by width - 1; a layer norm divides by the width": _normed(
            variance=lambda c, inside, width: torch.where(inside, c, 0 * c).square().sum() / (width - 1)
        ),
        "eps is added to the deviation; it belongs under the root": _normed(deviation=lambda v, eps: v.sqrt() + eps),
        "the mask lets one address too many through": _normed(inside=lambda lane, width: lane <= width),
        "the mean is not subtracted: that is an RMS-norm": _normed(mean=lambda value, width: 0.0),
    },
    observe=lambda result, arguments: (stored(result, len(arguments[0]) // arguments[4] * arguments[3]), strays(arguments)),
)


# the backward pass


def modulation_backward(grad: Tensor, y: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y (B, N, D), scale and shift (B, D), given that of h = LN(y) * (1 + scale) + shift."""
    rstd = (y.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    normed = (y - y.mean(-1, keepdim=True)) * rstd
    of_normed = grad * (1 + scale.unsqueeze(1))
    along = (of_normed * normed).mean(-1, keepdim=True)
    of_y = rstd * (of_normed - of_normed.mean(-1, keepdim=True) - normed * along)
    return of_y, (grad * normed).sum(1), grad.sum(1)


def backward_cases() -> list[tuple]:
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    return [(draw(b, n, d) + 0.5, 2 * draw(b, n, d) + 1, draw(b, d), 0.05) for b, n, d in ((2, 3, 5), (1, 4, 3), (3, 1, 6))]


def _backward(factor=None, mean=True, along=True, rstd=True, to_scale=None, to_shift=None):
    def wrong(grad, y, scale, eps):
        r = (y.var(-1, correction=0, keepdim=True) + eps).rsqrt()
        normed = (y - y.mean(-1, keepdim=True)) * r
        of_normed = grad * (factor(scale.unsqueeze(1)) if factor else 1 + scale.unsqueeze(1))
        of_y = of_normed - mean * of_normed.mean(-1, keepdim=True) - along * normed * (of_normed * normed).mean(-1, keepdim=True)
        of_scale = to_scale(grad, normed, y) if to_scale else (grad * normed).sum(1)
        return of_y * (r if rstd else 1), of_scale, to_shift(grad, scale) if to_shift else grad.sum(1)

    return wrong


MODULATION_BACKWARD = Exercise(
    modulation_backward,
    backward_cases,
    {
        "the norm is taken for a division by a constant: both of its corrections are missing": _backward(mean=False, along=False),
        "the mean of the gradient is not subtracted: moving a token as a whole changes nothing": _backward(mean=False),
        "the part along the token is not removed: stretching a token changes nothing": _backward(along=False),
        "the gradient meets `scale`; the forward pass multiplied by 1 + scale": _backward(factor=lambda s: s),
        "the modulation is forgotten: y's gradient passes 1 + scale": _backward(factor=torch.ones_like),
        "y's gradient is not divided by the deviation": _backward(rstd=False),
        "scale's gradient meets the token itself; it was multiplied with the normed one": _backward(to_scale=lambda g, normed, y: (g * y).sum(1)),
        "scale's gradient is a mean over tokens; each token adds to it": _backward(to_scale=lambda g, normed, y: (g * normed).mean(1)),
        "scale's gradient is summed over the batch as well; each sample has its own scale": _backward(
            to_scale=lambda g, normed, y: (g * normed).sum((0, 1)).expand(len(g), -1)
        ),
        "shift's gradient is multiplied by 1 + scale; shift was added after it": _backward(to_shift=lambda g, s: (g * (1 + s.unsqueeze(1))).sum(1)),
    },
)
