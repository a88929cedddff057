"""The gated residual with RMS-norms on both sides of it, as Z-Image's blocks have it, and the plain residual with the next norm of a language model.

    y = x + gate * RMS(branch)           (normed=True)   or   x + gate * branch
    h = RMS(y) * factor                  RMS(v) = v / sqrt(mean(v^2) + eps) per token      [RMSNorm, arXiv:1910.07467, Eq. 4]

Weights of a norm, modulation and tanh act per sample and channel, not per token, so they are multiplied in torch before: for Z-Image gate is
tanh(g) times the branch norm's weight and factor the next norm's weight times 1 + scale; for a Qwen or InternVL judge there is no gate and factor is the
weight alone. `python -m vlmedit.kernels.traffic` counts these norms as the largest part of what Z-Image and its judge move between matrix products.

In torch each norm is five passes, two of them in float32, and the residual two. Here one pass reads x and branch and writes y and h; kept are y,
branch where its norm or the gate's gradient needs it, and a number or two per token. The backward pass is one pass too; sums over tokens are taken
per program in a fixed order, then by torch: deterministic. What nobody asks for is neither kept nor computed.

Shapes: x, branch, y, h (B, N, D) of one dtype; gate (or None for 1) and factor (B, D) of theirs.
Computes in float32 (float64 for float64); y is rounded to its dtype before its norm, so that h belongs to the y that is returned.
"""

import torch
from torch import Tensor
from vlmedit.kernels.dispatch import (
    accumulator,
    launch,
    power_of_2,
    rows_contiguous,
    same_device,
    same_kind,
    tl,
    triton,
    use_triton,
    wide,
)
from vlmedit.kernels.modulation import LIMIT, WIDEST, per_token, programs_of, warps


def rms(v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed tokens, and 1 / root mean square of each."""
    r = (v.square().mean(-1, keepdim=True) + eps).rsqrt()
    return v * r, r


def gated_rms_reference(x: Tensor, branch: Tensor, gate: Tensor | None, factor: Tensor, eps: float = 1e-5, normed: bool = True) -> tuple[Tensor, Tensor]:
    """(y, h) in plain torch, in the widened dtype; both are rounded once."""
    u = branch.to(wide(x))
    if normed:
        u, _ = rms(u, eps)
    if gate is not None:
        u = u * gate.to(u.dtype).unsqueeze(1)
    y = (x.to(u.dtype) + u).to(x.dtype)
    h, _ = rms(y.to(u.dtype), eps)
    return y, (h * factor.to(u.dtype).unsqueeze(1)).to(x.dtype)


@triton.jit
def _forward(
    x, branch, gate, factor, y, h, of_branch, of_y, tokens, width, eps, x_b, x_n, branch_b, branch_n, gate_b, factor_b,
    GATED: tl.constexpr, NORMED: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program per token."""
    n, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    row = b * tokens + n  # in y, h and the statistics, which are dense
    u = tl.load(branch + b * branch_b + n * branch_n + at, mask=inside, other=0.0).to(ACC)
    value = tl.load(x + b * x_b + n * x_n + at, mask=inside, other=0.0).to(ACC)
    if NORMED:
        r = 1 / tl.sqrt(tl.sum(u * u, 0) / width + eps)
        tl.store(of_branch + row, r)
        u *= r
    if GATED:
        u *= tl.load(gate + b * gate_b + at, mask=inside, other=0.0).to(ACC)
    rounded = (value + u).to(y.dtype.element_ty)
    tl.store(y + row * width + at, rounded, mask=inside)
    value = rounded.to(ACC)
    r = 1 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    tl.store(of_y + row, r)
    moved = value * r * tl.load(factor + b * factor_b + at, mask=inside, other=0.0).to(ACC)
    tl.store(h + row * width + at, moved.to(h.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_y, grad_h, y, branch, gate, factor, of_branch, of_y, grad_x, grad_branch, parts, tokens, width, programs,
    grad_y_b, grad_y_n, grad_h_b, grad_h_n, y_b, y_n, branch_b, branch_n, gate_b, factor_b,
    GATED: tl.constexpr, NORMED: tl.constexpr, X: tl.constexpr, BRANCH: tl.constexpr, GATE: tl.constexpr, FACTOR: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each program takes every `programs`-th token of one sample and sums over them those of gate's and factor's gradients that are wanted.
    All of a token is asked for before anything waits for a sum over it."""
    p, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    scaled = tl.load(factor + b * factor_b + at, mask=inside, other=0.0).to(ACC)
    if GATED:
        opened = tl.load(gate + b * gate_b + at, mask=inside, other=0.0).to(ACC)
    to_gate = tl.zeros((BLOCK,), ACC)
    to_factor = tl.zeros((BLOCK,), ACC)
    for n in range(p, tokens, programs):
        row = b * tokens + n
        gh = tl.load(grad_h + b * grad_h_b + n * grad_h_n + at, mask=inside, other=0.0)
        gy = tl.load(grad_y + b * grad_y_b + n * grad_y_n + at, mask=inside, other=0.0)
        normed = tl.load(y + b * y_b + n * y_n + at, mask=inside, other=0.0)
        if GATE or (NORMED and BRANCH):
            u = tl.load(branch + b * branch_b + n * branch_n + at, mask=inside, other=0.0).to(ACC)
            if NORMED:
                s = tl.load(of_branch + row)
                u *= s
        r = tl.load(of_y + row)
        normed = normed.to(ACC) * r
        gh = gh.to(ACC)
        if FACTOR:
            to_factor += gh * normed
        gn = gh * scaled
        g = gy.to(ACC) + r * (gn - normed * (tl.sum(gn * normed, 0) / width))  # what arrives at y, and so at x
        if X:
            tl.store(grad_x + row * width + at, g.to(grad_x.dtype.element_ty), mask=inside)
        if GATE:
            to_gate += g * u
        if BRANCH:
            if GATED:
                g *= opened
            if NORMED:
                g = s * (g - u * (tl.sum(g * u, 0) / width))
            tl.store(grad_branch + row * width + at, g.to(grad_branch.dtype.element_ty), mask=inside)
    out = (b * programs + p) * width + at
    if GATE:
        tl.store(parts + out, to_gate, mask=inside)
        out += tl.num_programs(1).to(tl.int64) * programs * width
    if FACTOR:
        tl.store(parts + out, to_factor, mask=inside)


@torch.library.custom_op("vlmedit::gated_rms", mutates_args=())
def _op(x: Tensor, branch: Tensor, gate: Tensor | None, factor: Tensor, eps: float, normed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h, and 1 / root mean square of each token of branch (empty where it is not normed) and of y."""
    batch, tokens, width = x.shape
    y, h = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    of_branch, of_y = (x.new_empty((batch, tokens) if kept else 0, dtype=wide(x)) for kept in (normed, True))
    if not x.numel():
        return y, h, of_branch, of_y
    if use_triton(x, width <= WIDEST, LIMIT):
        x, branch, factor = rows_contiguous(x), rows_contiguous(branch), rows_contiguous(factor)
        gated = gate is not None
        gate = rows_contiguous(gate) if gated else factor  # not read
        block = power_of_2(width)
        launch(
            _forward, (tokens, batch), x, x, branch, gate, factor, y, h, of_branch, of_y, tokens, width, eps,
            *x.stride()[:2], *branch.stride()[:2], gate.stride(0), factor.stride(0),
            GATED=gated, NORMED=normed, BLOCK=block, ACC=accumulator(x), num_warps=warps(block),
        )  # fmt: skip
        return y, h, of_branch, of_y
    found, modulated = gated_rms_reference(x, branch, gate, factor, eps, normed)
    of_y.copy_(rms(found.to(wide(x)), eps)[1].squeeze(-1))
    if normed:
        of_branch.copy_(rms(branch.to(wide(x)), eps)[1].squeeze(-1))
    return y.copy_(found), h.copy_(modulated), of_branch, of_y


@_op.register_fake
def _(x, branch, gate, factor, eps, normed):
    like = lambda: torch.empty_like(x, memory_format=torch.contiguous_format)
    return like(), like(), *(x.new_empty(x.shape[:2] if kept else 0, dtype=wide(x)) for kept in (normed, True))


@torch.library.custom_op("vlmedit::gated_rms_backward", mutates_args=())
def _op_backward(
    grad_y: Tensor, grad_h: Tensor, y: Tensor, branch: Tensor | None, gate: Tensor | None, factor: Tensor, of_branch: Tensor, of_y: Tensor, normed: bool, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and branch, and those of gate and factor in one tensor (k, B, D) that holds the k wanted of them. Empty where not
    wanted; `wanted` follows the operation: x, branch, gate, factor."""
    batch, tokens, width = y.shape
    to_x, to_branch, to_gate, to_factor = wanted
    learned, gated = to_gate + to_factor, gate is not None
    grad_x, grad_branch = (torch.empty_like(y, memory_format=torch.contiguous_format) if w else y.new_empty(0) for w in (to_x, to_branch))
    if y.numel() and use_triton(y, width <= WIDEST, LIMIT):
        programs, block = programs_of(y, learned), power_of_2(width)
        parts = y.new_empty(learned, batch, programs, width, dtype=wide(y)) if learned else of_y  # not written
        grad_y, grad_h, y, factor = (rows_contiguous(t) for t in (grad_y, grad_h, y, factor))
        gate = rows_contiguous(gate) if gated else factor  # not read
        branch = y if branch is None else rows_contiguous(branch)  # not read
        flags = {"GATED": gated, "NORMED": normed, "X": to_x, "BRANCH": to_branch, "GATE": to_gate, "FACTOR": to_factor}
        launch(
            _backward, (programs, batch), y, grad_y, grad_h, y, branch, gate, factor, of_branch, of_y, grad_x, grad_branch, parts, tokens, width, programs,
            *grad_y.stride()[:2], *grad_h.stride()[:2], *y.stride()[:2], *branch.stride()[:2], gate.stride(0), factor.stride(0),
            **flags, BLOCK=block, ACC=accumulator(y), num_warps=warps(block, True),
        )  # fmt: skip
        return grad_x, grad_branch, parts.sum(2).to(factor.dtype) if learned else factor.new_empty(0, batch, width)
    r = of_y.unsqueeze(-1)
    after, gh = y.to(r.dtype) * r, grad_h.to(r.dtype)
    gn = gh * factor.to(r.dtype).unsqueeze(1)
    g = grad_y.to(r.dtype) + r * (gn - after * (gn * after).mean(-1, keepdim=True))
    u = None if branch is None else branch.to(r.dtype) * (of_branch.unsqueeze(-1) if normed else 1)
    if to_x:
        grad_x.copy_(g)
    if to_branch:
        gu = g * gate.to(r.dtype).unsqueeze(1) if gated else g
        grad_branch.copy_(of_branch.unsqueeze(-1) * (gu - u * (gu * u).mean(-1, keepdim=True)) if normed else gu)
    sums = ([(g * u).sum(1)] if to_gate else []) + ([(gh * after).sum(1)] if to_factor else [])
    return grad_x, grad_branch, torch.stack(sums).to(factor.dtype) if learned else factor.new_empty(0, batch, width)


@_op_backward.register_fake
def _(grad_y, grad_h, y, branch, gate, factor, of_branch, of_y, normed, wanted):
    dense = lambda w: torch.empty_like(y, memory_format=torch.contiguous_format) if w else y.new_empty(0)
    return dense(wanted[0]), dense(wanted[1]), factor.new_empty(sum(wanted[2:]), *factor.shape)


def _setup(ctx, inputs, output):
    _, branch, gate, factor, _, ctx.normed = inputs
    y, _, of_branch, of_y = output
    ctx.mark_non_differentiable(of_branch, of_y)
    ctx.wanted = list(ctx.needs_input_grad[:4])
    read = ctx.wanted[2] or (ctx.normed and ctx.wanted[1])
    ctx.save_for_backward(y, branch if read else None, gate, factor, of_branch, of_y)


def _gradients(ctx, grad_y, grad_h, *_):
    to_x, to_branch, to_gate, to_factor = ctx.wanted
    y, branch, gate, *rest = ctx.saved_tensors  # looked at once, as checkpointing asks
    same = to_branch and gate is None and not ctx.normed  # a plain residual: x and branch get one gradient
    grad_x, grad_branch, sums = _op_backward(grad_y, grad_h, y, branch, gate, *rest, ctx.normed, [to_x or same, to_branch and not same, to_gate, to_factor])
    rest = iter(sums.unbind(0))
    grad_gate, grad_factor = (next(rest) if w else None for w in (to_gate, to_factor))
    return grad_x if to_x else None, (grad_x if same else grad_branch) if to_branch else None, grad_gate, grad_factor, None, None


_op.register_autograd(_gradients, setup_context=_setup)


def gated_rms(x: Tensor, branch: Tensor, gate: Tensor | None, factor: Tensor, eps: float = 1e-5, normed: bool = True) -> tuple[Tensor, Tensor]:
    """y = x + gate * RMS(branch) (without the norm where not `normed`, without a gate where that is None) and h = RMS(y) * factor, with gradients
    of all four. x and branch (B, N, D); gate and factor (B, D). Raises TypeError or ValueError for mixed dtypes, devices or shapes."""
    same_kind("gated_rms", x=x, branch=branch)
    same_kind("gated_rms", factor=factor, **({} if gate is None else {"gate": gate}))
    same_device("gated_rms", x=x, factor=factor)
    per_token("gated_rms", x, branch, gate=gate, factor=factor)
    y, h, _, _ = _op(x, branch, gate, factor, eps, normed)
    return y, h
