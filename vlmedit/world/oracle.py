"""The oracle: reads a picture back into a scene, exactly, and so knows whether an edit was made.

`parse(images)` finds background and things and fits each by analysis through synthesis: every shape and texture on a grid of
positions and sizes, the colour in closed form by least squares, the best fit wins. `judge_edit` then asks `verdict.py`
whether the edit was done and the rest kept. It knows nothing of any model.

For evaluation, checks and tests only: no trainer may import it, and a test on the import graph says so.
Shapes: images (B, 3, S, S) in [-1, 1]; PSNR in dB, of pictures in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from vlmedit.world.edits import Edit
from vlmedit.world.render import NIGHT_GAIN, NIGHT_TINT, PASTEL_MIX, STRIPE_TONE, paint, pixel_grid, render
from vlmedit.world.scene import (
    BACKGROUND_JITTER,
    BACKGROUNDS,
    COLOR_JITTER,
    COLORS,
    SHAPES,
    SIZE_RANGE,
    STYLES,
    TEXTURES,
    Look,
    Scene,
    Thing,
    can_wear,
)
from vlmedit.world.verdict import edit_done, rest_kept

CONTRAST = 0.10  # least colour distance from the background that counts as ink
LEAST_AREA = 0.006  # of the picture: six pixels at 32
MANIFOLD_PSNR = 20.0  # dB to the nearest valid render, below which a picture is off the manifold
PALETTE = torch.tensor(list(COLORS.values()))
GROUNDS = torch.tensor(list(BACKGROUNDS.values()))


@dataclass(frozen=True)
class Reading:
    """What the oracle saw: the nearest valid scene, and how near its render is."""

    scene: Scene
    manifold_psnr: float

    @property
    def on_manifold(self) -> bool:
        return self.manifold_psnr >= MANIFOLD_PSNR


@dataclass(frozen=True)
class Verdict:
    """`done`: the edit is there. `kept`: nothing else changed. `success`: both."""

    done: bool
    kept: bool
    on_manifold: bool

    @property
    def success(self) -> bool:
        return self.done and self.kept


def psnr(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio per sample of pictures in [-1, 1], optionally over a weight mask (B, 1, S, S)."""
    error = ((a - b) / 2).square()
    if weight is None:
        mse = error.flatten(1).mean(1)
    else:
        mse = (error * weight).flatten(1).sum(1) / (3 * weight.flatten(1).sum(1)).clamp(min=1)
    return -10 * mse.clamp(min=1e-6).log10()


def unstyle(rgb: Tensor, style: str) -> Tensor:
    """The plain colours of a styled picture (..., 3, H, W), the inverse of `render.apply_style`."""
    if style == "pastel":
        return (rgb - (1 - PASTEL_MIX)) / PASTEL_MIX
    if style == "night":
        return (rgb - torch.tensor(NIGHT_TINT).view(3, 1, 1)) / NIGHT_GAIN
    return rgb


def _ground_plane(rgb: Tensor) -> tuple[Tensor, float]:
    """Background (3, S, S) as a plane through the border ring, robust to things that touch it; and its noise."""
    side = rgb.shape[-1]
    x, y = pixel_grid(side)
    ring = torch.zeros(side, side, dtype=torch.bool)
    ring[0], ring[-1], ring[:, 0], ring[:, -1] = True, True, True, True
    basis = torch.stack((torch.ones_like(x), x - 0.5, y - 0.5), -1)
    a, p = basis[ring], rgb[:, ring].T
    keep = (p - p.median(0).values).norm(dim=1) < 0.2
    if keep.sum() < side:
        keep[:] = True
    fit = torch.linalg.lstsq(a[keep], p[keep]).solution
    noise = float((a[keep] @ fit - p[keep]).square().mean().sqrt())
    return (basis @ fit).permute(2, 0, 1), noise


def _boxes(mask: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Bounding boxes (top, bottom, left, right) of the ink; overlapping boxes are one thing (things never overlap)."""
    labels, _ = ndimage.label(mask)
    boxes = [(s[0].start, s[0].stop, s[1].start, s[1].stop) for s in ndimage.find_objects(labels)]
    merged = True
    while merged:
        merged = False
        for i in range(len(boxes)):
            for j in range(i + 1, len(boxes)):
                a, b = boxes[i], boxes[j]
                if min(a[1], b[1]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[2], b[2]) > 1:
                    boxes[i] = (min(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), max(a[3], b[3]))
                    del boxes[j]
                    merged = True
                    break
            if merged:
                break
    return [b for b in boxes if mask[b[0] : b[1], b[2] : b[3]].sum() >= LEAST_AREA * mask.size]


def _style_of(rgb: Tensor, ground: Tensor, mask: Tensor, boxes) -> str:
    """The style under which background and inks lie nearest to the palette."""
    costs = []
    for style in STYLES:
        plain, base = unstyle(rgb, style), unstyle(ground, style)
        gain = {"plain": 1.0, "pastel": PASTEL_MIX, "night": NIGHT_GAIN}[style]  # distances in what the eye sees
        cost = float((base.mean((1, 2)) - GROUNDS).norm(dim=1).min()) * gain
        for top, bottom, left, right in boxes:
            inside = slice(top, bottom), slice(left, right)
            contrast = (plain - base)[:, *inside].norm(dim=0)[mask[inside]]
            ink = plain[:, *inside][:, mask[inside]].T[contrast >= contrast.median()]  # (n, 3): its core, not its soft edge
            tones = torch.stack((PALETTE, PALETTE * STRIPE_TONE), 1)  # (6, 2, 3)
            near = (ink[:, None, None] - tones).norm(dim=-1).amin(2)  # (n, 6)
            cost += float(near.median(0).values.min()) * gain
        costs.append(cost)
    return STYLES[int(np.argmin(costs))]


@dataclass
class _Fit:
    cost: Tensor  # (N,)
    x: Tensor
    y: Tensor
    size: Tensor
    shape: Tensor
    texture: Tensor
    color: Tensor  # (N, 3)


def _fit(windows: Tensor, grounds: Tensor, gx: Tensor, gy: Tensor, x: Tensor, y: Tensor, size: Tensor, shape: Tensor, texture: Tensor) -> tuple[Tensor, Tensor]:
    """Residual (N, H) and colour (N, H, 3) of H hypotheses for N windows (N, 3, P) on pixel coordinates (N, P)."""
    e = lambda v: v[..., None]
    cover, tone = paint(gx[:, None] - e(x), gy[:, None] - e(y), e(size), e(shape), e(texture), torch.tensor(1.1))
    rest = windows[:, None] - grounds[:, None] * (1 - cover[:, :, None])  # (N, H, 3, P)
    ink = (cover * tone)[:, :, None]
    color = (rest * ink).sum(-1) / ink.square().sum(-1).clamp(min=1e-4)
    color = color.clamp(-0.1, 1.1)
    residual = (rest - ink * color[..., None]).square().sum((-1, -2))
    return residual, color


def _fit_things(windows: Tensor, grounds: Tensor, gx: Tensor, gy: Tensor, boxes: Tensor, side: int) -> _Fit:
    """Best shape, texture, place, size and colour for each of N boxes (N, 4) in fractions of the side."""
    n, px = len(boxes), 1 / 32
    top, bottom, left, right = boxes.unbind(1)
    half = torch.maximum(bottom - top, right - left) / 2
    cx, cy = (left + right) / 2, (top + bottom) / 2
    wearable = [(i, j) for i, s in enumerate(SHAPES) for j, t in enumerate(TEXTURES) if can_wear(s, t)]
    kinds = torch.tensor(wearable).expand(n, -1, -1)  # (N, K, 2): shape and texture of each hypothesis
    x, y, size = (v[:, None].repeat(1, len(wearable)) for v in (cx, cy, half))
    size = torch.where(kinds[..., 0] == SHAPES.index("square"), size / 0.9, size)
    low, high = SIZE_RANGE[3][0] * 0.75, SIZE_RANGE[1][1] * 1.2
    shifts = torch.tensor([(0.0, 0.0), (0.6, 0.0), (-0.6, 0.0), (0.0, 0.6), (0.0, -0.6)])
    for scale in (1.0, 0.5, 0.25):
        if scale < 1:
            shifts = torch.cartesian_prod(torch.tensor([-0.8, 0.0, 0.8]), torch.tensor([-0.8, 0.0, 0.8]))
        grows = torch.tensor([-1.2, -0.6, 0.0, 0.6] if scale == 1 else [-0.7, 0.0, 0.7])
        offsets = torch.cat([torch.cat((shifts, torch.full((len(shifts), 1), float(g))), 1) for g in grows]) * px * scale
        m = len(offsets)
        spread = lambda v, o: (v[:, :, None] + o).flatten(1)
        xs, ys, ss = spread(x, offsets[:, 0]), spread(y, offsets[:, 1]), spread(size, offsets[:, 2]).clamp(low, high)
        kind = kinds.repeat_interleave(m, 1)
        parts = []
        for i in range(0, n, 16):
            j = slice(i, i + 16)
            parts.append(_fit(windows[j], grounds[j], gx[j], gy[j], xs[j], ys[j], ss[j], kind[j, :, 0], kind[j, :, 1]))
        cost, color = (torch.cat(p).unflatten(1, (-1, m)) for p in zip(*parts))
        pick = cost.argmin(2, keepdim=True)
        take = lambda v: v.unflatten(1, (-1, m)).gather(2, pick).squeeze(2)
        x, y, size = take(xs), take(ys), take(ss)
        cost, color = cost.gather(2, pick).squeeze(2), color.gather(2, pick[..., None].expand(-1, -1, -1, 3)).squeeze(2)
        best = cost.topk(min(4, cost.shape[1]), largest=False).indices  # go on with the best four kinds
        x, y, size, cost = (v.gather(1, best) for v in (x, y, size, cost))
        kinds, color = kinds.gather(1, best[..., None].expand(-1, -1, 2)), color.gather(1, best[..., None].expand(-1, -1, 3))
    return _Fit(cost[:, 0], x[:, 0], y[:, 0], size[:, 0], kinds[:, 0, 0], kinds[:, 0, 1], color[:, 0])


def _nearest_look(images: Tensor, scenes: list[Scene]) -> list[Scene]:
    """Choose softness, outline and shade, one after the other, for the render nearest to each image."""

    def shaded(scene: Scene, shade: float) -> Scene:
        return replace(scene, things=tuple(replace(t, shade=shade) for t in scene.things))

    options = (
        [lambda s, v=v: replace(s, look=replace(s.look, softness=v)) for v in (0.8, 1.4)],
        [lambda s, v=v: replace(s, look=replace(s.look, outline=v)) for v in (0.35,)],
        [lambda s, v=v: shaded(s, v) for v in (-0.1, 0.1)],
    )
    side = images.shape[-1]
    score = psnr(images, render(scenes, side))
    for group in options:
        start = scenes
        for change in group:
            trial = [change(s) for s in start]
            new = psnr(images, render(trial, side))
            better = new > score
            scenes = [t if b else s for s, t, b in zip(scenes, trial, better)]
            score = torch.maximum(score, new)
    return scenes


@torch.no_grad()
def parse(images: Tensor) -> list[Reading]:
    """Read pictures (B, 3, S, S) in [-1, 1]. Raises ValueError for another shape."""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"the oracle reads (B, 3, S, S) pictures, got {tuple(images.shape)}")
    images = images.detach().float().cpu().clamp(-1, 1)
    rgb = (images + 1) / 2
    side = images.shape[-1]
    window = int(0.65 * side)
    styles, planes, owners, boxes = [], [], [], []
    windows, grounds, gxs, gys = [], [], [], []
    for b, picture in enumerate(rgb):
        ground, noise = _ground_plane(picture)
        mask = (picture - ground).norm(dim=0) > CONTRAST + 2 * noise
        found = _boxes(mask.numpy())[:6]
        style = _style_of(picture, ground, mask, found)
        plain, base = unstyle(picture, style), unstyle(ground, style)
        styles.append(style)
        planes.append(base)
        x, y = pixel_grid(side)
        for box in found:
            r0 = min(max((box[0] + box[1] - window) // 2, 0), side - window)
            c0 = min(max((box[2] + box[3] - window) // 2, 0), side - window)
            rows, cols = slice(r0, r0 + window), slice(c0, c0 + window)
            # other things in the window are painted over with background
            alone = plain.clone()
            for other in found:
                if other is not box:
                    r, c = slice(max(other[0] - 1, 0), other[1] + 1), slice(max(other[2] - 1, 0), other[3] + 1)
                    alone[:, r, c] = base[:, r, c]
            windows.append(alone[:, rows, cols].flatten(1))
            grounds.append(base[:, rows, cols].flatten(1))
            gxs.append(x[rows, cols].flatten())
            gys.append(y[rows, cols].flatten())
            boxes.append([v / side for v in box])
            owners.append(b)
    things: list[list[Thing]] = [[] for _ in rgb]
    if boxes:
        fit = _fit_things(torch.stack(windows), torch.stack(grounds), torch.stack(gxs), torch.stack(gys), torch.tensor(boxes), side)
        for i, b in enumerate(owners):
            k = int((fit.color[i] - PALETTE).norm(dim=1).argmin())
            tint = (fit.color[i] - PALETTE[k]).clamp(-COLOR_JITTER, COLOR_JITTER).tolist()
            things[b].append(Thing(SHAPES[fit.shape[i]], tuple(COLORS)[k], TEXTURES[fit.texture[i]], float(fit.x[i]), float(fit.y[i]), float(fit.size[i]), tuple(tint)))
    scenes = []
    for b, plane in enumerate(planes):
        center = plane.mean((1, 2))
        k = int((center - GROUNDS).norm(dim=1).argmin())
        tint = (center - GROUNDS[k]).clamp(-BACKGROUND_JITTER, BACKGROUND_JITTER).tolist()
        slope = [float(plane.mean(0)[:, -1].mean() - plane.mean(0)[:, 0].mean()), float(plane.mean(0)[-1].mean() - plane.mean(0)[0].mean())]
        look = Look(tuple(tint), tuple(min(max(s, -0.06), 0.06) for s in slope))
        scenes.append(Scene(tuple(things[b]), tuple(BACKGROUNDS)[k], styles[b], look))
    scenes = _nearest_look(images, scenes)
    scores = psnr(images, render(scenes, side))
    return [Reading(s, float(p)) for s, p in zip(scenes, scores)]


def judge_edit(before: Scene, after: Reading, edit: Edit) -> Verdict:
    """The oracle's verdict on an edited picture, given the scene of the reference."""
    return Verdict(edit_done(before, after.scene, edit), rest_kept(before, after.scene, edit), after.on_manifold)


def keep_mask(before: Scene, after: Scene, edit: Edit, side: int) -> Tensor:
    """Weight (1, S, S): 1 where an edit has no business, 0 on the old and the new thing it is about.
    Background and style edits change every pixel; their mask is 1 on the things for a background edit, else 0."""
    x, y = pixel_grid(side)

    def box(thing: Thing) -> Tensor:
        reach = thing.size + 1.5 / 32
        return ((x - thing.x).abs() <= reach) & ((y - thing.y).abs() <= reach)

    if edit.type in ("style", "customise"):
        return torch.zeros(1, side, side)
    if edit.type == "background":  # the things' insides, clear of their edges
        keep = torch.zeros(side, side, dtype=torch.bool)
        for t in before.things:
            cover, _ = paint(x - t.x, y - t.y, torch.tensor(t.size), torch.tensor(SHAPES.index(t.shape)), torch.tensor(TEXTURES.index(t.texture)), torch.tensor(before.look.softness))
            keep |= cover >= 1
        return keep[None].float()
    keep = torch.ones(side, side, dtype=torch.bool)
    touched = {edit.shape, edit.new_shape}
    for t in (*before.things, *after.things):
        if t.shape in touched:
            keep &= ~box(t)
    return keep[None].float()
