"""The DMD step after its three network calls, in two passes: guidance, both x0 predictions, normalizer, gradient and loss.

`vlmedit.equations.dmd` says it in five steps, each of which reads and writes whole pictures:
    x_t = (1 - t) x + t eps;  v_real = u + w (c - u);  x0_real = x_t - t v_real;  x0_fake = x_t - t v_fake
    gradient = (x0_fake - x0_real) / max(mean|x - x0_real|, floor)            [DMD, arXiv:2311.18828, Eq. 7 over Eq. 8]
    loss = gradient^2 / 2, averaged, whose derivative by x is gradient / numel
But x_t drops out: x0_fake - x0_real = t (v_real - v_fake), and x - x0_real = t (v_real - (eps - x)), t times the error of the guided
velocity. So x_t need not be kept, and the first pass sums |v_real - (eps - x)|, the second one writes the gradient. With a normalizer
per pixel, whose mean goes over the channels alone, one pass does both. Sums are taken per program and then by torch: deterministic.

Shapes: x, eps and the velocities (B, C, ...) of one dtype; t (B,) of its own. The gradient and the loss carry a derivative by x alone: scores are constants.
Computes in float32 (float64 for float64). Deviates from `vlmedit.equations.dmd`: what is exactly zero over a zero error is 0 either way; x_t is not
rounded to half precision in between, as it was when the networks saw it.
"""

import torch
from torch import Tensor
from vlmedit.kernels.dispatch import accumulator, cdiv, launch, power_of_2, same_device, same_kind, shaped, tl, triton, use_triton, wide
from vlmedit.kernels.sampler import guided_velocity

from vlmedit.equations.dmd import NORMS, dmd_gradient
from vlmedit.equations.dmd import dmd_loss as surrogate
from vlmedit.flow import guide, interpolate, to_x0

BLOCK = 1024  # values per program
MOST_CHANNELS = 256  # of the normalizer per pixel: a pixel's channels lie in one program
LIMIT = f"the normalizer per pixel takes at most {MOST_CHANNELS} channels"


def dmd_gradient_reference(x: Tensor, eps: Tensor, t: Tensor, cond: Tensor, uncond: Tensor | None, fake: Tensor, guidance: float, norm: str = "sample", floor: float = 1e-6) -> Tensor:
    """The gradient from the package's own functions, step by step; where t is wider than x, in its dtype and rounded once at the end."""
    dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, t.dtype))
    x_t = interpolate(x, eps, t)
    real = cond if uncond is None else guide(cond, uncond, guidance)
    gradient = dmd_gradient(x, to_x0(x_t, real, t), to_x0(x_t, fake, t), norm, floor)
    return gradient if gradient.dtype == dtype else torch.nan_to_num(gradient.to(dtype))  # a narrower dtype overflows earlier


@triton.jit
def finite(value, largest):
    """torch.nan_to_num: nothing for a NaN, the largest number for an infinite one."""
    value = tl.where(value == value, value, 0.0)
    return tl.minimum(tl.maximum(value, -largest), largest)


@triton.jit
def _errors(x, eps, cond, uncond, parts, guidance, size, blocks, GUIDED: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Sum of |v_real - (eps - x)| over one block of one sample."""
    i, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = i * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    at += b * size
    real = guided_velocity(cond, uncond, at, inside, guidance, GUIDED, ACC)
    error = real - tl.load(eps + at, mask=inside, other=0.0).to(ACC) + tl.load(x + at, mask=inside, other=0.0).to(ACC)
    tl.store(parts + b * blocks + i, tl.sum(tl.abs(error), 0))


@triton.jit
def _by_sample(cond, uncond, fake, t, error, gradient, parts, guidance, floor, largest, size, blocks, GUIDED: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Gradient of one block of one sample, given the sample's mean error; and the sum of its squares."""
    i, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = i * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    at += b * size
    time = tl.load(t + b).to(ACC)
    scale = time * tl.load(error + b)
    scale = tl.where(scale < floor, floor, scale)  # keeps a NaN, which tl.maximum would hide
    real = guided_velocity(cond, uncond, at, inside, guidance, GUIDED, ACC)
    pull = time * (real - tl.load(fake + at, mask=inside, other=0.0).to(ACC)) / scale
    pull = finite(pull, largest)
    tl.store(gradient + at, pull.to(gradient.dtype.element_ty), mask=inside)
    tl.store(parts + b * blocks + i, tl.sum(pull * pull, 0))


@triton.jit
def _by_pixel(
    x, eps, cond, uncond, fake, t, gradient, parts, guidance, floor, largest, channels, pixels, blocks,
    GUIDED: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of all channels of `PIXELS` pixels, each over its own mean error."""
    i, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pixel = i * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS).to(tl.int64)
    inside = (channel < channels)[:, None] & (pixel < pixels)[None, :]
    at = b * channels * pixels + channel[:, None] * pixels + pixel[None, :]
    time = tl.load(t + b).to(ACC)
    real = guided_velocity(cond, uncond, at, inside, guidance, GUIDED, ACC)
    error = real - tl.load(eps + at, mask=inside, other=0.0).to(ACC) + tl.load(x + at, mask=inside, other=0.0).to(ACC)
    scale = time * tl.sum(tl.abs(error), 0) / channels
    scale = tl.where(scale < floor, floor, scale)  # keeps a NaN, which tl.maximum would hide
    pull = time * (real - tl.load(fake + at, mask=inside, other=0.0).to(ACC)) / scale[None, :]
    pull = finite(pull, largest)
    tl.store(gradient + at, pull.to(gradient.dtype.element_ty), mask=inside)
    tl.store(parts + b * blocks + i, tl.sum(tl.sum(pull * pull, 0), 0))


@torch.library.custom_op("vlmedit::dmd", mutates_args=())
def _op(x: Tensor, eps: Tensor, t: Tensor, cond: Tensor, uncond: Tensor | None, fake: Tensor, guidance: float, norm: str, floor: float) -> tuple[Tensor, Tensor]:
    """The loss in the widened dtype, and the gradient."""
    gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
    channels = x.shape[1]
    if not (x.numel() and use_triton(x, norm == "sample" or channels <= MOST_CHANNELS, LIMIT)):
        gradient.copy_(dmd_gradient_reference(x, eps, t, cond, uncond, fake, guidance, norm, floor))
        return gradient.to(wide(x)).square().mean() / 2, gradient
    x, eps, t, cond, fake = (v.contiguous() for v in (x, eps, t, cond, fake))
    guided = uncond is not None
    uncond = uncond.contiguous() if guided else cond  # not read
    batch, size = len(x), x[0].numel()
    largest = min(torch.finfo(x.dtype).max, torch.finfo(torch.float32).max)  # what a kernel's scalar can hold
    how = {"GUIDED": guided, "ACC": accumulator(x), "num_warps": 4}
    if norm == "sample":
        blocks = cdiv(size, BLOCK)
        parts = x.new_empty(batch, blocks, dtype=wide(x))
        launch(_errors, (blocks, batch), x, x, eps, cond, uncond, parts, guidance, size, blocks, BLOCK=BLOCK, **how)
        error = parts.sum(1) / size
        launch(_by_sample, (blocks, batch), x, cond, uncond, fake, t, error, gradient, parts, guidance, floor, largest, size, blocks, BLOCK=BLOCK, **how)
    else:
        pixels, wide_channels = size // channels, power_of_2(channels)
        tile = max(16, 2048 // wide_channels)
        blocks = cdiv(pixels, tile)
        parts = x.new_empty(batch, blocks, dtype=wide(x))
        launch(
            _by_pixel, (blocks, batch), x, x, eps, cond, uncond, fake, t, gradient, parts, guidance, floor, largest, channels, pixels, blocks, CHANNELS=wide_channels, PIXELS=tile, **how
        )
    return parts.sum() / (2 * x.numel()), gradient


@_op.register_fake
def _(x, eps, t, cond, uncond, fake, guidance, norm, floor):
    return x.new_empty((), dtype=wide(x)), torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _gradients(ctx, grad_loss, grad_gradient):
    (gradient,) = ctx.saved_tensors
    return (gradient * (grad_loss / gradient.numel())).to(gradient.dtype), *(None,) * 8


_op.register_autograd(_gradients, setup_context=_setup)


def dmd_step(
    x: Tensor, eps: Tensor, t: Tensor, cond: Tensor, uncond: Tensor | None, fake: Tensor, guidance: float = 1.0, norm: str = "sample", floor: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """DMD's loss and its gradient (detached), from the student's pictures x, the noise they were raised to level t with, and the velocities
    there: the teacher's with and without caption (`uncond` None: unguided) and the fake score's. The loss's derivative by x is
    gradient / numel; its value means nothing. Raises TypeError or ValueError for mixed dtypes, devices or shapes, or an unknown norm."""
    if norm not in NORMS:
        raise ValueError(f"dmd_step: unknown normalizer {norm!r}; known: {', '.join(NORMS)}")
    same_kind("dmd_step", x=x, eps=eps, cond=cond, fake=fake, **({} if uncond is None else {"uncond": uncond}))
    same_kind("dmd_step", t=t)
    same_device("dmd_step", x=x, t=t)
    if x.ndim < 2:
        raise ValueError(f"dmd_step: x has shape {tuple(x.shape)}; it must be (batch, channels, ...)")
    if uncond is None and guidance != 1:
        raise ValueError(f"dmd_step: guidance is {guidance} and uncond is None; give the velocity without the caption, or guidance 1")
    for name, v in (("eps", eps), ("cond", cond), ("uncond", uncond), ("fake", fake)):
        shaped("dmd_step", name, v, x.shape)
    shaped("dmd_step", "t", t, x.shape[:1])
    constants = (v if v is None else v.detach() for v in (eps, t, cond, uncond, fake))
    return _op(x, *constants, guidance, norm, floor)


def dmd_step_reference(x: Tensor, eps: Tensor, t: Tensor, cond: Tensor, uncond: Tensor | None, fake: Tensor, guidance: float = 1.0, norm: str = "sample", floor: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(loss, gradient) by the package's functions."""
    gradient = dmd_gradient_reference(x.detach(), eps, t, cond, uncond, fake, guidance, norm, floor)
    return surrogate(x, gradient), gradient
