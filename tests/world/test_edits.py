"""Edits: what is applied is done and keeps the rest, what is untouched is not done, what cannot be done is refused."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmedit.data.world import sample_example, target_of
from vlmedit.errors import ImpossibleEdit
from vlmedit.world.edits import ALL_TYPES, EDIT_TYPES, Edit, apply_edit, check_edit, sample_edit, side_reached
from vlmedit.world.scene import BACKGROUNDS, COLORS, SHAPES, SIDES, STYLES, TEXTURES, Scene, Thing, sample_scene
from vlmedit.world.verdict import edit_done, rest_kept

PER_TYPE = 400


@pytest.mark.parametrize("kind", ALL_TYPES)
def test_an_applied_edit_is_done_and_keeps_the_rest(kind):
    """400 random edits of each type: after apply_edit both verdicts are True, and the original scene did not change."""
    rng = random.Random(f"applied {kind}")
    for _ in range(PER_TYPE):
        example = sample_example(rng, (kind,))
        copy = replace(example.scene)
        after = target_of(example, rng)
        assert example.edit.type == kind and example.scene == copy
        assert edit_done(example.scene, after, example.edit), (example, after)
        assert rest_kept(example.scene, after, example.edit), (example, after)


@pytest.mark.parametrize("kind", ALL_TYPES)
def test_an_untouched_scene_is_kept_but_not_done(kind):
    """The reference itself keeps the rest, and is done only for 'nothing' (a customisation may ask for what is there)."""
    rng = random.Random(f"untouched {kind}")
    for _ in range(PER_TYPE):
        scene, edit = (example := sample_example(rng, (kind,))).scene, example.edit
        assert rest_kept(scene, scene, edit)
        there = len(scene.things) == 1 and edit.new_shape is None and edit.background == scene.background
        assert edit_done(scene, scene, edit) == (kind == "nothing" or (kind == "customise" and there))


@pytest.mark.parametrize("kind", EDIT_TYPES)
def test_targets_stay_in_the_world(kind):
    """A target's things are inside the margin, apart from each other and of distinct shapes, so the world is closed under edits."""
    rng = random.Random(f"closed {kind}")
    for _ in range(PER_TYPE):
        example = sample_example(rng, (kind,))
        things = target_of(example, rng).things
        assert 1 <= len(things) <= 3 and len({t.shape for t in things}) == len(things)
        for i, thing in enumerate(things):
            assert thing.inside()
            assert not any(thing.overlaps(o) for o in things[i + 1 :])


def test_customised_things_lie_inside_the_picture():
    """A customised scene holds the subject as it was, near the middle, wholly inside the picture."""
    rng = random.Random(3)
    for _ in range(PER_TYPE):
        example = sample_example(rng, ("customise",))
        after = target_of(example, rng)
        old, new = (s.things[s.find(example.edit.shape)] for s in (example.scene, after))
        assert replace(new, x=old.x, y=old.y) == old
        assert all(t.size + 0.01 < t.x < 1 - t.size - 0.01 and t.size + 0.01 < t.y < 1 - t.size - 0.01 for t in after.things)
        assert len(after.things) == 1 + bool(example.edit.new_shape)


@given(st.integers(0, 2**40), st.sampled_from(EDIT_TYPES))
def test_an_edit_changes_what_it_names_and_nothing_else(seed, kind):
    """Field by field: scenes before and after differ in exactly what the edit names."""
    rng = random.Random(seed)
    example = sample_example(rng, (kind,))
    edit, before, after = example.edit, example.scene, target_of(example, rng)
    assert after.look == before.look
    assert (after.background != before.background) == (kind == "background")
    assert (after.style != before.style) == (kind == "style")
    if kind == "add":
        assert after.things[:-1] == before.things
    elif kind == "remove":
        assert after.things == tuple(t for t in before.things if t.shape != edit.shape)
    else:
        fields = {"replace": {"shape"}, "recolor": {"color"}, "texture": {"texture"}, "move": {"x", "y"}}.get(kind, set())
        for old, new in zip(before.things, after.things, strict=True):
            differ = {k for k in vars(old) if getattr(old, k) != getattr(new, k)}
            assert differ <= fields and bool(differ) == (old.shape == edit.shape)


@pytest.mark.parametrize("side", SIDES)
def test_a_move_reaches_its_side(side):
    """Whatever the size, a moved thing counts as having reached the side, and no thing in the middle does."""
    for size in (0.13, 0.2, 0.26):
        scene = Scene((Thing("circle", "red", size=size),))
        assert not side_reached(scene.things[0], side)
        after = apply_edit(scene, Edit("move", "circle", side=side), random.Random(0))
        assert side_reached(after.things[0], side) and after.things[0].inside()
        others = [s for s in SIDES if s != side]
        assert not any(side_reached(after.things[0], s) for s in others)


CIRCLE, SQUARE = Thing("circle", "red", x=0.25, y=0.5, size=0.15), Thing("square", "blue", "striped", x=0.75, y=0.5, size=0.15)
TWO = Scene((CIRCLE, SQUARE))
FULL = Scene((replace(CIRCLE, y=0.25), replace(SQUARE, y=0.25), Thing("cross", "green", x=0.5, y=0.75, size=0.15)))


@pytest.mark.parametrize(
    "scene, edit, message",
    [
        (TWO, Edit("remove", "triangle"), "no triangle to remove: the picture holds red circle, blue square"),
        (TWO, Edit("replace", "triangle", new_shape="cross"), "no triangle to replace"),
        (TWO, Edit("recolor", "cross", "red"), "no cross to recolor"),
        (TWO, Edit("texture", "cross", texture="striped"), "no cross to texture"),
        (TWO, Edit("move", "cross", side="left"), "no cross to move"),
        (TWO, Edit("customise", "cross", background="white"), "no cross to customise"),
        (TWO, Edit("add", "circle", "green"), "there is a circle already"),
        (FULL, Edit("add", "triangle", "green"), "three things are the most"),
        (Scene((CIRCLE,)), Edit("remove", "circle"), "the only thing of a picture cannot be removed"),
        (TWO, Edit("replace", "circle", new_shape="square"), "there is a square already"),
        (TWO, Edit("background", background="white"), "the background is white already"),
        (TWO, Edit("style", style="plain"), "the picture is a plain one already"),
        (TWO, Edit("recolor", "circle", "red"), "the circle is red already"),
        (TWO, Edit("texture", "square", texture="striped"), "the square is striped already"),
        (TWO, Edit("add", "cross", "red", "hollow"), "a cross cannot be hollow"),
        (TWO.with_thing(0, texture="hollow"), Edit("replace", "circle", new_shape="cross"), "a cross cannot be hollow"),
        (TWO.with_thing(0, shape="cross"), Edit("texture", "cross", texture="hollow"), "a cross cannot be hollow"),
        (TWO, Edit("move", "circle", side="left"), "the circle is at the left already"),
        (TWO, Edit("move", "circle", side="right"), "there is no room for the circle at the right"),
    ],
)
def test_impossible_edits_say_why(scene, edit, message):
    """Each impossible edit is refused by check_edit and by apply_edit with the reason in words."""
    for attempt in (lambda: check_edit(scene, edit), lambda: apply_edit(scene, edit, random.Random(0))):
        with pytest.raises(ImpossibleEdit, match=message):
            attempt()


def test_a_full_picture_has_no_room():
    """An addition that finds no free place is refused instead of overlapping."""
    crowded = Scene((Thing("circle", "red", size=0.45),))
    with pytest.raises(ImpossibleEdit, match="no room for another thing"):
        apply_edit(crowded, Edit("add", "square", "red"), random.Random(0))


def test_unknown_types_are_named():
    """An unknown edit type is an error that lists the known ones, in every function that takes one."""
    for attempt in (
        lambda: apply_edit(TWO, Edit("melt"), random.Random(0)),
        lambda: sample_edit(TWO, "melt", random.Random(0)),
        lambda: edit_done(TWO, TWO, Edit("melt")),
        lambda: sample_example(random.Random(0), ("melt",)),
    ):
        with pytest.raises(ValueError, match="unknown edit type '?melt"):
            attempt()


@given(st.integers(0, 2**40), st.sampled_from(ALL_TYPES))
def test_sampled_edits_are_possible(seed, kind):
    """sample_edit returns only edits that pass check_edit, or None."""
    rng = random.Random(seed)
    scene = sample_scene(rng)
    edit = sample_edit(scene, kind, rng)
    if edit is not None:
        check_edit(scene, edit)
    elif kind in ("recolor", "background", "style", "nothing", "customise"):
        pytest.fail(f"{kind} is possible on every scene")


def test_every_value_is_asked_for():
    """2000 edits per type ask for every color, texture, background, side, style and new shape."""
    rng = random.Random(11)
    asked = {kind: [sample_example(rng, (kind,)).edit for _ in range(2000)] for kind in ("add", "replace", "recolor", "texture", "background", "move", "style")}
    of = lambda kind, name: {getattr(e, name) for e in asked[kind]}
    assert of("recolor", "color") == of("add", "color") == set(COLORS)
    assert of("texture", "texture") == of("add", "texture") == set(TEXTURES)
    assert of("background", "background") == set(BACKGROUNDS)
    assert of("move", "side") == set(SIDES) and of("style", "style") == set(STYLES)
    assert of("replace", "new_shape") == of("replace", "shape") == of("add", "shape") == set(SHAPES)
