"""adaLN with the gated residual before it: what happens between two branches of a diffusion transformer's block.

    y = x + gate * branch                 the residual that closes one branch
    h = LN(y) * (1 + scale) + shift       the modulation that opens the next            [DiT, arXiv:2212.09748, Sec. 3.2]

In torch these are two passes over x and two more over the norm's result, and autograd keeps the branch's product, the normalized
tokens and the modulated ones. Here one pass reads x and branch and writes y and h; kept are y, branch and two numbers per token.
The backward pass is one pass too: sums over tokens (of gate, scale and shift) are taken per program, in a fixed order, and added
by torch at the end. So it is deterministic. What nobody asks for, as a frozen modulation's gradients, is neither kept nor computed.

Shapes: x, branch, y, h (B, N, D) of one dtype; gate, scale, shift (B, D) of theirs, one per sample as in FLUX, Qwen-Image and the suite's DiT.
Computes in float32 (float64 for float64); y is rounded to its dtype before the norm, so that h belongs to the y that is returned.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from vlmedit.kernels.dispatch import (
    accumulator,
    launch,
    power_of_2,
    processors,
    rows_contiguous,
    same_device,
    same_kind,
    shaped,
    tl,
    triton,
    use_triton,
    wide,
)

WIDEST = 8192  # of D: one token lies in one program's registers
LIMIT = f"D must be at most {WIDEST}"
PER_PROCESSOR = 1  # programs of the backward pass where the modulation learns: each sums its gradient over its tokens


def gated_adaln_reference(x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(y, h) in plain torch, in the dtype of x; a wider modulation is rounded with its result."""
    y = x if branch is None else (x + gate.unsqueeze(1) * branch).to(x.dtype)
    h = F.layer_norm(y, y.shape[-1:], eps=eps) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    return y, h.to(x.dtype)


@triton.jit
def _forward(
    x, branch, gate, scale, shift, y, h, mean, rstd, tokens, width, eps,
    x_b, x_n, branch_b, branch_n, gate_b, scale_b, shift_b,
    GATED: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program per token."""
    n, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    row = b * tokens + n  # in y, h and the statistics, which are dense
    value = tl.load(x + b * x_b + n * x_n + at, mask=inside, other=0.0).to(ACC)
    if GATED:
        opened = tl.load(gate + b * gate_b + at, mask=inside, other=0.0).to(ACC)
        value += opened * tl.load(branch + b * branch_b + n * branch_n + at, mask=inside, other=0.0).to(ACC)
        rounded = value.to(y.dtype.element_ty)
        tl.store(y + row * width + at, rounded, mask=inside)
        value = rounded.to(ACC)
    m = tl.sum(value, 0) / width
    centered = tl.where(inside, value - m, 0.0)  # the padding must not count in the variance
    r = 1 / tl.sqrt(tl.sum(centered * centered, 0) / width + eps)
    scaled = centered * r * (1 + tl.load(scale + b * scale_b + at, mask=inside, other=0.0).to(ACC))
    moved = scaled + tl.load(shift + b * shift_b + at, mask=inside, other=0.0).to(ACC)
    tl.store(h + row * width + at, moved.to(h.dtype.element_ty), mask=inside)
    tl.store(mean + row, m)
    tl.store(rstd + row, r)


@triton.jit
def _backward(
    grad_y, grad_h, y, branch, gate, scale, mean, rstd, grad_x, grad_branch, parts, tokens, width, programs,
    grad_y_b, grad_y_n, grad_h_b, grad_h_n, y_b, y_n, branch_b, branch_n, gate_b, scale_b,
    GATED: tl.constexpr, X: tl.constexpr, BRANCH: tl.constexpr, GATE: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each program takes every `programs`-th token of one sample and sums over them those of the modulation's gradients that are wanted.
    All of a token is asked for before anything waits for a sum over it."""
    p, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    factor = 1 + tl.load(scale + b * scale_b + at, mask=inside, other=0.0).to(ACC)
    if BRANCH:
        opened = tl.load(gate + b * gate_b + at, mask=inside, other=0.0).to(ACC)
    to_gate = tl.zeros((BLOCK,), ACC)
    to_scale = tl.zeros((BLOCK,), ACC)
    to_shift = tl.zeros((BLOCK,), ACC)
    for n in range(p, tokens, programs):
        row = b * tokens + n
        gh = tl.load(grad_h + b * grad_h_b + n * grad_h_n + at, mask=inside, other=0.0)
        value = tl.load(y + b * y_b + n * y_n + at, mask=inside, other=0.0)
        if GATED:
            gy_in = tl.load(grad_y + b * grad_y_b + n * grad_y_n + at, mask=inside, other=0.0)
        if GATE:
            branched = tl.load(branch + b * branch_b + n * branch_n + at, mask=inside, other=0.0)
        r = tl.load(rstd + row)
        gh = gh.to(ACC)
        normed = tl.where(inside, (value.to(ACC) - tl.load(mean + row)) * r, 0.0)
        if SCALE:
            to_scale += gh * normed
        if SHIFT:
            to_shift += gh
        gn = gh * factor
        gy = r * (gn - tl.sum(gn, 0) / width - normed * (tl.sum(gn * normed, 0) / width))
        if GATED:
            gy += gy_in.to(ACC)
        if GATE:
            to_gate += gy * branched.to(ACC)
        if BRANCH:
            tl.store(grad_branch + row * width + at, (gy * opened).to(grad_branch.dtype.element_ty), mask=inside)
        if X:
            tl.store(grad_x + row * width + at, gy.to(grad_x.dtype.element_ty), mask=inside)
    out = (b * programs + p) * width + at
    if SCALE:
        tl.store(parts + out, to_scale, mask=inside)
        out += tl.num_programs(1).to(tl.int64) * programs * width
    if SHIFT:
        tl.store(parts + out, to_shift, mask=inside)
        out += tl.num_programs(1).to(tl.int64) * programs * width
    if GATE:
        tl.store(parts + out, to_gate, mask=inside)


def warps(block: int, back: bool = False) -> int:
    """Twice as many on the way back, whose sums over tokens stay in registers: 100 per thread instead of 176 for widths up to 4096."""
    return min(16, (4 if block <= 2048 else 8 if block <= 4096 else 16) * (2 if back else 1))


@torch.library.custom_op("vlmedit::gated_adaln", mutates_args=())
def _op(x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (empty without a branch), h, and mean and 1 / deviation of each token."""
    batch, tokens, width = x.shape
    h, mean, rstd = torch.empty_like(x, memory_format=torch.contiguous_format), *(x.new_empty(batch, tokens, dtype=wide(x)) for _ in range(2))
    y = torch.empty_like(h) if branch is not None else x.new_empty(0)
    if not x.numel():
        return y, h, mean, rstd
    if use_triton(x, width <= WIDEST, LIMIT):
        x, scale, shift = rows_contiguous(x), rows_contiguous(scale), rows_contiguous(shift)
        gated = branch is not None
        branch, gate = (rows_contiguous(branch), rows_contiguous(gate)) if gated else (x, scale)  # not read
        block = power_of_2(width)
        launch(
            _forward, (tokens, batch), x, x, branch, gate, scale, shift, y, h, mean, rstd, tokens, width, eps,
            *x.stride()[:2], *branch.stride()[:2], gate.stride(0), scale.stride(0), shift.stride(0),
            GATED=gated, BLOCK=block, ACC=accumulator(x), num_warps=warps(block),
        )  # fmt: skip
        return y, h, mean, rstd
    found, modulated = gated_adaln_reference(x, branch, gate, scale, shift, eps)
    value = found.to(wide(x))
    mean.copy_(value.mean(-1))
    rstd.copy_((value.var(-1, correction=0) + eps).rsqrt())
    return (y if branch is None else y.copy_(found)), h.copy_(modulated), mean, rstd


@_op.register_fake
def _(x, branch, gate, scale, shift, eps):
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    y = torch.empty_like(h) if branch is not None else x.new_empty(0)
    return y, h, *(x.new_empty(x.shape[0], x.shape[1], dtype=wide(x)) for _ in range(2))


@torch.library.custom_op("vlmedit::gated_adaln_backward", mutates_args=())
def _op_backward(
    grad_y: Tensor, grad_h: Tensor, y: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor, mean: Tensor, rstd: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and branch, and those of scale, shift and gate in one tensor (k, B, D) that holds the k wanted of them in this order.
    Empty where not wanted; `wanted` follows the operation: x, branch, gate, scale, shift. `branch` is read for the gate's alone."""
    batch, tokens, width = y.shape
    gated = gate is not None
    to_x, to_branch, to_gate, to_scale, to_shift = wanted
    learned = to_gate + to_scale + to_shift
    grad_x, grad_branch = (torch.empty_like(y, memory_format=torch.contiguous_format) if w else y.new_empty(0) for w in (to_x, to_branch))
    if y.numel() and use_triton(y, width <= WIDEST, LIMIT):
        programs, block = programs_of(y, learned), power_of_2(width)
        parts = y.new_empty(learned, batch, programs, width, dtype=wide(y)) if learned else mean  # not written
        grad_y, grad_h, y, scale = (rows_contiguous(t) for t in (grad_y if gated else grad_h, grad_h, y, scale))
        gate = rows_contiguous(gate) if gated else scale  # not read
        branch = rows_contiguous(branch) if to_gate else y  # not read
        flags = {"GATED": gated, "X": to_x, "BRANCH": to_branch, "GATE": to_gate, "SCALE": to_scale, "SHIFT": to_shift}
        launch(
            _backward, (programs, batch), y, grad_y, grad_h, y, branch, gate, scale, mean, rstd, grad_x, grad_branch, parts, tokens, width, programs,
            *grad_y.stride()[:2], *grad_h.stride()[:2], *y.stride()[:2], *branch.stride()[:2], gate.stride(0), scale.stride(0),
            **flags, BLOCK=block, ACC=accumulator(y), num_warps=warps(block, True),
        )  # fmt: skip
        return grad_x, grad_branch, parts.sum(2).to(scale.dtype) if learned else scale.new_empty(0, batch, width)
    normed = (y.to(mean.dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    gh, factor = grad_h.to(mean.dtype), 1 + scale.to(mean.dtype).unsqueeze(1)
    gn = gh * factor
    gy = rstd.unsqueeze(-1) * (gn - gn.mean(-1, keepdim=True) - normed * (gn * normed).mean(-1, keepdim=True))
    if gated:
        gy = gy + grad_y.to(mean.dtype)
    sums = [(gh * normed).sum(1)] * to_scale + [gh.sum(1)] * to_shift + ([(gy * branch.to(mean.dtype)).sum(1)] if to_gate else [])
    if to_x:
        grad_x.copy_(gy)
    if to_branch:
        grad_branch.copy_(gy * gate.to(mean.dtype).unsqueeze(1))
    return grad_x, grad_branch, torch.stack(sums).to(scale.dtype) if learned else scale.new_empty(0, batch, width)


@_op_backward.register_fake
def _(grad_y, grad_h, y, branch, gate, scale, mean, rstd, wanted):
    dense = lambda w: torch.empty_like(y, memory_format=torch.contiguous_format) if w else y.new_empty(0)
    return dense(wanted[0]), dense(wanted[1]), scale.new_empty(sum(wanted[2:]), *scale.shape)


def _setup(ctx, inputs, output):
    x, branch, gate, scale, shift, eps = inputs
    y, h, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.wanted = list(ctx.needs_input_grad[:5])
    ctx.save_for_backward(x if branch is None else y, branch if ctx.wanted[2] else None, gate, scale, mean, rstd)


def _gradients(ctx, grad_y, grad_h, grad_mean, grad_rstd):
    to_x, to_branch, to_gate, to_scale, to_shift = ctx.wanted
    grad_x, grad_branch, sums = _op_backward(grad_y, grad_h, *ctx.saved_tensors, ctx.wanted)
    rest = iter(sums.unbind(0))
    grad_scale, grad_shift, grad_gate = (next(rest) if w else None for w in (to_scale, to_shift, to_gate))
    return grad_x if to_x else None, grad_branch if to_branch else None, grad_gate, grad_scale, grad_shift, None


_op.register_autograd(_gradients, setup_context=_setup)


def programs_of(y: Tensor, learned: int) -> int:
    """Programs per sample on the way back: a few that sum over their tokens where something is learned, otherwise one per token."""
    return min(y.shape[1], max(1, PER_PROCESSOR * processors(y) // y.shape[0])) if learned else y.shape[1]


def per_token(operation: str, x: Tensor, branch: Tensor | None, **rows: Tensor | None) -> None:
    """Raises ValueError unless x and branch are (B, N, D) and `rows` (B, D)."""
    if x.ndim != 3:
        raise ValueError(f"{operation}: x has shape {tuple(x.shape)}; it must be (batch, tokens, width)")
    shaped(operation, "branch", branch, x.shape)
    for name, t in rows.items():
        shaped(operation, name, t, (x.shape[0], x.shape[2]))


def _check(operation: str, x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor) -> None:
    gated = operation == "gated_adaln"
    same_kind(operation, x=x, **({"branch": branch} if gated else {}))
    same_device(operation, x=x, scale=scale, shift=shift)
    same_kind(operation, scale=scale, shift=shift, **({"gate": gate} if gated else {}))
    per_token(operation, x, branch, gate=gate, scale=scale, shift=shift)


def gated_adaln(x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """y = x + gate * branch and h = LN(y) * (1 + scale) + shift, with gradients of all five. x and branch (B, N, D); gate, scale and
    shift (B, D). Raises TypeError or ValueError for mixed dtypes, devices or shapes."""
    _check("gated_adaln", x, branch, gate, scale, shift)
    y, h, _, _ = _op(x, branch, gate, scale, shift, eps)
    return y, h


def adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x) * (1 + scale) + shift: the modulation alone, as before a block's first branch. x (B, N, D); scale and shift (B, D). Raises as `gated_adaln`."""
    _check("adaln", x, None, None, scale, shift)
    return _op(x, None, None, scale, shift, eps)[1]
