"""The verdict: every kind of damage is seen, and what no instruction speaks of is not."""

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmedit.data.world import sample_example, target_of
from vlmedit.world.edits import ALL_TYPES, EDIT_TYPES, Edit
from vlmedit.world.scene import BACKGROUNDS, COLORS, SHAPES, STYLES, TEXTURES, Look, Scene, Thing
from vlmedit.world.verdict import POSITION_TOLERANCE, SIZE_TOLERANCE, Tolerance, edit_done, rest_kept

SEEDS = st.integers(0, 2**40)
KINDS = (*EDIT_TYPES, "nothing")


def collaterals(before: Scene, after: Scene, edit: Edit) -> Iterator[tuple[str, Scene]]:
    """Every single-attribute damage to `after` that the edit did not ask for, named."""
    kept = [i for i, t in enumerate(after.things) if not (edit.type == "add" and t.shape == edit.shape)]
    for i in kept:
        thing = after.things[i]
        subject = thing.shape in (edit.shape, edit.new_shape)
        for color in COLORS:
            if color != thing.color and not (edit.type == "recolor" and subject):
                yield f"{thing.shape} became {color}", after.with_thing(i, color=color)
        for texture in TEXTURES:
            if texture != thing.texture and not (edit.type == "texture" and subject):
                yield f"{thing.shape} became {texture}", after.with_thing(i, texture=texture)
        for axis in ("x", "y"):
            for step in (-1, 1):
                drift = step * (POSITION_TOLERANCE + 1e-3)
                if not (edit.type == "move" and subject):
                    # a drift counts from where the thing was
                    yield f"{thing.shape} drifted along {axis}", after.with_thing(i, **{axis: getattr(thing, axis) + drift})
        for step in (-1, 1):
            yield f"{thing.shape} changed its size", after.with_thing(i, size=thing.size + step * (SIZE_TOLERANCE + 1e-3))
        if not (edit.type == "replace" and subject):  # then the edit is not done, but nothing else is lost
            yield f"{thing.shape} vanished", replace(after, things=after.things[:i] + after.things[i + 1 :])
        for shape in SHAPES:
            if shape not in {t.shape for t in (*before.things, *after.things)}:
                yield f"{thing.shape} became a {shape}", after.with_thing(i, shape=shape)
    for shape in SHAPES:
        if shape not in {t.shape for t in (*before.things, *after.things)}:
            yield f"a {shape} appeared", replace(after, things=(*after.things, Thing(shape, "red")))
    if after.things:
        yield "a second of one shape appeared", replace(after, things=(*after.things, after.things[0]))
    if edit.type != "background":
        for ground in set(BACKGROUNDS) - {after.background}:
            yield f"background became {ground}", replace(after, background=ground)
    if edit.type != "style":
        for style in set(STYLES) - {after.style}:
            yield f"style became {style}", replace(after, style=style)


@pytest.mark.parametrize("kind", KINDS)
def test_every_single_damage_is_seen(kind):
    """150 edits of each type, about 40 single damages of each target: rest_kept is False for every one of them."""
    rng = random.Random(f"damage {kind}")
    seen = 0
    for _ in range(150):
        example = sample_example(rng, (kind,))
        after = target_of(example, rng)
        for name, damaged in collaterals(example.scene, after, example.edit):
            assert not rest_kept(example.scene, damaged, example.edit), (name, example, damaged)
            if kind == "nothing":
                assert not edit_done(example.scene, damaged, example.edit)
            seen += 1
    assert seen > 150 * 15


@given(SEEDS, st.sampled_from(KINDS))
def test_small_drifts_and_looks_are_not_damage(seed, kind):
    """Within the tolerances, and for any change of nuisances, the verdicts do not change."""
    rng = random.Random(seed)
    example = sample_example(rng, (kind,))
    after = target_of(example, rng)
    jitter = lambda limit: rng.uniform(-0.99, 0.99) * limit
    things = []
    for t in after.things:
        # what moves or arrives only has to reach its side or to be there
        drift = 0.0 if kind == "move" and t.shape == example.edit.shape else POSITION_TOLERANCE
        things.append(replace(t, x=t.x + jitter(drift), y=t.y + jitter(drift), size=t.size + jitter(SIZE_TOLERANCE), tint=(0.05, 0.0, -0.05), shade=0.1))
    other = replace(after, things=tuple(things), look=Look(noise=0.02, softness=1.3, outline=0.4))
    assert edit_done(example.scene, other, example.edit) and rest_kept(example.scene, other, example.edit)


@given(SEEDS, st.sampled_from(ALL_TYPES))
def test_the_order_of_things_means_nothing(seed, kind):
    """Both verdicts are the same for every order of the things, before and after."""
    rng = random.Random(seed)
    example = sample_example(rng, (kind,))
    after = rng.choice((example.scene, target_of(example, rng), sample_example(rng, (kind,)).scene))
    turned = [replace(s, things=tuple(rng.sample(s.things, len(s.things)))) for s in (example.scene, after)]
    assert edit_done(example.scene, after, example.edit) == edit_done(*turned, example.edit)
    assert rest_kept(example.scene, after, example.edit) == rest_kept(*turned, example.edit)


RED, BLUE = Thing("circle", "red", x=0.3, y=0.3, size=0.15), Thing("square", "blue", x=0.7, y=0.7, size=0.15)
TWO = Scene((RED, BLUE))


@pytest.mark.parametrize(
    "edit, after, done",
    [
        (Edit("recolor", "circle", "green"), TWO.with_thing(0, color="yellow"), False),  # another color than asked
        (Edit("recolor", "circle", "green"), TWO.with_thing(1, color="green"), False),  # another thing than asked
        (Edit("recolor", "circle", "green"), Scene((BLUE,)), False),  # gone
        (Edit("texture", "circle", texture="hollow"), TWO.with_thing(0, texture="striped"), False),
        (Edit("remove", "circle"), Scene((BLUE,)), True),
        (Edit("remove", "circle"), Scene((RED,)), False),  # the wrong one removed
        (Edit("replace", "circle", new_shape="cross"), TWO.with_thing(0, shape="cross"), True),
        (Edit("replace", "circle", new_shape="cross"), TWO.with_thing(0, shape="cross", x=0.5), False),  # elsewhere
        (Edit("replace", "circle", new_shape="cross"), replace(TWO, things=(RED, BLUE, replace(RED, shape="cross"))), False),  # added, not replaced
        (Edit("add", "cross", "red", "solid"), replace(TWO, things=(RED, BLUE, Thing("cross", "red"))), True),
        (Edit("add", "cross", "red", "solid"), replace(TWO, things=(RED, BLUE, Thing("cross", "red", "striped"))), False),
        (Edit("add", "cross", "red"), replace(TWO, things=(RED, BLUE, Thing("cross", "green"))), False),
        (Edit("background", background="black"), replace(TWO, background="grey"), False),
        (Edit("style", style="night"), replace(TWO, style="pastel"), False),
        (Edit("move", "circle", side="right"), TWO.with_thing(0, x=0.61), False),  # not far enough
        (Edit("move", "circle", side="right"), TWO.with_thing(0, x=0.62), True),
        (Edit("customise", "circle", background="white"), Scene((RED,)), True),
        (Edit("customise", "circle", background="white"), TWO, False),  # the other thing is still there
        (Edit("customise", "circle", background="white", new_shape="cross", color="cyan"), Scene((RED, Thing("cross", "cyan"))), True),
        (Edit("customise", "circle", background="white", new_shape="cross", color="cyan"), Scene((RED, Thing("cross", "red"))), False),
    ],
)
def test_near_misses_by_hand(edit, after, done):
    """Done or not, decided by hand for the near misses of every type."""
    assert edit_done(TWO, after, edit) is done


def test_a_customised_subject_must_stay_itself():
    """Identity of a customisation: color, texture and size of the subject, wherever it is; nothing else."""
    edit = Edit("customise", "circle", background="black")
    there = Scene((replace(RED, x=0.6),), "black")
    assert rest_kept(TWO, there, edit)
    for damage in (dict(color="green"), dict(texture="striped"), dict(size=0.21), dict(shape="cross")):
        assert not rest_kept(TWO, there.with_thing(0, **damage), edit)


def test_tolerances_are_the_callers():
    """A tighter tolerance rejects, a wider one accepts, the same drift."""
    drifted = TWO.with_thing(0, x=RED.x + 0.05)
    edit = Edit("recolor", "square", "green")
    assert rest_kept(TWO, drifted, edit)
    assert not rest_kept(TWO, drifted, edit, Tolerance(position=0.04))
    grown = TWO.with_thing(0, size=RED.size + 0.06)
    assert not rest_kept(TWO, grown, edit) and rest_kept(TWO, grown, edit, Tolerance(size=0.07))
