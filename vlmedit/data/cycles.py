"""Requests and their undoing in words, for the unpaired rivals that ask a student for an edit, then for its inverse.

The inverse is an instruction too: where the reference's circle was blue, "make the circle red" is undone by "make the
circle blue"; what was added is removed, what was removed added. A removal's inverse does not say where the thing was,
and a move from the middle of a picture has none: words cannot undo everything, and such rows have no cycle
(`reversible` 0).

No picture of the scene after the edit is ever rendered: `CycleBatch` holds the reference and words, as the no-pair
path's batch does. Shapes: pictures (B, 3, S, S) in [-1, 1]; ids (B, L).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmedit.config import WorldConfig
from vlmedit.data.batches import TEXT_LENGTH, Batch, UnpairedBatch
from vlmedit.data.world import Draw, Example, batch_of_examples, draw_examples, references, request_settings
from vlmedit.errors import ImpossibleEdit
from vlmedit.seeds import rng_for
from vlmedit.world.edits import Edit, apply_edit, check_edit, side_reached
from vlmedit.world.language import instruct
from vlmedit.world.scene import SIDES, Scene
from vlmedit.world.tokenizer import encode


def inverse(scene: Scene, edit: Edit) -> Edit | None:
    """The edit that leads from `edit`'s result back to `scene`, or None where no instruction does."""
    thing = scene.things[scene.find(edit.shape)] if edit.shape and edit.type != "add" else None
    if edit.type == "nothing":
        return Edit("nothing")
    if edit.type == "add":
        return Edit("remove", shape=edit.shape)
    if edit.type == "remove":
        return Edit("add", shape=thing.shape, color=thing.color, texture=thing.texture)
    if edit.type == "replace":
        return Edit("replace", shape=edit.new_shape, new_shape=edit.shape)
    if edit.type == "recolor":
        return Edit("recolor", shape=edit.shape, color=thing.color)
    if edit.type == "texture":
        return Edit("texture", shape=edit.shape, texture=thing.texture)
    if edit.type == "background":
        return Edit("background", background=scene.background)
    if edit.type == "style":
        return Edit("style", style=scene.style)
    if edit.type == "move":  # along one axis: back to the opposite side, if it came from there
        axis = 0 if SIDES[edit.side][0] is not None else 1
        back = [s for s, where in SIDES.items() if where[axis] is not None and s != edit.side and side_reached(thing, s)]
        return Edit("move", shape=edit.shape, side=back[0]) if back else None
    return None  # a new scene forgets the old one


@dataclass(frozen=True)
class CycleBatch(Batch):
    """Requests without targets, with their inverse in words."""

    request: UnpairedBatch
    inverse: Tensor  # (B, L) ids of the instruction that undoes the request; padding alone where there is none
    reversible: Tensor  # (B,) 1 where there is one


def undoing(example: Example, rng: random.Random) -> str:
    """The instruction that undoes a request, or nothing."""
    back, after = inverse(example.scene, example.edit), apply_edit(example.scene, example.edit, random.Random(0))
    if back is None:
        return ""
    try:
        check_edit(after, back)
        return instruct(back, after, rng)
    except ImpossibleEdit:
        return ""


def cycle_batch(batch: int, side: int, *seed, **which) -> CycleBatch:
    """The requests that `unpaired_batch` draws from the same arguments, and how to undo each."""
    rng = rng_for("unpaired", *seed)
    examples = draw_examples(batch, rng, *seed, **which)
    request = batch_of_examples(examples, references(examples, side, rng))
    words = [undoing(e, rng_for("inverse", *seed, i)) for i, e in enumerate(examples)]
    return CycleBatch(request, encode(words, TEXT_LENGTH), torch.tensor([float(bool(w)) for w in words]))


def cycle_draw(world: WorldConfig) -> Draw:
    """How a run's world draws its cycle batches."""
    return lambda size, *key: cycle_batch(size, world.side, *key, **request_settings(world))
