"""What may be asked of a picture: an `Edit` names a change, `apply_edit` makes it on a scene.

The edit types are the paper's categories as far as a shape world can carry them [arXiv:2510.14978, Sec. 4]:
add, remove, replace, recolor, texture (material), background, move (action), style, and "nothing"; `customise`
is the free-form second task, the reference's thing shown in a new scene.

A target scene exists only for evaluation, for the judge's own schooling and for the paired rivals.
The no-pair trainer asks for an instruction and a caption and never sees one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from vlmedit.errors import ImpossibleEdit
from vlmedit.world.scene import (
    BACKGROUNDS,
    COLORS,
    MARGIN,
    SHAPES,
    SIDES,
    STYLES,
    TEXTURES,
    Scene,
    Thing,
    can_wear,
    new_thing,
    sample_texture,
)

EDIT_TYPES = ("add", "remove", "replace", "recolor", "texture", "background", "move", "style")
ALL_TYPES = (*EDIT_TYPES, "nothing", "customise")


@dataclass(frozen=True)
class Edit:
    """One requested change. `shape` names the thing it is about; the other fields are the new values, by type."""

    type: str
    shape: str | None = None
    color: str | None = None
    texture: str | None = None
    new_shape: str | None = None
    background: str | None = None
    side: str | None = None
    style: str | None = None


def side_reached(thing: Thing, side: str) -> bool:
    """Whether a thing's centre lies in the third of the picture that `side` names."""
    along_x, along_y = SIDES[side]
    value, goal = (thing.x, along_x) if along_x is not None else (thing.y, along_y)
    return value <= 1 / 3 + 0.05 if goal < 0.5 else value >= 2 / 3 - 0.05


def moved(thing: Thing, side: str) -> Thing:
    """The thing brought to one side of the picture, its other coordinate kept, wholly inside the margin."""
    along_x, along_y = SIDES[side]
    low, high = MARGIN + thing.size, 1 - MARGIN - thing.size
    x = thing.x if along_x is None else min(max(along_x, low), high)
    y = thing.y if along_y is None else min(max(along_y, low), high)
    return replace(thing, x=x, y=y)


def check_edit(scene: Scene, edit: Edit) -> None:
    """Raise `ImpossibleEdit` when the scene does not allow the edit (no such thing, no change, no room)."""
    if edit.type not in ALL_TYPES:
        raise ValueError(f"unknown edit type {edit.type!r}; known: {', '.join(ALL_TYPES)}")
    shapes = [t.shape for t in scene.things]
    held = ", ".join(f"{t.color} {t.shape}" for t in scene.things) or "nothing"
    if edit.type in ("remove", "replace", "recolor", "texture", "move", "customise") and edit.shape not in shapes:
        raise ImpossibleEdit(f"there is no {edit.shape} to {edit.type}: the picture holds {held}")
    if edit.type == "add":
        if edit.shape in shapes:
            raise ImpossibleEdit(f"there is a {edit.shape} already: the picture holds {held}")
        if len(shapes) >= 3:
            raise ImpossibleEdit(f"three things are the most a picture can hold: it holds {held}")
    if edit.type == "remove" and len(shapes) < 2:
        raise ImpossibleEdit(f"the only thing of a picture cannot be removed: it holds {held}")
    if edit.type == "replace" and edit.new_shape in shapes:
        raise ImpossibleEdit(f"there is a {edit.new_shape} already: the picture holds {held}")
    if edit.type == "background" and edit.background == scene.background:
        raise ImpossibleEdit(f"the background is {scene.background} already")
    if edit.type == "style" and edit.style == scene.style:
        raise ImpossibleEdit(f"the picture is a {scene.style} one already")
    if edit.type in ("add", "replace", "texture", "customise"):
        shape = {"replace": edit.new_shape, "customise": edit.new_shape}.get(edit.type, edit.shape)
        texture = scene.things[scene.find(edit.shape)].texture if edit.type == "replace" else edit.texture
        if shape and texture and not can_wear(shape, texture):
            raise ImpossibleEdit(f"a {shape} cannot be {texture}: its arms are too thin")
    if edit.type in ("recolor", "texture", "move"):
        thing = scene.things[scene.find(edit.shape)]
        if edit.type == "recolor" and thing.color == edit.color:
            raise ImpossibleEdit(f"the {edit.shape} is {edit.color} already")
        if edit.type == "texture" and thing.texture == edit.texture:
            raise ImpossibleEdit(f"the {edit.shape} is {edit.texture} already")
        if edit.type == "move":
            goal = moved(thing, edit.side)
            if side_reached(thing, edit.side):
                raise ImpossibleEdit(f"the {edit.shape} is at the {edit.side} already")
            if any(goal.overlaps(o) for o in scene.things if o is not thing):
                raise ImpossibleEdit(f"there is no room for the {edit.shape} at the {edit.side}")


def apply_edit(scene: Scene, edit: Edit, rng: random.Random) -> Scene:
    """The scene after the edit. `rng` places added things and draws their nuisances. Raises `ImpossibleEdit`."""
    check_edit(scene, edit)
    if edit.type == "nothing":
        return scene
    if edit.type == "background":
        return replace(scene, background=edit.background)
    if edit.type == "style":
        return replace(scene, style=edit.style)
    if edit.type == "add":
        thing = new_thing(rng, edit.shape, edit.color, edit.texture or "solid", scene.things, 3)
        if thing is None:
            raise ImpossibleEdit("there is no room for another thing")
        return replace(scene, things=(*scene.things, thing))
    i = scene.find(edit.shape)
    thing = scene.things[i]
    if edit.type == "remove":
        return replace(scene, things=scene.things[:i] + scene.things[i + 1 :])
    if edit.type == "replace":
        return scene.with_thing(i, shape=edit.new_shape)
    if edit.type == "recolor":
        return scene.with_thing(i, color=edit.color)
    if edit.type == "texture":
        return scene.with_thing(i, texture=edit.texture)
    if edit.type == "move":
        goal = moved(thing, edit.side)
        return scene.with_thing(i, x=goal.x, y=goal.y)
    if edit.type == "customise":
        things = (replace(thing, x=rng.uniform(0.3, 0.7), y=rng.uniform(0.3, 0.7)),)
        if edit.new_shape:
            extra = new_thing(rng, edit.new_shape, edit.color, edit.texture or "solid", things, 3)
            if extra is None:
                raise ImpossibleEdit("there is no room for the second thing")
            things += (extra,)
        return replace(scene, things=things, background=edit.background)
    raise ValueError(f"unknown edit type {edit.type!r}; known: {', '.join(ALL_TYPES)}")


def _propose(scene: Scene, kind: str, rng: random.Random) -> Edit:
    thing = rng.choice(scene.things)
    free = [s for s in SHAPES if s not in {t.shape for t in scene.things}]
    if kind == "add":
        shape = rng.choice(free)
        return Edit("add", shape=shape, color=rng.choice(tuple(COLORS)), texture=sample_texture(rng, shape))
    if kind == "remove":
        return Edit("remove", shape=thing.shape)
    if kind == "replace":
        return Edit("replace", shape=thing.shape, new_shape=rng.choice(free))
    if kind == "recolor":
        return Edit("recolor", shape=thing.shape, color=rng.choice([c for c in COLORS if c != thing.color]))
    if kind == "texture":
        return Edit("texture", shape=thing.shape, texture=rng.choice([t for t in TEXTURES if t != thing.texture]))
    if kind == "background":
        return Edit("background", background=rng.choice([b for b in BACKGROUNDS if b != scene.background]))
    if kind == "move":
        return Edit("move", shape=thing.shape, side=rng.choice(tuple(SIDES)))
    if kind == "style":
        return Edit("style", style=rng.choice([s for s in STYLES if s != scene.style]))
    if kind == "nothing":
        return Edit("nothing")
    if kind == "customise":
        other = rng.choice(free) if rng.random() < 0.5 else None
        color = rng.choice(tuple(COLORS)) if other else None
        return Edit("customise", shape=thing.shape, background=rng.choice(tuple(BACKGROUNDS)), new_shape=other, color=color)
    raise ValueError(f"unknown edit type {kind!r}; known: {', '.join(ALL_TYPES)}")


def sample_edit(scene: Scene, kind: str, rng: random.Random, tries: int = 12) -> Edit | None:
    """Draw a possible edit of type `kind` for the scene, or None when the scene allows none."""
    for _ in range(tries):
        try:
            edit = _propose(scene, kind, rng)
            check_edit(scene, edit)
            return edit
        except (ImpossibleEdit, IndexError):
            continue
    return None
