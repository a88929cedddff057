"""Pictures of the world's vocabulary drawn by three other programs: an image library (Pillow), a vector renderer
(CairoSVG) and a plotting library (Matplotlib), with those programs' own named colors, edges, stripes and file formats.

`draw_all(folder)` writes 72 of them and returns, for each, its path, an instruction, and the source scene and edit, so that
success can be judged. Deterministic. Nothing of the package's renderer is used.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import cairosvg
import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon
from matplotlib.patches import Rectangle as Bar
from PIL import Image, ImageColor, ImageDraw

from vlmedit.world.edits import Edit, sample_edit
from vlmedit.world.language import instruct
from vlmedit.world.scene import Look, Scene, Thing, sample_scene

KINDS = ("add", "remove", "replace", "recolor", "texture", "background", "move")
PROGRAMS = ("pillow", "cairosvg", "matplotlib")
COUNT = 72
RIM, PERIOD, DARK, ARM = 0.065, 0.125, 0.45, 0.36  # hollow rim and stripe period (of the side), dark stripe, cross's arm
# Ordinary named colors near the world's; within 0.2 per channel of it
CSS = {
    "red": ("red", "crimson"), "green": ("forestgreen", "seagreen"), "blue": ("royalblue",), "yellow": ("yellow", "gold"),
    "purple": ("darkorchid", "purple"), "cyan": ("darkturquoise", "mediumturquoise"),
    "white": ("white", "whitesmoke"), "grey": ("gray", "grey"), "black": ("black",), "beige": ("burlywood", "tan"),
}  # fmt: skip
PLOTTING = CSS | {
    "red": ("red", "tab:red"), "green": ("forestgreen", "tab:green"), "cyan": ("darkturquoise", "tab:cyan"), "purple": ("darkorchid", "xkcd:purple"),
}  # fmt: skip


@dataclass(frozen=True)
class Foreign:
    """One drawing, what is asked of it, and what it shows."""

    path: Path
    instruction: str
    scene: Scene
    edit: Edit
    program: str


@dataclass(frozen=True)
class Sheet:
    """What a program needs to know: the scene, the side in pixels, and the color names it draws with."""

    scene: Scene
    side: int
    names: dict[str, str]
    smooth: bool  # antialiased, where the program leaves the choice


def draw_scene(kind: str, rng: random.Random) -> tuple[Scene, Edit]:
    """A plain scene without nuisances and an edit of the given type that it allows."""
    while True:
        scene = replace(sample_scene(rng), style="plain", look=Look())
        scene = replace(scene, things=tuple(replace(t, tint=(0.0, 0.0, 0.0), shade=0.0) for t in scene.things))
        edit = sample_edit(scene, kind, rng)
        crowded = kind == "add" and len(scene.things) == 2 and max(t.size for t in scene.things) > 0.18
        if edit is not None and not crowded:
            return scene, edit


def outline(thing: Thing, inset: float = 0.0) -> list[tuple[float, float]] | float:
    """Corners (fractions of the side, inset inwards) of a polygon, or the radius of a circle."""
    x, y, r = thing.x, thing.y, thing.size
    if thing.shape == "circle":
        return r - inset
    if thing.shape == "square":
        s = 0.9 * r - inset
        return [(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]
    if thing.shape == "triangle":  # shrunk about its incenter
        inner = 2 * r / (1 + 5**0.5)
        k, middle = (inner - inset) / inner, y + r - inner
        return [(x + k * u, middle + k * (y + v - middle)) for u, v in ((0, -r), (r, r), (-r, r))]
    a, r = ARM * r - inset, r - inset
    steps = ((-a, -r), (a, -r), (a, -a), (r, -a), (r, a), (a, a), (a, r), (-a, r), (-a, a), (-r, a), (-r, -a), (-a, -a))
    return [(x + u, y + v) for u, v in steps]


def dark_bars(thing: Thing) -> Iterator[tuple[float, float]]:
    """Top and bottom of the dark stripes; a bright one is centered on the thing."""
    top = thing.y + PERIOD / 4
    while top > thing.y - thing.size - PERIOD:
        top -= PERIOD
    while top < thing.y + thing.size:
        yield top, top + PERIOD / 2
        top += PERIOD


def darker(rgb: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(round(255 * DARK * v) for v in rgb)


def by_pillow(sheet: Sheet) -> Image.Image:
    """ImageDraw: hard edges, or four times the size and scaled down."""
    scale = 4 if sheet.smooth else 1
    full = sheet.side * scale
    image = Image.new("RGB", (full, full), sheet.names[sheet.scene.background])

    def stamp(target: Image.Image, thing: Thing, fill, inset: float = 0.0) -> None:
        draw, shape = ImageDraw.Draw(target), outline(thing, inset)
        if isinstance(shape, float):
            draw.ellipse([(c + s * shape) * full for s in (-1, 1) for c in (thing.x, thing.y)], fill=fill)
        else:
            draw.polygon([(x * full, y * full) for x, y in shape], fill=fill)

    for thing in sheet.scene.things:
        name = sheet.names[thing.color]
        stamp(image, thing, name)
        if thing.texture == "hollow":
            stamp(image, thing, sheet.names[sheet.scene.background], RIM)
        if thing.texture == "striped":
            mask, bars = Image.new("L", image.size), Image.new("L", image.size)
            stamp(mask, thing, 255)
            for top, bottom in dark_bars(thing):
                ImageDraw.Draw(bars).rectangle((0, top * full, full, bottom * full - 1), fill=255)
            dark = Image.new("RGB", image.size, darker(tuple(v / 255 for v in ImageColor.getrgb(name))))
            image = Image.composite(dark, image, Image.composite(bars, Image.new("L", image.size), mask))
    return image.resize((sheet.side, sheet.side), Image.Resampling.LANCZOS) if scale > 1 else image


def by_cairosvg(sheet: Sheet) -> Image.Image:
    """SVG text in units of a hundredth of the side; a white background is left transparent."""
    parts = []
    if sheet.names[sheet.scene.background] != "white":
        parts.append(f'<rect width="100" height="100" fill="{sheet.names[sheet.scene.background]}"/>')

    def element(thing: Thing, inset: float, style: str) -> str:
        shape = outline(thing, inset)
        if isinstance(shape, float):
            return f'<circle cx="{100 * thing.x}" cy="{100 * thing.y}" r="{100 * shape}" {style}/>'
        return f'<polygon points="{" ".join(f"{100 * x},{100 * y}" for x, y in shape)}" {style}/>'

    for i, thing in enumerate(sheet.scene.things):
        name = sheet.names[thing.color]
        if thing.texture == "hollow":
            parts.append(element(thing, RIM / 2, f'fill="none" stroke="{name}" stroke-width="{100 * RIM}" stroke-linejoin="miter"'))
            continue
        parts.append(element(thing, 0, f'fill="{name}"'))
        if thing.texture == "striped":
            dark = "#%02x%02x%02x" % darker(tuple(v / 255 for v in ImageColor.getrgb(name)))
            bars = "".join(f'<rect x="0" y="{100 * t}" width="100" height="{100 * (b - t)}" fill="{dark}"/>' for t, b in dark_bars(thing))
            parts.append(f'<clipPath id="c{i}">{element(thing, 0, "")}</clipPath><g clip-path="url(#c{i})">{bars}</g>')
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">{"".join(parts)}</svg>'
    return Image.open(BytesIO(cairosvg.svg2png(svg.encode(), output_width=sheet.side, output_height=sheet.side)))


def by_matplotlib(sheet: Sheet) -> Image.Image:
    """Patches on axes that fill the figure."""
    figure = Figure(figsize=(sheet.side / 100, sheet.side / 100), dpi=100, facecolor=sheet.names[sheet.scene.background])
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(1, 0))
    axes.axis("off")

    def patch(thing: Thing, inset: float, **style):
        shape = outline(thing, inset)
        made = Circle((thing.x, thing.y), shape, **style) if isinstance(shape, float) else Polygon(shape, closed=True, **style)
        return axes.add_patch(made)

    for thing in sheet.scene.things:
        name = sheet.names[thing.color]
        if thing.texture == "hollow":
            patch(thing, RIM / 2, fill=False, edgecolor=name, linewidth=RIM * sheet.side * 0.72, joinstyle="miter")
            continue
        body = patch(thing, 0, facecolor=name, linewidth=0, antialiased=sheet.smooth)
        if thing.texture == "striped":
            for top, bottom in dark_bars(thing):
                bar = axes.add_patch(Bar((0, top), 1, bottom - top, facecolor=[v / 255 for v in darker(to_rgb(name))], linewidth=0))
                bar.set_clip_path(body)
    with matplotlib.rc_context({"path.simplify": False}):
        canvas.draw()
    return Image.frombytes("RGBA", canvas.get_width_height(), canvas.buffer_rgba().tobytes()).convert("RGB")


DRAW = {"pillow": by_pillow, "cairosvg": by_cairosvg, "matplotlib": by_matplotlib}


def trimmed(image: Image.Image, scene: Scene, rng: random.Random) -> Image.Image:
    """The picture without equal strips at top and bottom that hold nothing: wider than high."""
    slack = min(min(t.y - t.size, 1 - t.y - t.size) for t in scene.things) - 0.03
    rows = int(rng.uniform(0.3, 1.0) * max(0.0, min(slack, 0.2)) * image.height)
    return image.crop((0, rows, image.width, image.height - rows))


def save(image: Image.Image, path: Path, rng: random.Random) -> None:
    if path.suffix == ".png":
        image.save(path)
    elif path.suffix == ".jpg":
        flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
        flat.save(path, quality=rng.randrange(85, 96))
    else:
        image.save(path, quality=rng.randrange(85, 96), lossless=rng.random() < 0.5)


def draw_all(folder: str | Path) -> list[Foreign]:
    """Write the pictures into `folder` and return them: programs, edit types and file formats in turn."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for i in range(COUNT):
        rng = random.Random(f"foreign/{i}")
        kind, program, ending = KINDS[i % len(KINDS)], PROGRAMS[i % len(PROGRAMS)], (".png", ".jpg", ".webp")[i // 3 % 3]
        scene, edit = draw_scene(kind, rng)
        names = {ours: rng.choice(theirs) for ours, theirs in (PLOTTING if program == "matplotlib" else CSS).items()}
        image = DRAW[program](Sheet(scene, rng.randrange(100, 401), names, smooth=rng.random() < 0.6))
        if rng.random() < 0.25:
            image = trimmed(image, scene, rng)
        path = folder / f"{i:03d}-{program}-{kind}{ending}"
        save(image, path, rng)
        out.append(Foreign(path, instruct(edit, scene, rng), scene, edit, program))
    return out
