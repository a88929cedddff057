"""From pictures to what a vision tower reads, in one pass: clamp, resize with antialiasing, normalize, cut into patches; and its gradient.

    out = ((clamp(R_y clamp(x) R_x^T) + 1) / 2 - mean) / std, in patches     R: Pillow's and torch's bicubic or bilinear filter, antialiased
Both clamps pass the gradient straight through, as `vlmedit.networks.judges.resize` does, so the way back is linear: R_y^T (g / 2 std) R_x,
summed over the frames that repeat a picture. Nothing is kept for it but std. Both ways one program gathers what its pixels need through
two short tables of weights, one per side, made once per pair of sizes; the way back has the tables of the transposed maps. So nothing
is added atomically, and it is deterministic; torch's own backward pass of this resize on CUDA adds atomically and is not.

    patch=None            (B, C, h, w)                          pixel_values of LLaVA-OneVision, SigLIP, InternVL, PaliGemma
    patch=p               (B, h w / p^2, C p^2)                 SigLIP's and CLIP's embedding as a matrix product: patches row by row
    patch, merge, frames  (B, h w / p^2, C frames p^2)          Qwen2.5-VL, Qwen3-VL: patches by the squares that are merged, each frame
                                                                of a patch the same picture; their pixel_values, one picture after another
Shapes: pictures (B, C, H, W) in [-1, 1], any strides; mean, std (C,). Computes in float32 (float64 for float64).
Deviates from the processors: they round to 8 bits after the resize. Left to the caller: LLaVA-OneVision's padding to a square; not
covered: SmolVLM's two Lanczos passes.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from vlmedit.kernels.dispatch import (
    DTYPES,
    MOST_SAMPLES,
    accumulator,
    cdiv,
    exact,
    launch,
    same_device,
    same_kind,
    shaped,
    tl,
    triton,
    use_triton,
    wide,
)

SUPPORT = {"bilinear": 1, "bicubic": 2}  # of a filter, in pixels
BLOCK = 256  # pixels per program
MOST_TAPS = 64  # per side, of the maps and of their transposes
LIMIT = f"a pixel depends on more than {MOST_TAPS} others per side (resize in two steps), or there are more channels or pixels than 16 or 31 bits count"


def _through(x: Tensor) -> Tensor:
    """Clamped to [-1, 1]; saturated pixels keep their gradient."""
    return x + (x.clamp(-1, 1) - x).detach()


def vlm_patches_reference(
    pictures: Tensor, mean: Tensor, std: Tensor, size: tuple[int, int], patch: int | None = None, merge: int = 1, frames: int = 1,
    mode: str = "bicubic", dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Plain torch, in the widened dtype, rounded once at the end."""
    x = _through(pictures.to(wide(pictures)))
    if x.shape[-2:] != size:
        x = _through(F.interpolate(x, size=size, mode=mode, antialias=True))
    x = ((x + 1) / 2 - mean.to(x.dtype).view(-1, 1, 1)) / std.to(x.dtype).view(-1, 1, 1)
    x = x.to(dtype or pictures.dtype)
    if patch is None:
        return x
    high, across = (side // patch // merge for side in size)
    x = x.unflatten(3, (across, merge, patch)).unflatten(2, (high, merge, patch)).permute(0, 2, 5, 3, 6, 1, 4, 7)  # (B, gh, gw, m, m, C, p, p)
    return x.unsqueeze(6).expand(*x.shape[:6], frames, patch, patch).reshape(len(x), high * across * merge**2, -1)


# the resize of one side as a table


def _filter(x: Tensor, mode: str) -> Tensor:
    """The weight at a distance of x pixels of the coarser grid; Keys' cubic with a = -1/2."""
    x = x.abs()
    if mode == "bilinear":
        return (1 - x).clamp(min=0)
    return torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, torch.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0))


@lru_cache(maxsize=16)
def resize_map(size: int, new: int, mode: str) -> tuple[Tensor, Tensor]:
    """The matrix (new, size) in float64 that resizes one side, and which of its entries lie under the filter."""
    if size == new:
        return torch.eye(size, dtype=torch.float64), torch.eye(size, dtype=torch.bool)
    scale = size / new
    stretch = max(scale, 1.0)
    reach = SUPPORT[mode] * stretch
    center = ((torch.arange(new, dtype=torch.float64) + 0.5) * scale)[:, None]
    at = torch.arange(size, dtype=torch.float64)
    under = (at >= (center - reach + 0.5).floor()) & (at < (center + reach + 0.5).floor())
    weight = torch.where(under, _filter((at - center + 0.5) / stretch, mode), 0.0)
    return weight / weight.sum(1, keepdim=True), under


@lru_cache(maxsize=256)
def _taps(size: int, new: int, mode: str, back: bool) -> int:
    """Most entries under the filter in a row of the map, or of its transpose."""
    return int(resize_map(size, new, mode)[1].sum(0 if back else 1).max())


@lru_cache(maxsize=256)
def _table(size: int, new: int, mode: str, back: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each row of the map (or of its transpose) begins, int32, and its weights (taps, rows); 0 where it has ended."""
    weight, under = resize_map(size, new, mode)
    if back:
        weight, under = weight.T, under.T
    first = under.int().argmax(1)
    at = first + torch.arange(_taps(size, new, mode, back))[:, None]
    at_most = at.clamp(max=weight.shape[1] - 1)
    held = torch.where((at == at_most) & under.gather(1, at_most.T).T, weight.gather(1, at_most.T).T, 0.0)
    return first.to(device, torch.int32), held.to(device, dtype).contiguous()


# the kernels


@triton.jit
def _place(c, y, x, channels, rows, columns, PATCH: tl.constexpr, MERGE: tl.constexpr, FRAMES: tl.constexpr):
    """Where a pixel lies in a picture's patches, in the first of the frames; without a patch in the picture. The layout is known to the
    compiler, which turns its divisions into multiplications: this runs once per tap."""
    if PATCH:
        grid_y = y // PATCH
        grid_x = x // PATCH
        square = (grid_y // MERGE) * (columns // (PATCH * MERGE)) + grid_x // MERGE
        n = (square * MERGE + grid_y % MERGE) * MERGE + grid_x % MERGE
        place = ((n * channels + c) * FRAMES * PATCH + y % PATCH) * PATCH + x % PATCH
    else:
        place = (c * rows + y) * columns + x
    return place


@triton.jit
def _clamp(v):
    """To [-1, 1]; a NaN stays one."""
    v = tl.where(v < -1, -1.0, v)
    return tl.where(v > 1, 1.0, v)


@triton.jit
def _forward(
    pictures, mean, std, first_y, weight_y, first_x, weight_x, out, channels, rows, columns, taps_y, taps_x,
    x_b, x_c, x_h, x_w, PATCH: tl.constexpr, MERGE: tl.constexpr, FRAMES: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program per block of resized pixels of one channel of one picture."""
    i, c, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    pixel = i * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < rows * columns
    y = pixel // columns
    x = pixel % columns
    corner = tl.load(first_y + y, mask=inside, other=0).to(tl.int64) * x_h + tl.load(first_x + x, mask=inside, other=0).to(tl.int64) * x_w
    corner += b * x_b + c * x_c
    value = tl.zeros((BLOCK,), ACC)
    for k in range(0, taps_y):
        down = tl.load(weight_y + k * rows + y, mask=inside, other=0.0)
        line = tl.zeros((BLOCK,), ACC)
        place = corner  # moved by strides, whose multiples need not fit into 32 bits
        for j in range(0, taps_x):
            along = tl.load(weight_x + j * columns + x, mask=inside, other=0.0)
            read = (down != 0) & (along != 0)  # where both weights count, the pixel exists
            line += along * _clamp(tl.load(pictures + place, mask=read, other=0.0).to(ACC))
            place += x_w
        value += down * line
        corner += x_h
    value = ((_clamp(value) + 1) / 2 - tl.load(mean + c).to(ACC)) / tl.load(std + c).to(ACC)
    to = b * channels * FRAMES * rows * columns + _place(c, y, x, channels, rows, columns, PATCH, MERGE, FRAMES)
    for frame in tl.static_range(0, FRAMES):
        tl.store(out + to + frame * PATCH * PATCH, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, std, first_y, weight_y, first_x, weight_x, out, channels, height, width, rows, columns, taps_y, taps_x,
    PATCH: tl.constexpr, MERGE: tl.constexpr, FRAMES: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program per block of the picture's own pixels: gathers from the patches what depends on them."""
    i, c, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    pixel = i * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < height * width
    y = pixel // width
    x = pixel % width
    top = tl.load(first_y + y, mask=inside, other=0)
    left = tl.load(first_x + x, mask=inside, other=0)
    start = b * channels * FRAMES * rows * columns
    value = tl.zeros((BLOCK,), ACC)
    for k in range(0, taps_y):
        down = tl.load(weight_y + k * height + y, mask=inside, other=0.0)
        line = tl.zeros((BLOCK,), ACC)
        for j in range(0, taps_x):
            along = tl.load(weight_x + j * width + x, mask=inside, other=0.0)
            read = (down != 0) & (along != 0)
            at = start + _place(c, top + k, left + j, channels, rows, columns, PATCH, MERGE, FRAMES)
            for frame in tl.static_range(0, FRAMES):
                line += along * tl.load(grad + at + frame * PATCH * PATCH, mask=read, other=0.0).to(ACC)
        value += down * line
    value = value / (2 * tl.load(std + c).to(ACC))
    tl.store(out + (b * channels + c) * height * width + pixel, value.to(out.dtype.element_ty), mask=inside)


def _triton_serves(like: Tensor, height: int, width: int, rows: int, columns: int, mode: str) -> bool:
    most = max(_taps(size, new, mode, back) for size, new in ((height, rows), (width, columns)) for back in (False, True))
    countable = like.shape[1] <= MOST_SAMPLES and max(height * width, rows * columns) < 2**31 - BLOCK  # a grid's axis; int32
    return use_triton(like, most <= MOST_TAPS and countable, LIMIT)


@torch.library.custom_op("vlmedit::vlm_patches", mutates_args=())
def _op(pictures: Tensor, mean: Tensor, std: Tensor, rows: int, columns: int, patch: int, merge: int, frames: int, mode: str, dtype: torch.dtype) -> Tensor:
    """Patches (B, n, values); with patch 0 one patch, the picture."""
    batch, channels, height, width = pictures.shape
    patch_y, patch_x = (patch, patch) if patch else (rows, columns)
    out = pictures.new_empty(batch, rows * columns // (patch_y * patch_x), channels * frames * patch_y * patch_x, dtype=dtype)
    if not out.numel():
        return out
    if _triton_serves(pictures, height, width, rows, columns, mode):
        tables = [_table(size, new, mode, False, wide(pictures), pictures.device) for size, new in ((height, rows), (width, columns))]
        launch(
            _forward, (cdiv(rows * columns, BLOCK), channels, batch), pictures, pictures, mean.contiguous(), std.contiguous(), *tables[0], *tables[1], out, channels, rows, columns,
            *(len(weight) for _, weight in tables), *pictures.stride(), PATCH=patch, MERGE=merge, FRAMES=frames, BLOCK=BLOCK, ACC=accumulator(pictures), num_warps=4,
        )  # fmt: skip
        return out
    return out.copy_(vlm_patches_reference(pictures, mean, std, (rows, columns), patch or None, merge, frames, mode, dtype).reshape_as(out))


@_op.register_fake
def _(pictures, mean, std, rows, columns, patch, merge, frames, mode, dtype):
    size = patch * patch if patch else rows * columns
    return pictures.new_empty(pictures.shape[0], rows * columns // size, pictures.shape[1] * frames * size, dtype=dtype)


@torch.library.custom_op("vlmedit::vlm_patches_backward", mutates_args=())
def _op_backward(
    grad: Tensor, std: Tensor, height: int, width: int, rows: int, columns: int, patch: int, merge: int, frames: int, mode: str, dtype: torch.dtype
) -> Tensor:
    """Gradient of the pictures (B, C, H, W) in their dtype."""
    batch, channels = len(grad), len(std)
    out = grad.new_empty(batch, channels, height, width, dtype=dtype)
    if not out.numel():
        return out
    if _triton_serves(out, height, width, rows, columns, mode):
        tables = [_table(size, new, mode, True, wide(out), grad.device) for size, new in ((height, rows), (width, columns))]
        launch(
            _backward, (cdiv(height * width, BLOCK), channels, batch), out, grad.contiguous(), std.contiguous(), *tables[0], *tables[1], out, channels, height, width, rows, columns,
            *(len(weight) for _, weight in tables), PATCH=patch, MERGE=merge, FRAMES=frames, BLOCK=BLOCK, ACC=accumulator(out), num_warps=4,
        )  # fmt: skip
        return out
    patch_y, patch_x = (patch, patch) if patch else (rows, columns)
    grid = rows // patch_y // merge, columns // patch_x // merge, merge, merge, channels, frames, patch_y, patch_x
    picture = grad.to(wide(out)).reshape(batch, *grid).sum(6).permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(batch, channels, rows, columns)
    picture = picture / (2 * std.to(picture.dtype).view(-1, 1, 1))
    down, along = (resize_map(size, new, mode)[0].to(picture) for size, new in ((height, rows), (width, columns)))
    with exact(out):
        return out.copy_(down.T @ picture @ along)


@_op_backward.register_fake
def _(grad, std, height, width, rows, columns, patch, merge, frames, mode, dtype):
    return grad.new_empty(grad.shape[0], std.shape[0], height, width, dtype=dtype)


def _setup(ctx, inputs, output):
    pictures, _, std, *ctx.layout, _ = inputs
    ctx.size, ctx.dtype = pictures.shape[-2:], pictures.dtype
    ctx.save_for_backward(std)


def _gradients(ctx, grad):
    (std,) = ctx.saved_tensors
    return _op_backward(grad, std, *ctx.size, *ctx.layout, ctx.dtype), *(None,) * 9


_op.register_autograd(_gradients, setup_context=_setup)


def vlm_patches(
    pictures: Tensor, mean: Tensor, std: Tensor, size: tuple[int, int], patch: int | None = None, merge: int = 1, frames: int = 1,
    mode: str = "bicubic", dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """What a vision tower takes of pictures (B, C, H, W) in [-1, 1] resized to `size` (height, width), with a gradient of the pictures;
    layouts above. mean, std (C,) are the checkpoint's own, for pixels in [0, 1]; `dtype` of the result is the pictures' by default.
    Raises TypeError or ValueError for mixed devices, wrong dtypes or shapes, a size that the patches do not divide, or an unknown mode."""
    same_device("vlm_patches", pictures=pictures, mean=mean, std=std)
    same_kind("vlm_patches", pictures=pictures)
    same_kind("vlm_patches", mean=mean, std=std)
    if pictures.ndim != 4 or 0 in pictures.shape[1:]:
        raise ValueError(f"vlm_patches: pictures has shape {tuple(pictures.shape)}; it must be (batch, channels, height, width), the last three at least 1")
    for name, t in (("mean", mean), ("std", std)):
        shaped("vlm_patches", name, t, pictures.shape[1:2])
        if t.requires_grad:
            raise ValueError(f"vlm_patches: {name} requires a gradient, which a frozen judge has none of; detach it")
    if mode not in SUPPORT:
        raise ValueError(f"vlm_patches: unknown mode {mode!r}; known: {', '.join(SUPPORT)}")
    dtype = dtype or pictures.dtype
    if dtype not in DTYPES:
        raise TypeError(f"vlm_patches: dtype is {dtype}; it must be one of {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}")
    rows, columns = size
    if min(rows, columns, merge, frames, 1 if patch is None else patch) < 1:
        raise ValueError(f"vlm_patches: size {(rows, columns)}, patch {patch}, merge {merge} and frames {frames} must be at least 1")
    if patch is None and (merge, frames) != (1, 1):
        raise ValueError(f"vlm_patches: merge is {merge} and frames {frames} without a patch; give the patch's side")
    if patch is not None and (rows % (patch * merge) or columns % (patch * merge)):
        raise ValueError(f"vlm_patches: size {(rows, columns)} must be a multiple of patch x merge = {patch * merge} on both sides; choose the nearest such size")
    out = _op(pictures, mean, std, rows, columns, patch or 0, merge, frames, mode, dtype)
    return out.view(*pictures.shape[:2], rows, columns) if patch is None else out
