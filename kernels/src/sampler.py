"""One step of a few-step sampler with guidance: guided velocity, x0 and the jump back to the next level, in one pass.

    v = u + w (c - u);  x0 = x - t v;  x' = (1 - s) x0 + s noise          [vlmedit.flow: guide, to_x0, interpolate]
With v alone (`uncond` None) it is the step of a distilled student, and the step that NP-Edit's unroll differentiates [arXiv:2510.14978,
Sec. 3.1]. It is linear: the gradients of x, c, u and noise are the incoming one times (1 - s), -(1 - s) t w, -(1 - s) t (1 - w) and s,
so nothing is kept for the backward pass but t and s, and its pass reads one picture and writes only what somebody asks for.

Shapes: x, cond, uncond, noise (B, ...) of one dtype; t, s (B,) of theirs, without gradient: float32 times are not rounded to half precision.
Computes in float32 (float64 for float64). Deterministic: no sums.
"""

import torch
from torch import Tensor
from vlmedit.kernels.dispatch import accumulator, cdiv, launch, same_device, same_kind, shaped, tl, triton, use_triton

from vlmedit.flow import guide, interpolate, to_x0

BLOCK = 1024


def guided_step_reference(x: Tensor, cond: Tensor, uncond: Tensor | None, noise: Tensor, t: Tensor, s: Tensor, guidance: float = 1.0) -> Tensor:
    """Plain torch, by the one home of these formulas; where the times are wider than x, in their dtype and rounded once at the end."""
    v = cond if uncond is None else guide(cond, uncond, guidance)
    exact = torch.promote_types(x.dtype, t.dtype)
    return interpolate(to_x0(x.to(exact), v, t), noise, s).to(x.dtype)


@triton.jit
def guided_velocity(cond, uncond, at, inside, guidance, GUIDED: tl.constexpr, ACC: tl.constexpr):
    """v = u + w (c - u) of the values `at`, or c alone; zeros outside."""
    v = tl.load(cond + at, mask=inside, other=0.0).to(ACC)
    if GUIDED:
        free = tl.load(uncond + at, mask=inside, other=0.0).to(ACC)
        v = free + guidance * (v - free)
    return v


@triton.jit
def _forward(x, cond, uncond, noise, t, s, out, guidance, size, GUIDED: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """One program per block of one sample."""
    i, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = i * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    at += b * size
    v = guided_velocity(cond, uncond, at, inside, guidance, GUIDED, ACC)
    clean = tl.load(x + at, mask=inside, other=0.0).to(ACC) - tl.load(t + b).to(ACC) * v
    level = tl.load(s + b).to(ACC)
    result = (1 - level) * clean + level * tl.load(noise + at, mask=inside, other=0.0).to(ACC)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, t, s, to_x, to_cond, to_uncond, to_noise, guidance, size,
    X: tl.constexpr, COND: tl.constexpr, UNCOND: tl.constexpr, NOISE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The incoming gradient times a number per sample, written for each input that wants one."""
    i, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = i * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    at += b * size
    g = tl.load(grad + at, mask=inside, other=0.0).to(ACC)
    level = tl.load(s + b).to(ACC)
    of_clean = (1 - level) * g
    of_v = -tl.load(t + b).to(ACC) * of_clean
    if X:
        tl.store(to_x + at, of_clean.to(to_x.dtype.element_ty), mask=inside)
    if COND:
        tl.store(to_cond + at, (guidance * of_v).to(to_cond.dtype.element_ty), mask=inside)
    if UNCOND:
        tl.store(to_uncond + at, ((1 - guidance) * of_v).to(to_uncond.dtype.element_ty), mask=inside)
    if NOISE:
        tl.store(to_noise + at, (level * g).to(to_noise.dtype.element_ty), mask=inside)


@torch.library.custom_op("vlmedit::guided_step", mutates_args=())
def _op(x: Tensor, cond: Tensor, uncond: Tensor | None, noise: Tensor, t: Tensor, s: Tensor, guidance: float) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not (x.numel() and use_triton(x, True, "")):
        return out.copy_(guided_step_reference(x, cond, uncond, noise, t, s, guidance))
    guided = uncond is not None
    x, cond, noise, t, s = (v.contiguous() for v in (x, cond, noise, t, s))
    uncond = uncond.contiguous() if guided else cond  # not read
    size = x[0].numel()
    launch(
        _forward, (cdiv(size, BLOCK), len(x)), x, x, cond, uncond, noise, t, s, out, guidance, size, GUIDED=guided, BLOCK=BLOCK, ACC=accumulator(x), num_warps=4
    )
    return out


@_op.register_fake
def _(x, cond, uncond, noise, t, s, guidance):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("vlmedit::guided_step_backward", mutates_args=())
def _op_backward(grad: Tensor, t: Tensor, s: Tensor, guidance: float, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, cond, uncond and noise; empty where not wanted."""
    outs = tuple(torch.empty_like(grad, memory_format=torch.contiguous_format) if w else grad.new_empty(0) for w in wanted)
    if grad.numel() and use_triton(grad, True, ""):
        grad, t, s = grad.contiguous(), t.contiguous(), s.contiguous()
        size = grad[0].numel()
        flags = dict(zip(("X", "COND", "UNCOND", "NOISE"), wanted))
        launch(_backward, (cdiv(size, BLOCK), len(grad)), grad, grad, t, s, *outs, guidance, size, **flags, BLOCK=BLOCK, ACC=accumulator(grad), num_warps=4)
        return outs
    t, s = (v.view(-1, *[1] * (grad.ndim - 1)) for v in (t, s))
    of_clean = (1 - s) * grad
    of_v = -t * of_clean
    for out, value in zip(outs, (of_clean, guidance * of_v, (1 - guidance) * of_v, s * grad)):
        if out.numel():
            out.copy_(value)
    return outs


@_op_backward.register_fake
def _(grad, t, s, guidance, wanted):
    return tuple(torch.empty_like(grad, memory_format=torch.contiguous_format) if w else grad.new_empty(0) for w in wanted)


def _setup(ctx, inputs, output):
    _, _, uncond, _, t, s, guidance = inputs
    ctx.guidance = 1.0 if uncond is None else guidance
    ctx.save_for_backward(t, s)


def _gradients(ctx, grad):
    wanted = list(ctx.needs_input_grad[:4])
    found = _op_backward(grad, *ctx.saved_tensors, ctx.guidance, wanted)
    return *(g if w else None for g, w in zip(found, wanted)), None, None, None


_op.register_autograd(_gradients, setup_context=_setup)


def guided_step(x: Tensor, cond: Tensor, uncond: Tensor | None, noise: Tensor, t: Tensor, s: Tensor, guidance: float = 1.0) -> Tensor:
    """x at level s from x at level t: guidance, x0, fresh noise; with gradients of x, cond, uncond and noise. All (B, ...), t and s (B,).
    Raises TypeError or ValueError for mixed dtypes, devices or shapes."""
    same_kind("guided_step", x=x, cond=cond, noise=noise, **({} if uncond is None else {"uncond": uncond}))
    same_kind("guided_step", t=t, s=s)
    same_device("guided_step", x=x, t=t)
    if x.ndim < 2:
        raise ValueError(f"guided_step: x has shape {tuple(x.shape)}; it must be (batch, ...)")
    if uncond is None and guidance != 1:
        raise ValueError(f"guided_step: guidance is {guidance} and uncond is None; give the velocity without the caption, or guidance 1")
    for name, v in (("cond", cond), ("uncond", uncond), ("noise", noise)):
        shaped("guided_step", name, v, x.shape)
    for name, v in (("t", t), ("s", s)):
        shaped("guided_step", name, v, x.shape[:1])
        if v.requires_grad:
            raise ValueError(f"guided_step: {name} requires a gradient, which times have none of; detach it")
    return _op(x, cond, uncond, noise, t, s, guidance)
