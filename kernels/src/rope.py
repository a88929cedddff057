"""RMS-norm of queries or keys followed by their 2-D rotary embedding: what happens between the projection and the attention.

    n = x / sqrt(mean(x^2) + eps) * weight                              per head            [RMSNorm, arXiv:1910.07467, Eq. 4]
    out_a = n_a cos - n_b sin,  out_b = n_a sin + n_b cos               per pair (a, b)     [RoFormer, arXiv:2104.09864, Eq. 15]

Pairs are the two halves of a head (`interleaved=False`, the suite's DiT) or neighbors (`interleaved=True`: FLUX, Qwen-Image,
Z-Image). What makes the embedding 2-D lies in the table alone: half of its columns turn with y, half with x
(`vlmedit.networks.dit.rotary_table`). In torch this is five passes and the halves are copied twice; here it is one. Kept are x and
one number per head and token. The weight's gradient is summed per program in a fixed order, then by torch: deterministic; a frozen
weight's is not computed.

Shapes: x (B, H, N, D), any strides with a dense last axis (a transposed view of (B, N, H, D) is not copied); weight (D,);
cos, sin (N, D / 2), or (B, N, D / 2) where samples differ in size. Returns a dense (B, H, N, D).
Computes in float32 (float64 for float64); weight and tables may be float32 whatever the dtype of x, and tables carry no gradient.
"""

import torch
from torch import Tensor
from vlmedit.kernels.dispatch import (
    accumulator,
    cdiv,
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

WIDEST = 1024  # of D
MOST_ROWS = 2**30 - 2**21  # rows are counted in int32, and so is a program's last step beyond them, which may be as long again
LIMIT = f"D must be at most {WIDEST}, batch x heads x tokens below {MOST_ROWS}"
PER_PROCESSOR = 8  # programs of the backward pass where the weight learns: each sums its gradient over its tiles


def _tables(x: Tensor, *tables: Tensor) -> list[Tensor]:
    """Widened, with an axis for the heads where there is one for the samples."""
    return [(t if t.ndim == 2 else t.unsqueeze(1)).to(wide(x)) for t in tables]


def _serves(x: Tensor) -> bool:
    rows = x.shape[0] * x.shape[1] * x.shape[2]
    return use_triton(x, x.shape[-1] <= WIDEST and rows <= MOST_ROWS, LIMIT)


def norm_rope_reference(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6, interleaved: bool = False) -> Tensor:
    """Plain torch, in the widened dtype, rounded once at the end."""
    value, (cos, sin) = x.to(wide(x)), _tables(x, cos, sin)
    normed = value * (value.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(wide(x))
    a, b = normed.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else normed.chunk(2, -1)
    turned = a * cos - b * sin, a * sin + b * cos
    return (torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)).to(x.dtype)


@triton.jit
def _where(row, heads, tokens):
    """Sample and head as int64, which strides multiply, and token as int32: 32-bit divisions are several times faster."""
    above = row // tokens
    return (above // heads).to(tl.int64), (above % heads).to(tl.int64), row % tokens


@triton.jit
def _load(p, start, held, pairs, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr):
    """First and second values (ROWS, PAIRS) of the pairs of the rows that begin at `start`. Neighbors are read as one dense row and parted in
    registers: each by itself would be a two-byte access."""
    if INTERLEAVED:
        at = tl.arange(0, 2 * PAIRS)[None, :]
        value = tl.load(p + start[:, None] + at, mask=held[:, None] & (at < 2 * pairs), other=0.0).to(ACC)
        first, second = tl.split(tl.reshape(value, (ROWS, PAIRS, 2)))
    else:
        at = tl.arange(0, PAIRS)[None, :]
        inside = held[:, None] & (at < pairs)
        first = tl.load(p + start[:, None] + at, mask=inside, other=0.0).to(ACC)
        second = tl.load(p + start[:, None] + at + pairs, mask=inside, other=0.0).to(ACC)
    return first, second


@triton.jit
def _store(p, start, held, pairs, first, second, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """The way back."""
    if INTERLEAVED:
        at = tl.arange(0, 2 * PAIRS)[None, :]
        value = tl.reshape(tl.join(first, second), (ROWS, 2 * PAIRS))
        tl.store(p + start[:, None] + at, value.to(p.dtype.element_ty), mask=held[:, None] & (at < 2 * pairs))
    else:
        at = tl.arange(0, PAIRS)[None, :]
        inside = held[:, None] & (at < pairs)
        tl.store(p + start[:, None] + at, first.to(p.dtype.element_ty), mask=inside)
        tl.store(p + start[:, None] + at + pairs, second.to(p.dtype.element_ty), mask=inside)


@triton.jit
def _angle(p, b, n, held, pairs, p_b, p_n, PAIRS: tl.constexpr, ACC: tl.constexpr):
    """A table's rows (ROWS, PAIRS)."""
    at = tl.arange(0, PAIRS)[None, :]
    return tl.load(p + (b * p_b + n.to(tl.int64) * p_n)[:, None] + at, mask=held[:, None] & (at < pairs), other=0.0).to(ACC)


@triton.jit
def _forward(
    x, weight, cos, sin, out, rstd, rows, heads, tokens, pairs, eps, x_b, x_h, x_n, cos_b, cos_n, sin_b, sin_n,
    INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program per `ROWS` rows; a row is one head of one token."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    held = row < rows
    b, h, n = _where(row, heads, tokens)
    first, second = _load(x, b * x_b + h * x_h + n.to(tl.int64) * x_n, held, pairs, INTERLEAVED, ROWS, PAIRS, ACC)
    wa, wb = _load(weight, tl.zeros((1,), tl.int32), tl.full((1,), True, tl.int1), pairs, INTERLEAVED, 1, PAIRS, ACC)
    c = _angle(cos, b, n, held, pairs, cos_b, cos_n, PAIRS, ACC)
    s = _angle(sin, b, n, held, pairs, sin_b, sin_n, PAIRS, ACC)
    r = 1 / tl.sqrt(tl.sum(first * first + second * second, 1) / (2 * pairs) + eps)
    first *= r[:, None] * wa
    second *= r[:, None] * wb
    _store(out, row.to(tl.int64) * 2 * pairs, held, pairs, first * c - second * s, first * s + second * c, INTERLEAVED, ROWS, PAIRS)
    tl.store(rstd + row, r, mask=held)


@triton.jit
def _backward(
    grad, x, weight, cos, sin, rstd, grad_x, parts, rows, heads, tokens, pairs, programs, g_b, g_h, g_n, x_b, x_h, x_n, cos_b, cos_n, sin_b, sin_n,
    X: tl.constexpr, WEIGHT: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each program takes every `programs`-th tile of `ROWS` rows; where it is wanted, it sums the weight's gradient over them."""
    p = tl.program_id(0)
    wa, wb = _load(weight, tl.zeros((1,), tl.int32), tl.full((1,), True, tl.int1), pairs, INTERLEAVED, 1, PAIRS, ACC)
    to_a = tl.zeros((PAIRS,), ACC)
    to_b = tl.zeros((PAIRS,), ACC)
    for begin in range(p * ROWS, rows, programs * ROWS):
        row = begin + tl.arange(0, ROWS)
        held = row < rows
        b, h, n = _where(row, heads, tokens)
        ga, gb = _load(grad, b * g_b + h * g_h + n.to(tl.int64) * g_n, held, pairs, INTERLEAVED, ROWS, PAIRS, ACC)
        xa, xb = _load(x, b * x_b + h * x_h + n.to(tl.int64) * x_n, held, pairs, INTERLEAVED, ROWS, PAIRS, ACC)
        c = _angle(cos, b, n, held, pairs, cos_b, cos_n, PAIRS, ACC)
        s = _angle(sin, b, n, held, pairs, sin_b, sin_n, PAIRS, ACC)
        r = tl.load(rstd + row, mask=held, other=0.0)[:, None]
        na = ga * c + gb * s  # the rotation backwards
        nb = gb * c - ga * s
        xa *= r
        xb *= r
        if WEIGHT:
            to_a += tl.sum(na * xa, 0)
            to_b += tl.sum(nb * xb, 0)
        if X:
            na *= wa
            nb *= wb
            along = (tl.sum(na * xa + nb * xb, 1) / (2 * pairs))[:, None]
            _store(grad_x, row.to(tl.int64) * 2 * pairs, held, pairs, r * (na - xa * along), r * (nb - xb * along), INTERLEAVED, ROWS, PAIRS)
    if WEIGHT:
        start = (p * 2 * pairs).to(tl.int64) + tl.zeros((1,), tl.int64)
        _store(parts, start, tl.full((1,), True, tl.int1), pairs, to_a[None, :], to_b[None, :], INTERLEAVED, 1, PAIRS)


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
    if _serves(x):
        tables = [rows_contiguous(t).expand(batch, -1, -1) for t in (cos, sin)]
        x, rows, (tile, pairs) = rows_contiguous(x), batch * heads * tokens, _tile(width)
        launch(
            _forward, (cdiv(rows, tile),), x, x, weight.contiguous(), *tables, out, rstd, rows, heads, tokens, width // 2, eps, *x.stride()[:3],
            *(n for t in tables for n in t.stride()[:2]), INTERLEAVED=interleaved, ROWS=tile, PAIRS=pairs, ACC=accumulator(x), num_warps=4,
        )  # fmt: skip
        return out, rstd
    rstd.copy_((x.to(wide(x)).square().mean(-1) + eps).rsqrt())
    return out.copy_(norm_rope_reference(x, weight, cos, sin, eps, interleaved)), rstd


@_op.register_fake
def _(x, weight, cos, sin, eps, interleaved):
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape[:-1], dtype=wide(x))


@torch.library.custom_op("vlmedit::norm_rope_backward", mutates_args=())
def _op_backward(grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, rstd: Tensor, interleaved: bool, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; empty where not wanted."""
    batch, heads, tokens, width = x.shape
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else x.new_empty(0)
    if x.numel() and _serves(x):
        tables = [rows_contiguous(t).expand(batch, -1, -1) for t in (cos, sin)]
        grad, x, rows, (tile, pairs) = rows_contiguous(grad), rows_contiguous(x), batch * heads * tokens, _tile(width)
        programs = min(cdiv(rows, tile), PER_PROCESSOR * processors(x)) if wanted[1] else cdiv(rows, tile)
        parts = x.new_empty(programs if wanted[1] else 0, width, dtype=wide(x))
        launch(
            _backward, (programs,), x, grad, x, weight.contiguous(), *tables, rstd, grad_x, parts, rows, heads, tokens, width // 2, programs,
            *grad.stride()[:3], *x.stride()[:3], *(n for t in tables for n in t.stride()[:2]),
            X=wanted[0], WEIGHT=wanted[1], INTERLEAVED=interleaved, ROWS=tile, PAIRS=pairs, ACC=accumulator(x), num_warps=4,
        )  # fmt: skip
        return grad_x, parts.sum(0).to(weight.dtype) if wanted[1] else weight.new_empty(0)
    pairs_of = lambda t: t.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else t.chunk(2, -1)
    (ga, gb), (cos, sin) = pairs_of(grad.to(rstd.dtype)), _tables(x, cos, sin)
    back = ga * cos + gb * sin, gb * cos - ga * sin
    gn = torch.stack(back, -1).flatten(-2) if interleaved else torch.cat(back, -1)
    normed = x.to(rstd.dtype) * rstd.unsqueeze(-1)
    if wanted[0]:
        weighted = gn * weight.to(rstd.dtype)
        grad_x.copy_(rstd.unsqueeze(-1) * (weighted - normed * (weighted * normed).mean(-1, keepdim=True)))
    return grad_x, (gn * normed).sum((0, 1, 2)).to(weight.dtype) if wanted[1] else weight.new_empty(0)


@_op_backward.register_fake
def _(grad, x, weight, cos, sin, rstd, interleaved, wanted):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) if w else t.new_empty(0) for t, w in zip((x, weight), wanted))


def _setup(ctx, inputs, output):
    x, weight, cos, sin, _, ctx.interleaved = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, cos, sin, output[1])


def _gradients(ctx, grad, grad_rstd):
    wanted = list(ctx.needs_input_grad[:2])
    found = _op_backward(grad, *ctx.saved_tensors, ctx.interleaved, wanted)
    return *(g if w else None for g, w in zip(found, wanted)), None, None, None, None


_op.register_autograd(_gradients, setup_context=_setup)


def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6, interleaved: bool = False) -> Tensor:
    """RMS-normed and rotated queries or keys, with gradients of x and weight. x (B, H, N, D), weight (D,), cos and sin (N, D / 2)
    or (B, N, D / 2). Raises TypeError or ValueError for mixed dtypes or devices, an odd D, or other shapes."""
    same_kind("norm_rope", x=x)
    same_kind("norm_rope", weight=weight)
    same_kind("norm_rope", cos=cos, sin=sin)
    same_device("norm_rope", x=x, weight=weight, cos=cos)
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(f"norm_rope: x has shape {tuple(x.shape)}; it must be (batch, heads, tokens, an even head width)")
    shaped("norm_rope", "weight", weight, x.shape[-1:])
    for name, t in (("cos", cos), ("sin", sin)):
        own = x.shape[:1] if t.ndim == 3 else ()  # a table per sample
        shaped("norm_rope", name, t, (*own, x.shape[2], x.shape[3] // 2))
        if t.requires_grad:
            raise ValueError(f"norm_rope: {name} requires a gradient, which the table has none of; detach it")
    return _op(x, weight, cos, sin, eps, interleaved)[0]
