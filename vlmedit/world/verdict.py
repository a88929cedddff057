"""Was the edit made, and was the rest kept? Decided exactly, between scene descriptions.

The judge's schooling takes its labels from here (it renders both scenes, so it knows them); the oracle first parses pixels
into a scene and then asks the same two questions. The no-pair trainer imports neither.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlmedit.world.edits import Edit, side_reached
from vlmedit.world.scene import Scene, Thing

POSITION_TOLERANCE = 0.06  # two pixels at 32
SIZE_TOLERANCE = 0.05


@dataclass(frozen=True)
class Tolerance:
    """How far a thing may drift and still count as kept, in fractions of the side."""

    position: float = POSITION_TOLERANCE
    size: float = SIZE_TOLERANCE


def by_shape(scene: Scene) -> dict[str, Thing]:
    return {t.shape: t for t in scene.things}


def same_place(a: Thing, b: Thing, tolerance: Tolerance) -> bool:
    return abs(a.x - b.x) <= tolerance.position and abs(a.y - b.y) <= tolerance.position


def texture_of(thing: Thing | None) -> str | None:
    return thing.texture if thing else None


def edit_done(before: Scene, after: Scene, edit: Edit, tolerance: Tolerance = Tolerance()) -> bool:
    """Whether `after` shows what the edit asks for, whatever happened to the rest."""
    now, then = by_shape(after), by_shape(before)
    thing = now.get(edit.shape)
    if edit.type == "add":
        return thing is not None and thing.color == edit.color and thing.texture == (edit.texture or "solid")
    if edit.type == "remove":
        return thing is None
    if edit.type == "replace":
        new = now.get(edit.new_shape)
        return thing is None and new is not None and same_place(new, then[edit.shape], tolerance)
    if edit.type == "recolor":
        return thing is not None and thing.color == edit.color
    if edit.type == "texture":
        return thing is not None and thing.texture == edit.texture
    if edit.type == "background":
        return after.background == edit.background
    if edit.type == "move":
        return thing is not None and side_reached(thing, edit.side)
    if edit.type == "style":
        return after.style == edit.style
    if edit.type == "nothing":
        return rest_kept(before, after, edit, tolerance)
    if edit.type == "customise":
        wanted = {edit.shape} | ({edit.new_shape} if edit.new_shape else set())
        other = now.get(edit.new_shape)
        return set(now) == wanted and after.background == edit.background and (not edit.new_shape or other.color == edit.color)
    raise ValueError(f"unknown edit type {edit.type!r}")


def rest_kept(before: Scene, after: Scene, edit: Edit, tolerance: Tolerance = Tolerance()) -> bool:
    """Whether everything that the edit does not name is as it was. A removal's or addition's own thing is ignored."""
    now, then = by_shape(after), by_shape(before)
    if len(now) != len(after.things):
        return False  # two things of one shape: nothing of the world
    if edit.type == "customise":
        old, new = then[edit.shape], now.get(edit.shape)
        return new is not None and (new.color, new.texture) == (old.color, old.texture) and abs(new.size - old.size) <= tolerance.size
    if edit.type != "background" and after.background != before.background:
        return False
    if edit.type != "style" and after.style != before.style:
        return False
    allowed_new = {"add": edit.shape, "replace": edit.new_shape}.get(edit.type)
    free = {edit.shape} if edit.type in ("remove", "replace") else set()
    if set(now) - set(then) - {allowed_new}:
        return False
    if set(then) - set(now) - free:
        return False
    for shape, old in then.items():
        new = now.get(shape)
        subject = shape == edit.shape
        if edit.type == "replace" and subject:
            new = now.get(edit.new_shape) or new
        if new is None or (edit.type == "remove" and subject):
            continue
        if new.color != old.color and not (edit.type == "recolor" and subject):
            return False
        if new.texture != old.texture and not (edit.type == "texture" and subject):
            return False
        if abs(new.size - old.size) > tolerance.size:
            return False
        if not same_place(new, old, tolerance) and not (edit.type == "move" and subject):
            return False
    return True
