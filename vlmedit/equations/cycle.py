"""Edits and their undoing in words: what the unpaired rivals without a VLM train on, and the losses they share.

A cycle asks a student for an edit and then for its inverse, and wants the reference back. The inverse is an instruction too: where
the reference's circle was blue, "make the circle red" is undone by "make the circle blue"; what was added is removed, what was removed added. A removal's
inverse does not say where the thing was, and a move from the middle of a picture has none: words cannot undo everything, and such
rows have no cycle (`reversible` 0).

    |F(G(y, c), c^-1) - y|_1                                      cycle        [CycleGAN-Turbo, arXiv:2403.12036; F is G itself]
    softplus(-D(x_t, c*))                                         adversary: pictures with captions, real or the student's
    |y + (mu(z_t, c*) - mu(y_t, c_y)) - mu_theta(z_t, y, c)|^2     direction prior [Bootstrap Your Generator, arXiv:2606.03911]

No picture of the scene after the edit is ever rendered: `CycleBatch` holds the reference and words, as the no-pair path's batch does.
Shapes: pictures (B, 3, S, S) in [-1, 1]; ids (B, L).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmedit.data.world import (
    EDIT_SHARES,
    SETTLED_TYPES,
    TEXT_LENGTH,
    Batch,
    UnpairedBatch,
    batch_of,
    references,
    rng_for,
    sample_example,
    settle,
)
from vlmedit.equations.matching import log_ratio
from vlmedit.errors import ImpossibleEdit
from vlmedit.flow import Velocity, guide, interpolate, to_x0
from vlmedit.networks.text import encode
from vlmedit.world.edits import Edit, apply_edit, check_edit, side_reached
from vlmedit.world.language import instruct
from vlmedit.world.scene import SIDES, Scene


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

    def to(self, device) -> CycleBatch:
        return CycleBatch(self.request.to(device), self.inverse.to(device), self.reversible.to(device))


def cycle_batch(batch: int, side: int, *seed, kinds=None, pool: int | None = None, settled: float = 0.0) -> CycleBatch:
    """The requests that `unpaired_batch` draws from the same arguments, and how to undo each."""
    rng, kinds = rng_for("unpaired", *seed), kinds or EDIT_SHARES
    draw = lambda: sample_example(rng if pool is None else rng_for("pool", *seed[:1], rng.randrange(pool)), kinds)
    examples = [draw() for _ in range(batch)]
    examples = [settle(e, rng) if settled and e.edit.type in SETTLED_TYPES and rng.random() < settled else e for e in examples]
    request, words = batch_of(examples, references(examples, side, rng)), []
    for i, e in enumerate(examples):
        back, after = inverse(e.scene, e.edit), apply_edit(e.scene, e.edit, random.Random(0))
        try:
            if back is not None:
                check_edit(after, back)
            words.append("" if back is None else instruct(back, after, rng_for("inverse", *seed, i)))
        except ImpossibleEdit:
            words.append("")
    return CycleBatch(request, encode(words, TEXT_LENGTH), torch.tensor([float(bool(w)) for w in words]))


# what both rivals pay for


def cycle_loss(back: Tensor, reference: Tensor, reversible: Tensor) -> Tensor:
    """Mean |back - reference| over the rows that can be undone, over the whole batch's size."""
    return ((back - reference).abs().flatten(1).mean(1) * reversible).mean()


def copy_loss(output: Tensor, reference: Tensor, nothing: Tensor) -> Tensor:
    """CycleGAN's identity term: mean |output - reference| where nothing is to be done."""
    return ((output - reference).abs().flatten(1).mean(1) * nothing).mean()


# CycleGAN-Turbo's adversary


def critic_loss(critic: nn.Module, output: Tensor, captions: Tensor, real: Tensor, real_captions: Tensor, t: Tensor, eps: Tensor, mismatch: float = 0.0) -> Tensor:
    """Cross-entropy of a critic of noised pictures with captions: true are references with theirs, false the student's pictures with the
    captions they should fulfill, and, weighted by `mismatch`, references with the next row's caption [arXiv:1605.05396]."""
    score = lambda x, text: log_ratio(critic, interpolate(x, eps, t), t, text)[0]
    false = F.softplus(score(output.detach(), captions)).mean()
    if mismatch:
        other = real_captions.roll(1, 0)
        strange = (other != real_captions).any(1).float()  # two references may well have one caption
        false = (1 - mismatch) * false + mismatch * (F.softplus(score(real, other)) * strange).mean()
    return F.softplus(-score(real, real_captions)).mean() + false


def adversarial_loss(critic: nn.Module, output: Tensor, captions: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """-log D of the student's noised pictures under the captions they should fulfill."""
    return F.softplus(-log_ratio(critic, interpolate(output, eps, t), t, captions)[0]).mean()


# Bootstrap Your Generator's prior


@torch.no_grad()  # the direction is a constant of the student's loss
def direction(source: Velocity, target: Velocity, y: Tensor, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Where the frozen model would move the reference: its clean estimate of the noised pseudo-target z under the target caption, minus
    that of the reference y under the same noise and its own caption. At z = y that is FlowEdit's first step; where z is the right edit,
    both estimates err alike and the direction is z - y, so that a finished edit is left alone."""
    z_t, y_t = interpolate(z, eps, t), interpolate(y, eps, t)
    return to_x0(z_t, target(z_t, t), t) - to_x0(y_t, source(y_t, t), t)


def prior_loss(estimate: Tensor, reference: Tensor, towards: Tensor) -> Tensor:
    """Mean squared distance of the student's clean estimate to the reference moved by `towards`, per picture, (B,)."""
    return (estimate - (reference + towards).clamp(-1, 1)).square().flatten(1).mean(1)


def route(clean: Tensor, estimate: Tensor) -> Tensor:
    """The value of `clean`, sampled without a graph, the gradient of `estimate`, made from a noisy state: straight through."""
    return clean.detach() + estimate - estimate.detach()


def guided(model: nn.Module, ids: Tensor, w: float = 1.0) -> Velocity:
    """A frozen text-to-image model's flow under caption ids, guided against the empty caption."""
    text, empty = model.encode_text(ids), model.encode_text(torch.zeros_like(ids))
    return lambda x, t: model(x, t, text) if w == 1 else guide(model(x, t, text), model(x, t, empty), w)
