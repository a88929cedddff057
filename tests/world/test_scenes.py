"""The world: scenes obey their own rules, and the renderer draws what geometry says."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.path import Path as Outline

from vlmedit.world.render import (
    CROSS_ARM,
    HOLLOW_RIM,
    NIGHT_GAIN,
    NIGHT_TINT,
    PASTEL_MIX,
    STRIPE_TONE,
    apply_style,
    paint,
    pixel_grid,
    render,
    signed_distance,
)
from vlmedit.world.scene import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZE_RANGE,
    STYLES,
    TEXTURES,
    Look,
    Scene,
    Thing,
    sample_scene,
)

SEEDS = st.integers(0, 2**40)


def scenes(n: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng) for _ in range(n)]


def clean(scene: Scene) -> Scene:
    """The scene without pixel noise."""
    return replace(scene, look=replace(scene.look, noise=0.0))


# --- scenes


def test_sampled_scenes_obey_the_world():
    """Of 5000 sampled scenes every thing is inside the margin, no two overlap, shapes are distinct, sizes are in range."""
    for scene in scenes(5000):
        things = scene.things
        assert 1 <= len(things) <= 3
        assert len({t.shape for t in things}) == len(things)
        low, high = SIZE_RANGE[len(things)]
        for i, thing in enumerate(things):
            assert thing.inside() and low <= thing.size <= high
            assert thing.shape in SHAPES and thing.color in COLORS and thing.texture in TEXTURES
            assert not any(thing.overlaps(o) for o in things[i + 1 :])
        assert scene.background in BACKGROUNDS and scene.style in STYLES


@given(SEEDS)
def test_sampling_depends_on_the_generator_alone(seed):
    """The same generator state gives the same scene."""
    assert sample_scene(random.Random(seed)) == sample_scene(random.Random(seed))


def test_every_value_of_every_attribute_occurs():
    """No shape, color, texture, background or style is left out of 2000 scenes, and each count occurs."""
    drawn = scenes(2000)
    things = [t for s in drawn for t in s.things]
    assert {t.shape for t in things} == set(SHAPES)
    assert {t.color for t in things} == set(COLORS)
    assert {t.texture for t in things} == set(TEXTURES)
    assert {s.background for s in drawn} == set(BACKGROUNDS)
    assert {s.style for s in drawn} == set(STYLES)
    assert {len(s.things) for s in drawn} == {1, 2, 3}


def test_overlap_is_symmetric_and_sees_bounding_boxes():
    """`overlaps` against drawn boxes: symmetric, true for touching things, false once the gap is free."""
    a = Thing("circle", "red", x=0.3, y=0.3, size=0.1)
    near, far = replace(a, x=0.3 + 0.2 + 0.049), replace(a, x=0.3 + 0.2 + 0.051)
    assert a.overlaps(near) and near.overlaps(a)
    assert not a.overlaps(far) and not far.overlaps(a)


def test_find_names_what_there_is():
    """`find` gives the index, and its error names the missing shape and the shapes that are there."""
    scene = Scene((Thing("circle", "red"), Thing("cross", "blue")))
    assert scene.find("cross") == 1
    with pytest.raises(LookupError, match="no square in this scene; it holds circle, cross"):
        scene.find("square")


def test_with_thing_changes_one_field_of_one_thing():
    """A copy differs in the named field alone, and the original stays."""
    scene = scenes(1, 5)[0]
    other = scene.with_thing(0, color="cyan")
    assert other.things[0] == replace(scene.things[0], color="cyan")
    assert other.things[1:] == scene.things[1:] and replace(other, things=scene.things) == scene


# --- renderer


def test_rendering_is_deterministic_and_in_range():
    """Two renders are equal bit for bit, noise included, lie in [-1, 1] and use the global generator not at all."""
    drawn = scenes(64)
    assert any(s.look.noise for s in drawn)
    before = torch.get_rng_state()
    first = render(drawn)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, render(drawn))
    assert first.shape == (64, 3, 32, 32) and first.min() >= -1 and first.max() <= 1


def test_a_picture_does_not_depend_on_its_batch():
    """Rendering alone, in another order or beside scenes with more things gives the same pixels, exactly."""
    drawn = scenes(24, 1)
    together = render(drawn)
    for i, scene in enumerate(drawn):
        assert torch.equal(render([scene])[0], together[i])
    assert torch.equal(render(drawn[::-1]).flip(0), together)


def test_a_scene_looks_the_same_at_every_resolution():
    """A 64-pixel render averaged down is the 32-pixel render: mean error below 0.02 of a range of 2
    in every picture and below 0.005 in half of them, far less than a shift by one pixel makes."""
    drawn = [clean(s) for s in scenes(64, 2)]
    error = (F.avg_pool2d(render(drawn, 64), 2) - render(drawn, 32)).abs().mean((1, 2, 3))
    assert error.max() < 0.02 and error.median() < 0.005
    shifted = F.avg_pool2d(render([s.with_thing(0, x=s.things[0].x + 1 / 32) for s in drawn], 64), 2) - render(drawn, 32)
    assert shifted.abs().mean((1, 2, 3)).median() > 0.012


def test_noise_has_its_deviation_and_its_seed():
    """Pixel noise: its sample deviation is `look.noise` within 5 %, another seed gives other noise, no noise gives none."""
    base = Scene((Thing("circle", "red"),), "grey")
    noisy = [replace(base, look=Look(noise=0.02, seed=s)) for s in (1, 1, 2)]
    one, same, other = render(noisy) - render([base])
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.std().item() == pytest.approx(2 * 0.02, rel=0.05)  # twice, as pictures span [-1, 1]


def test_flat_places_have_their_named_colors():
    """Background corner and thing centre show the named colors plus their tints, exactly to 1e-6."""
    for color, rgb in COLORS.items():
        for ground, back in BACKGROUNDS.items():
            thing = Thing("circle", color, tint=(0.01, -0.02, 0.03))
            image = (render([Scene((thing,), ground, look=Look(background_tint=(0.01, 0.0, -0.01)))])[0] + 1) / 2
            torch.testing.assert_close(image[:, 0, 0], torch.tensor(back) + torch.tensor((0.01, 0.0, -0.01)), atol=1e-6, rtol=0)
            torch.testing.assert_close(image[:, 16, 16], torch.tensor(rgb) + torch.tensor(thing.tint), atol=1e-6, rtol=0)


def test_later_things_do_not_disturb_earlier_ones():
    """Adding a thing leaves every pixel outside its bounding box untouched, exactly."""
    first = Scene((Thing("square", "blue", x=0.25, y=0.25, size=0.15),))
    both = replace(first, things=(*first.things, Thing("cross", "red", x=0.7, y=0.7, size=0.15)))
    changed = (render([first]) != render([both])).any(1)[0].nonzero() + 0.5
    assert len(changed) and ((changed / 32 - 0.7).abs() < 0.15 + 1 / 32).all()


@pytest.mark.parametrize("style", STYLES)
def test_styles_are_their_formulas(style):
    """`apply_style` on random colors against the formula written out, and a styled render is the styled plain render."""
    rgb = torch.rand(5, 3, 4, 4)
    tint = torch.tensor(NIGHT_TINT).view(3, 1, 1)
    expected = {"plain": rgb, "pastel": PASTEL_MIX * rgb + 1 - PASTEL_MIX, "night": NIGHT_GAIN * rgb + tint}[style]
    torch.testing.assert_close(apply_style(rgb, torch.tensor(STYLES.index(style))), expected, atol=1e-6, rtol=0)
    plain = [replace(clean(s), style="plain") for s in scenes(16, 3)]
    styled = apply_style((render(plain) + 1) / 2, torch.tensor(STYLES.index(style)))
    torch.testing.assert_close((render([replace(s, style=style) for s in plain]) + 1) / 2, styled, atol=1e-6, rtol=0)


def test_textures_show_what_they_are():
    """Hollow: the centre is background. Striped: exactly the tones 1 and `STRIPE_TONE` far from stripe edges. Solid: one tone."""
    axis = pixel_grid(256)
    dx, dy = axis[0] - 0.5, axis[1] - 0.5
    one = lambda v: torch.tensor(float(v))
    draw = lambda texture: paint(dx, dy, one(0.25), one(0), one(TEXTURES.index(texture)), one(0.1))
    inside = torch.hypot(dx, dy) < 0.25 - 0.01
    cover, tone = draw("solid")
    assert (cover[inside] == 1).all() and (tone == 1).all()
    cover, tone = draw("hollow")
    deep = torch.hypot(dx, dy) < 0.25 - HOLLOW_RIM - 0.01
    assert (cover[deep] == 0).all() and (cover[inside & ~deep & (torch.hypot(dx, dy) > 0.25 - HOLLOW_RIM + 0.01)] == 1).all()
    cover, tone = draw("striped")
    extreme = ((tone - 1).abs() < 1e-6) | ((tone - STRIPE_TONE).abs() < 1e-6)
    assert (cover[inside] == 1).all() and extreme.float().mean() > 0.9
    assert tone[inside].mean().item() == pytest.approx((1 + STRIPE_TONE) / 2, abs=0.03)  # bright and dark in equal parts


# --- geometry, against polygons


def outline(shape: str, r: float) -> np.ndarray:
    """Corners of the shape about the origin, in order; y downwards."""
    a, s = r * CROSS_ARM, 0.9 * r
    if shape == "square":
        return np.array([(-s, -s), (s, -s), (s, s), (-s, s)])
    if shape == "triangle":
        return np.array([(0, -r), (r, r), (-r, r)])
    return np.array([(-a, -r), (a, -r), (a, -a), (r, -a), (r, a), (a, a), (a, r), (-a, r), (-a, a), (-r, a), (-r, -a), (-a, -a)])


def nearest(points: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of every point to the polygon's edge by brute force, and whether that edge's interior (no corner) is nearest."""
    distances, interior = [], []
    for p, q in zip(corners, np.roll(corners, -1, 0)):
        along = ((points - p) @ (q - p)) / ((q - p) @ (q - p))
        foot = p + np.clip(along, 0, 1)[:, None] * (q - p)
        distances.append(np.linalg.norm(points - foot, axis=1))
        interior.append((along > 1e-3) & (along < 1 - 1e-3))
    distances, interior = np.stack(distances), np.stack(interior)
    best = distances.argmin(0)
    return distances.min(0), interior[best, np.arange(len(points))]


def distance_of(points: np.ndarray, shape: str, r: float) -> np.ndarray:
    dx, dy = torch.tensor(points, dtype=torch.float64).unbind(1)
    return signed_distance(dx, dy, torch.tensor(r, dtype=torch.float64), torch.tensor(SHAPES.index(shape))).numpy()


@pytest.mark.parametrize("shape", ("square", "triangle", "cross"))
@pytest.mark.parametrize("r", (0.13, 0.26))
def test_signed_distance_against_a_polygon(shape, r):
    """20000 random points: the sign is that of point-in-polygon, the value the brute-force Euclidean distance wherever an
    edge's interior is nearest (1e-6), and nowhere more than it (a lower bound elsewhere)."""
    points = np.random.default_rng(0).uniform(-0.4, 0.4, (20_000, 2))
    corners = outline(shape, r)
    ours = distance_of(points, shape, r)
    true, on_edge = nearest(points, corners)
    inside = Outline(corners).contains_points(points)
    off = true > 1e-6
    assert ((ours < 0) == inside)[off].all()
    assert 0.2 < on_edge.mean() < 1 and np.abs(np.abs(ours) - true)[on_edge].max() < 1e-6
    assert (np.abs(ours) <= true + 1e-6).all()


def test_signed_distance_of_the_circle():
    """The circle's is the distance to the centre less the radius, to 1e-12."""
    points = np.random.default_rng(0).uniform(-0.4, 0.4, (1000, 2))
    assert np.abs(distance_of(points, "circle", 0.2) - (np.linalg.norm(points, axis=1) - 0.2)).max() < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_drawn_area_is_the_shape_s_area(shape):
    """Summed coverage of a crisp 512-pixel drawing against the closed-form area, within 0.5 %."""
    r = 0.21
    a = r * CROSS_ARM
    area = {"circle": math.pi * r * r, "square": (1.8 * r) ** 2, "triangle": 2 * r * r, "cross": 8 * r * a - 4 * a * a}[shape]
    x, y = pixel_grid(512)
    one = lambda v: torch.tensor(float(v))
    cover, _ = paint(x - 0.503, y - 0.498, one(r), one(SHAPES.index(shape)), one(0), one(0.1))
    assert cover.mean().item() == pytest.approx(area, rel=5e-3)
