"""The shape world: what a picture can contain.

A `Scene` is a complete description of one picture: one to three `Thing`s that do not overlap, a background,
a style, and a `Look` (the nuisances: tints, shade, outline, gradient, noise) that no caption or instruction names.
Rendering it is `render.py`'s job, speaking about it `language.py`'s, changing it `edits.py`'s and reading
it back from pixels `oracle.py`'s.

Units: positions and sizes are fractions of the picture's side, origin top left, y downwards; colours are RGB in [0, 1].
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (0.88, 0.14, 0.14),
    "green": (0.14, 0.62, 0.24),
    "blue": (0.14, 0.28, 0.88),
    "yellow": (0.95, 0.84, 0.14),
    "purple": (0.58, 0.18, 0.68),
    "cyan": (0.14, 0.80, 0.85),
}
TEXTURES = ("solid", "striped", "hollow")
BACKGROUNDS = {
    "white": (0.95, 0.95, 0.95),
    "grey": (0.55, 0.55, 0.55),
    "black": (0.06, 0.06, 0.06),
    "beige": (0.88, 0.78, 0.58),
}
STYLES = ("plain", "pastel", "night")
GROUND_CLASSES = (len(SHAPES) + 1, len(COLORS) + 1, len(TEXTURES) + 1)  # of a patch of a picture, each with "nothing"
SIDES = {"left": (0.2, None), "right": (0.8, None), "top": (None, 0.2), "bottom": (None, 0.8)}

MARGIN = 0.045  # free border around every thing; the oracle reads the background there
GAP = 0.05  # free space between two things
SIZE_RANGE = {1: (0.16, 0.26), 2: (0.14, 0.22), 3: (0.13, 0.18)}  # half-extent by number of things
COLOR_JITTER = 0.07
BACKGROUND_JITTER = 0.03


@dataclass(frozen=True)
class Thing:
    """One object. `size` is half its height; `tint` (RGB offset) and `shade` (slope over the object) are nuisances."""

    shape: str
    color: str
    texture: str = "solid"
    x: float = 0.5
    y: float = 0.5
    size: float = 0.2
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)
    shade: float = 0.0

    def overlaps(self, other: Thing) -> bool:
        """Whether the bounding boxes, widened by `GAP`, intersect."""
        reach = self.size + other.size + GAP
        return abs(self.x - other.x) < reach and abs(self.y - other.y) < reach

    def inside(self) -> bool:
        """Whether the whole thing lies within the picture's margin."""
        low = MARGIN + self.size
        return low <= self.x <= 1 - low and low <= self.y <= 1 - low


@dataclass(frozen=True)
class Look:
    """Scene-wide nuisances: what real pictures vary in and no instruction speaks about."""

    background_tint: tuple[float, float, float] = (0.0, 0.0, 0.0)
    gradient: tuple[float, float] = (0.0, 0.0)  # brightness slope of the background along x and y
    softness: float = 1.0  # width of the edge ramp, in 1/32 of the picture's side
    outline: float = 0.0  # darkness of a thin rim around each thing, 0 to 1
    noise: float = 0.0  # standard deviation of pixel noise
    seed: int = 0  # of that noise


@dataclass(frozen=True)
class Scene:
    """One picture of the world: everything needed to draw it again, exactly."""

    things: tuple[Thing, ...]
    background: str = "white"
    style: str = "plain"
    look: Look = field(default_factory=Look)

    def find(self, shape: str) -> int:
        """Index of the thing with this shape (shapes are unique within a scene). Raises LookupError if absent."""
        for i, thing in enumerate(self.things):
            if thing.shape == shape:
                return i
        raise LookupError(f"no {shape} in this scene; it holds {', '.join(t.shape for t in self.things)}")

    def with_thing(self, index: int, **changes) -> Scene:
        """A copy with some fields of one thing changed."""
        things = list(self.things)
        things[index] = replace(things[index], **changes)
        return replace(self, things=tuple(things))


def _jitter(rng: random.Random, scale: float) -> tuple[float, float, float]:
    return tuple(rng.uniform(-scale, scale) for _ in range(3))


def sample_look(rng: random.Random) -> Look:
    """Draw nuisances; each is absent more often than not, so clean drawings are common too."""
    slope = (lambda: rng.uniform(-0.06, 0.06)) if rng.random() < 0.3 else (lambda: 0.0)
    return Look(
        background_tint=_jitter(rng, BACKGROUND_JITTER),
        gradient=(slope(), slope()),
        softness=rng.uniform(0.7, 1.5),
        outline=rng.uniform(0.2, 0.5) if rng.random() < 0.15 else 0.0,
        noise=rng.uniform(0.0, 0.02) if rng.random() < 0.3 else 0.0,
        seed=rng.randrange(2**31),
    )


def can_wear(shape: str, texture: str) -> bool:
    """Whether a texture shows on a shape: a cross's arms are too thin to be hollow."""
    return not (shape == "cross" and texture == "hollow")


def sample_texture(rng: random.Random, shape: str) -> str:
    """Solid three times in five, otherwise striped or, where it shows, hollow."""
    texture = rng.choices(TEXTURES, (0.6, 0.2, 0.2))[0]
    return texture if can_wear(shape, texture) else "solid"


def place(rng: random.Random, others: tuple[Thing, ...], size: float, tries: int = 60) -> tuple[float, float] | None:
    """A free position for a thing of this size among `others`, or None when none was found."""
    low = MARGIN + size
    for _ in range(tries):
        x, y = rng.uniform(low, 1 - low), rng.uniform(low, 1 - low)
        probe = Thing("circle", "red", x=x, y=y, size=size)
        if not any(probe.overlaps(o) for o in others):
            return x, y
    return None


def new_thing(rng: random.Random, shape: str, color: str, texture: str, others: tuple[Thing, ...], count: int) -> Thing | None:
    """A thing with fresh nuisances at a free place, sized for a scene of `count` things; None if there is no room."""
    size = rng.uniform(*SIZE_RANGE[count])
    where = place(rng, others, size)
    if where is None:
        return None
    shade = rng.uniform(-0.15, 0.15) if rng.random() < 0.3 else 0.0
    return Thing(shape, color, texture, *where, size, _jitter(rng, COLOR_JITTER), shade)


def sample_scene(rng: random.Random, count: int | None = None) -> Scene:
    """Draw a random scene of `count` (default one to three) things with distinct shapes."""
    while True:
        n = count or rng.choices((1, 2, 3), (0.3, 0.45, 0.25))[0]
        things: tuple[Thing, ...] = ()
        for shape in rng.sample(SHAPES, n):
            thing = new_thing(rng, shape, rng.choice(tuple(COLORS)), sample_texture(rng, shape), things, n)
            if thing is None:
                break
            things += (thing,)
        if len(things) == n:
            style = rng.choices(STYLES, (0.8, 0.1, 0.1))[0]
            return Scene(things, rng.choice(tuple(BACKGROUNDS)), style, sample_look(rng))
