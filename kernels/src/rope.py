"""RMS-norm of queries or keys followed by their 2-D rotary embedding: what happens between the projection and the attention.

    n = x / sqrt(mean(x^2) + eps) * weight                              per head            [RMSNorm, arXiv:1910.07467, Eq. 4]
    out_a = n_a cos - n_b sin,  out_b = n_a sin + n_b cos               per pair (a, b)     [RoFormer, arXiv:2104.09864, Eq. 15]

Pairs are the two halves of a head (`interleaved=False`, the suite's DiT) or neighbors (`interleaved=True`: FLUX, Qwen-Image,
Z-Image). What makes the embedding 2-D lies in the table alone: half of its columns turn with y, half with x
(`vlmedit.models.dit.rotary_table`). In torch this is five passes and the halves are copied twice; here it is one. Kept are x and
one number per head and token. The weight's gradient is summed per program in a fixed order, then by torch: deterministic.

Shapes: x (B, H, N, D), any strides with a dense last axis (a transposed view of (B, N, H, D) is not copied); weight (D,);
cos, sin (N, D / 2). Returns a dense (B, H, N, D).
Computes in float32 (float64 for float64); cos and sin may be float32 whatever the dtype of x, and carry no gradient.
"""

import torch
from torch import Tensor
from vlmedit.kernels.dispatch import (
    accumulator,
    cdiv,
    launch,
    power_of_2,
    rows_contiguous,
    same_device,
    same_kind,
    shaped,
    tl,
    triton,
    use_triton,
    wide,
)

WIDEST = 1024  # of D
LIMIT = f"D must be at most {WIDEST}"
PROGRAMS = 1024  # of the backward pass, in all: each sums the weight's gradient over its tiles


def norm_rope_reference(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6, interleaved: bool = False) -> Tensor:
    """Plain torch, in the widened dtype, rounded once at the end."""
    value, cos, sin = x.to(wide(x)), cos.to(wide(x)), sin.to(wide(x))
    normed = value * (value.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(wide(x))
    a, b = normed.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else normed.chunk(2, -1)
    turned = a * cos - b * sin, a * sin + b * cos
    return (torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)).to(x.dtype)


@triton.jit
def partners(pair, pairs, INTERLEAVED: tl.constexpr):
    """Where the two values of each pair lie in a row: side by side, or half a row apart."""
    if INTERLEAVED:
        first = 2 * pair
        second = 2 * pair + 1
    else:
        first = pair
        second = pair + pairs
    return first, second


@triton.jit
def _forward(
    x, weight, cos, sin, out, rstd, rows, heads, tokens, pairs, eps, x_b, x_h, x_n, cos_n, sin_n,
    INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program per `ROWS` rows; a row is one head of one token."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, PAIRS)
    n = row % tokens
    h = (row // tokens) % heads
    b = row // (tokens * heads)
    a_at, b_at = partners(pair, pairs, INTERLEAVED)
    wanted = pair < pairs
    inside = (row < rows)[:, None] & wanted[None, :]
    start = (b * x_b + h * x_h + n * x_n)[:, None]
    first = tl.load(x + start + a_at[None, :], mask=inside, other=0.0).to(ACC)
    second = tl.load(x + start + b_at[None, :], mask=inside, other=0.0).to(ACC)
    r = 1 / tl.sqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * pairs) + eps)
    first *= r[:, None] * tl.load(weight + a_at, mask=wanted, other=0.0).to(ACC)[None, :]
    second *= r[:, None] * tl.load(weight + b_at, mask=wanted, other=0.0).to(ACC)[None, :]
    c = tl.load(cos + (n * cos_n)[:, None] + pair[None, :], mask=inside, other=0.0).to(ACC)
    s = tl.load(sin + (n * sin_n)[:, None] + pair[None, :], mask=inside, other=0.0).to(ACC)
    to = (row * 2 * pairs)[:, None]
    tl.store(out + to + a_at[None, :], (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + to + b_at[None, :], (first * s + second * c).to(out.dtype.element_ty), mask=inside)
    tl.store(rstd + row, r, mask=row < rows)


@triton.jit
def _backward(
    grad, x, weight, cos, sin, rstd, grad_x, parts, rows, heads, tokens, pairs, programs, g_b, g_h, g_n, x_b, x_h, x_n, cos_n, sin_n,
    INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each program takes every `programs`-th tile of `ROWS` rows and sums the weight's gradient over them."""
    p = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    a_at, b_at = partners(pair, pairs, INTERLEAVED)
    wanted = pair < pairs
    wa = tl.load(weight + a_at, mask=wanted, other=0.0).to(ACC)[None, :]
    wb = tl.load(weight + b_at, mask=wanted, other=0.0).to(ACC)[None, :]
    to_a = tl.zeros((PAIRS,), ACC)
    to_b = tl.zeros((PAIRS,), ACC)
    for begin in range(p * ROWS, rows, programs * ROWS):
        row = begin + tl.arange(0, ROWS)
        n = row % tokens
        h = (row // tokens) % heads
        b = row // (tokens * heads)
        inside = (row < rows)[:, None] & wanted[None, :]
        g_at = (b * g_b + h * g_h + n * g_n)[:, None]
        ga = tl.load(grad + g_at + a_at[None, :], mask=inside, other=0.0).to(ACC)
        gb = tl.load(grad + g_at + b_at[None, :], mask=inside, other=0.0).to(ACC)
        c = tl.load(cos + (n * cos_n)[:, None] + pair[None, :], mask=inside, other=0.0).to(ACC)
        s = tl.load(sin + (n * sin_n)[:, None] + pair[None, :], mask=inside, other=0.0).to(ACC)
        na = ga * c + gb * s  # the rotation backwards
        nb = gb * c - ga * s
        x_at = (b * x_b + h * x_h + n * x_n)[:, None]
        r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        xa = tl.load(x + x_at + a_at[None, :], mask=inside, other=0.0).to(ACC) * r
        xb = tl.load(x + x_at + b_at[None, :], mask=inside, other=0.0).to(ACC) * r
        to_a += tl.sum(na * xa, 0)
        to_b += tl.sum(nb * xb, 0)
        na *= wa
        nb *= wb
        along = ((tl.sum(na * xa, 1) + tl.sum(nb * xb, 1)) / (2 * pairs))[:, None]
        to = (row * 2 * pairs)[:, None]
        tl.store(grad_x + to + a_at[None, :], (r * (na - xa * along)).to(grad_x.dtype.element_ty), mask=inside)
        tl.store(grad_x + to + b_at[None, :], (r * (nb - xb * along)).to(grad_x.dtype.element_ty), mask=inside)
    tl.store(parts + p * 2 * pairs + a_at, to_a, mask=wanted)
    tl.store(parts + p * 2 * pairs + b_at, to_b, mask=wanted)


def _tile(width: int) -> tuple[int, int]:
    """Rows and pairs of a tile of about 2048 values."""
    pairs = power_of_2(width // 2)
    return max(1, 1024 // pairs), pairs


@torch.library.custom_op("vlmedit::norm_rope", mutates_args=())
def _op(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The result, and 1 / root mean square of each row."""
    batch, heads, tokens, width = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = x.new_empty(batch, heads, tokens, dtype=wide(x))
    if not x.numel():
        return out, rstd
    if use_triton(x, width <= WIDEST, LIMIT):
        x, cos, sin = rows_contiguous(x), rows_contiguous(cos), rows_contiguous(sin)
        rows, (tile, pairs) = batch * heads * tokens, _tile(width)
        launch(
            _forward, (cdiv(rows, tile),), x, x, weight.contiguous(), cos, sin, out, rstd, rows, heads, tokens, width // 2, eps, *x.stride()[:3], cos.stride(0), sin.stride(0),
            INTERLEAVED=interleaved, ROWS=tile, PAIRS=pairs, ACC=accumulator(x), num_warps=4,
        )  # fmt: skip
        return out, rstd
    rstd.copy_((x.to(wide(x)).square().mean(-1) + eps).rsqrt())
    return out.copy_(norm_rope_reference(x, weight, cos, sin, eps, interleaved)), rstd


@_op.register_fake
def _(x, weight, cos, sin, eps, interleaved):
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape[:-1], dtype=wide(x))


@torch.library.custom_op("vlmedit::norm_rope_backward", mutates_args=())
def _op_backward(grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, rstd: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    batch, heads, tokens, width = x.shape
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() and use_triton(x, width <= WIDEST, LIMIT):
        grad, x, cos, sin = (rows_contiguous(t) for t in (grad, x, cos, sin))
        rows, (tile, pairs) = batch * heads * tokens, _tile(width)
        programs = min(cdiv(rows, tile), PROGRAMS)
        parts = x.new_empty(programs, width, dtype=wide(x))
        launch(
            _backward, (programs,), x, grad, x, weight.contiguous(), cos, sin, rstd, grad_x, parts, rows, heads, tokens, width // 2, programs,
            *grad.stride()[:3], *x.stride()[:3], cos.stride(0), sin.stride(0),
            INTERLEAVED=interleaved, ROWS=tile, PAIRS=pairs, ACC=accumulator(x), num_warps=4,
        )  # fmt: skip
        return grad_x, parts.sum(0).to(weight.dtype)
    pairs_of = lambda t: t.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else t.chunk(2, -1)
    ga, gb = pairs_of(grad.to(rstd.dtype))
    cos, sin = cos.to(rstd.dtype), sin.to(rstd.dtype)
    back = ga * cos + gb * sin, gb * cos - ga * sin
    gn = torch.stack(back, -1).flatten(-2) if interleaved else torch.cat(back, -1)
    normed = x.to(rstd.dtype) * rstd.unsqueeze(-1)
    weighted = gn * weight.to(rstd.dtype)
    grad_x.copy_(rstd.unsqueeze(-1) * (weighted - normed * (weighted * normed).mean(-1, keepdim=True)))
    return grad_x, (gn * normed).sum((0, 1, 2)).to(weight.dtype)


@_op_backward.register_fake
def _(grad, x, weight, cos, sin, rstd, interleaved):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    x, weight, cos, sin, _, ctx.interleaved = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, cos, sin, output[1])


def _gradients(ctx, grad, grad_rstd):
    grad_x, grad_weight = _op_backward(grad, *ctx.saved_tensors, ctx.interleaved)
    return grad_x, grad_weight, None, None, None, None


_op.register_autograd(_gradients, setup_context=_setup)


def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6, interleaved: bool = False) -> Tensor:
    """RMS-normed and rotated queries or keys, with gradients of x and weight. x (B, H, N, D), weight (D,), cos and sin (N, D / 2).
    Raises TypeError or ValueError for mixed dtypes or devices, an odd D, or other shapes."""
    same_kind("norm_rope", x=x, weight=weight)
    same_kind("norm_rope", cos=cos, sin=sin)
    same_device("norm_rope", x=x, cos=cos)
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(f"norm_rope: x has shape {tuple(x.shape)}; it must be (batch, heads, tokens, an even head width)")
    shaped("norm_rope", "weight", weight, x.shape[-1:])
    for name, t in (("cos", cos), ("sin", sin)):
        shaped("norm_rope", name, t, (x.shape[2], x.shape[3] // 2))
        if t.requires_grad:
            raise ValueError(f"norm_rope: {name} requires a gradient, which the table has none of; detach it")
    return _op(x, weight, cos, sin, eps, interleaved)[0]
