"""Draw scenes: a batched renderer by signed distance.

`render(scenes, side)` -> float tensor (B, 3, side, side) in [-1, 1], the range every model of the suite works in.
A pixel's coverage by a shape is a linear ramp of its signed distance to the shape's edge, `look.softness`
thirty-seconds of the side wide, so a scene looks the same at every resolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmedit.world.scene import BACKGROUNDS, COLORS, SHAPES, STYLES, TEXTURES, Scene

STRIPE_PERIOD = 0.125  # of the side: four pixels at 32
STRIPE_TONE = 0.45  # brightness of the dark stripes
HOLLOW_RIM = 0.065  # thickness of a hollow thing's rim: two pixels at 32
CROSS_ARM = 0.36  # half-width of the cross's arms, in units of its size
PASTEL_MIX = 0.5
NIGHT_GAIN, NIGHT_TINT = 0.5, (0.0, 0.0, 0.10)


def signed_distance(dx: Tensor, dy: Tensor, size: Tensor, shape: Tensor) -> Tensor:
    """Signed distance to the edge of a shape, negative inside.

    dx, dy: offsets from the centre, (..., H, W) fractions of the side; size, shape: broadcastable to them.
    """
    r = size
    circle = torch.hypot(dx, dy) - r
    s = r * 0.9
    square = torch.maximum(dx.abs(), dy.abs()) - s
    # isosceles triangle: apex up, base down, as high as wide
    slope = torch.tensor(0.5).atan()
    side = dx.abs() * slope.cos() - (dy + r) * slope.sin()
    triangle = torch.maximum(side, dy - r)
    a = r * CROSS_ARM
    tall = torch.maximum(dx.abs() - a, dy.abs() - r)
    wide = torch.maximum(dx.abs() - r, dy.abs() - a)
    cross = torch.minimum(tall, wide)
    out = circle
    for index, distance in enumerate((circle, square, triangle, cross)):
        out = torch.where(shape == index, distance, out)
    return out


def pixel_grid(side: int, device=None) -> tuple[Tensor, Tensor]:
    """Pixel-centre coordinates (x, y), each (side, side), as fractions of the side."""
    axis = (torch.arange(side, device=device) + 0.5) / side
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def paint(dx: Tensor, dy: Tensor, size: Tensor, shape: Tensor, texture: Tensor, softness: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage in [0, 1] and tone (brightness factor of the texture) of a thing at every pixel."""
    ramp = softness / 32
    distance = signed_distance(dx, dy, size, shape)
    cover = (0.5 - distance / ramp).clamp(0, 1)
    hole = (0.5 - (distance + HOLLOW_RIM) / ramp).clamp(0, 1)
    cover = torch.where(texture == TEXTURES.index("hollow"), cover - hole, cover)
    phase = (dy / STRIPE_PERIOD + 0.25) % 1.0  # bright stripe centred on the thing
    soft = ramp / STRIPE_PERIOD
    bright = ((0.25 - (phase - 0.25).abs()) / soft + 0.5).clamp(0, 1)
    # the ramp also has to close the seam at phase 1 -> 0
    bright = torch.maximum(bright, ((phase - 1.0) / soft + 0.5).clamp(0, 1))
    tone = torch.where(texture == TEXTURES.index("striped"), STRIPE_TONE + (1 - STRIPE_TONE) * bright, torch.ones_like(cover))
    return cover, tone


def apply_style(rgb: Tensor, style: Tensor) -> Tensor:
    """Map plain colours (..., 3, H, W) in [0, 1] to a style; `style` is an index broadcastable over the picture."""
    pastel = PASTEL_MIX * rgb + (1 - PASTEL_MIX)
    tint = torch.tensor(NIGHT_TINT, device=rgb.device).view(3, 1, 1)
    night = NIGHT_GAIN * rgb + tint
    out = torch.where(style == STYLES.index("pastel"), pastel, rgb)
    return torch.where(style == STYLES.index("night"), night, out)


def render(scenes: Sequence[Scene], side: int = 32, device=None) -> Tensor:
    """Draw scenes as a float tensor (B, 3, side, side) in [-1, 1]. Deterministic, noise included."""
    batch, slots = len(scenes), max(1, max((len(s.things) for s in scenes), default=1))
    table = torch.zeros(batch, slots, 11)
    table[..., 4] = 0.1  # a harmless size where a slot is empty
    for b, scene in enumerate(scenes):
        for i, t in enumerate(scene.things):
            color = COLORS[t.color]
            table[b, i] = torch.tensor(
                (1.0, SHAPES.index(t.shape), t.x, t.y, t.size, TEXTURES.index(t.texture), *(c + d for c, d in zip(color, t.tint)), t.shade, 0.0)
            )
    table = table.to(device)
    here, shape, tx, ty, size, texture, red, green, blue, shade, _ = (table[..., i, None, None] for i in range(11))
    looks = [s.look for s in scenes]

    def per_scene(values) -> Tensor:
        return torch.tensor(list(values), device=device, dtype=torch.float32).view(batch, -1, 1, 1)

    x, y = pixel_grid(side, device)
    base = per_scene([c + d for c, d in zip(BACKGROUNDS[s.background], s.look.background_tint)] for s in scenes)
    slope = per_scene(k.gradient for k in looks)
    canvas = base + slope[:, :1] * (x - 0.5) + slope[:, 1:] * (y - 0.5)
    softness = per_scene([k.softness] for k in looks)
    rim = per_scene([k.outline] for k in looks)

    dx, dy = x - tx, y - ty
    cover, tone = paint(dx, dy, size, shape, texture, softness)
    cover = cover * here
    tone = tone * (1 + shade * (dx + dy) / size)
    inner = (0.5 - (signed_distance(dx, dy, size, shape) + 1 / 32) * 32 / softness).clamp(0, 1)
    tone = tone * (1 - rim * (1 - inner))
    for i in range(slots):
        ink = torch.cat((red[:, i], green[:, i], blue[:, i]), 1)
        color = (ink.view(batch, 3, 1, 1) * tone[:, i, None]).clamp(0, 1)
        canvas = canvas + cover[:, i, None] * (color - canvas)
    style = torch.tensor([STYLES.index(s.style) for s in scenes], device=device).view(batch, 1, 1, 1)
    canvas = apply_style(canvas.clamp(0, 1), style)
    for b, k in enumerate(looks):
        if k.noise:
            noise = torch.randn(3, side, side, generator=torch.Generator().manual_seed(k.seed))
            canvas[b] += k.noise * noise.to(canvas)
    return canvas.clamp(0, 1) * 2 - 1
