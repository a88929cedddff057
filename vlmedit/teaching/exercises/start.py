"""Notebook 00: was a thing recolored as asked, and how exactly was the rest kept?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlmedit.teaching.checking import Exercise
from vlmedit.world.edits import Edit
from vlmedit.world.oracle import psnr
from vlmedit.world.scene import Scene, Thing
from vlmedit.world.verdict import rest_kept


def recolored(before: Scene, after: Scene, edit: Edit) -> bool:
    """Whether `after` shows the thing that `edit.shape` names in the color `edit.color`, whatever happened to the rest."""
    return any(t.shape == edit.shape and t.color == edit.color for t in after.things)


def recolored_cases() -> list[tuple[Scene, Scene, Edit]]:
    circle, square = Thing("circle", "red", x=0.3, y=0.3), Thing("square", "blue", "striped", x=0.7, y=0.7)
    triangle = Thing("triangle", "green", x=0.3, y=0.7, size=0.15)
    cases = []
    for things, edit in (((circle, square), Edit("recolor", "circle", "blue")), ((square, triangle, circle), Edit("recolor", "triangle", "red"))):
        before = Scene(things, "grey")
        i = before.find(edit.shape)
        right = before.with_thing(i, color=edit.color)
        other = (i + 1) % len(things)
        afters = (
            right,
            before,
            before.with_thing(i, color="yellow"),
            replace(right, things=right.things[::-1]),
            replace(before, things=before.things[::-1]),
            replace(before, things=before.things[:i] + before.things[i + 1 :]),
            right.with_thing(other, color="purple"),
            replace(right, background="black"),
            before.with_thing(other, color=edit.color),
        )
        cases += [(before, after, edit) for after in afters]
    return cases


def _color(scene: Scene, shape: str) -> str | None:
    return next((t.color for t in scene.things if t.shape == shape), None)


RECOLORED = Exercise(
    recolored,
    recolored_cases,
    {
        "any thing of the asked color counts; only the named one may": lambda b, a, e: any(t.color == e.color for t in a.things),
        "things are compared by their place in the list; find them by shape": lambda b, a, e: (
            b.find(e.shape) < len(a.things) and a.things[b.find(e.shape)].color == e.color
        ),
        "any new color counts; it must be the asked one": lambda b, a, e: _color(a, e.shape) not in (None, _color(b, e.shape)),
        "the rest must be kept as well; that is the other question": lambda b, a, e: _color(a, e.shape) == e.color and rest_kept(b, a, e),
        "a thing that vanished counts as recolored": lambda b, a, e: _color(a, e.shape) in (None, e.color),
        "it looks at the picture before the edit": lambda b, a, e: _color(b, e.shape) == e.color,
        "the answer is the wrong way round": lambda b, a, e: _color(a, e.shape) != e.color,
    },
)




def psnr_cases() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    cases = []
    for batch, side in ((3, 8), (5, 6), (1, 4)):
        a = torch.rand(batch, 3, side, side, generator=generator) * 2 - 1
        # each picture has an error of its own size, larger at the top
        noise = torch.randn(a.shape, generator=generator) * torch.linspace(0.05, 0.3, batch).view(-1, 1, 1, 1)
        noise[:, :, : side // 2] *= 3
        weight = (torch.rand(batch, 1, side, side, generator=generator) < 0.6).float()
        weight[:, :, -1] = 1
        cases.append((a, (a + noise).clamp(-1, 1), weight))
    return cases


def _db(mse: Tensor) -> Tensor:
    return -10 * mse.log10()


def _kept_mse(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return (((a - b) / 2).square() * weight).flatten(1).sum(1) / (3 * weight.flatten(1).sum(1))


PSNR = Exercise(
    psnr,
    psnr_cases,
    {
        "the peak is taken as 1, but pictures in [-1, 1] span 2": lambda a, b, w: _db(4 * _kept_mse(a, b, w)),
        "the mean goes over all pixels; only those of weight 1 count": lambda a, b, w: _db(((a - b) / 2).square().flatten(1).mean(1)),
        "pixels of weight 0 are in the mean, as zeros": lambda a, b, w: _db((((a - b) / 2).square() * w).flatten(1).mean(1)),
        "the three channels are counted as one": lambda a, b, w: _db(3 * _kept_mse(a, b, w)),
        "the mean goes over the whole batch; every picture has a PSNR of its own": lambda a, b, w: (
            _db((((a - b) / 2).square() * w).sum() / (3 * w.sum())).expand(len(a))
        ),
        "the logarithm is the natural one; decibels want base 10": lambda a, b, w: -10 * _kept_mse(a, b, w).log(),
        "the factor is 20, which belongs to the root of the mean squared error": lambda a, b, w: 2 * _db(_kept_mse(a, b, w)),
        "the sign is flipped: a better copy must score higher": lambda a, b, w: -_db(_kept_mse(a, b, w)),
        "the error is not squared": lambda a, b, w: _db((((a - b) / 2).abs() * w).flatten(1).sum(1) / (3 * w.flatten(1).sum(1))),
    },
)
