"""What becomes of a lesson's output pictures, and how much of their scene they still show.

Outputs of a lesson (`data.judge_lessons`) are soiled, stained, redrawn by a generator or edited by an earlier student,
as a few-step student's pictures are. Where a picture was drawn by a network, its label cannot be read off the scene:
`Clarity` says how near each redrawn thing is to what it was, `OwnWork` how near a student came to the scene that was
asked for.

Shapes: pictures (B, 3, S, S) in [-1, 1].
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmedit.data.batches import TEXT_LENGTH
from vlmedit.data.world import Example
from vlmedit.world.edits import Edit
from vlmedit.world.language import caption
from vlmedit.world.render import render
from vlmedit.world.scene import COLORS, SHAPES, TEXTURES, Scene, Thing, can_wear
from vlmedit.world.tokenizer import encode

# Root mean square of dirt, [-1, 1] units. Up to SPOTLESS a picture still counts as the same (the adversary's radius
# lies below); from SOILED on it does not; beyond RUINED what it shows is not asked about.
SPOTLESS, SOILED, RUINED = 0.04, 0.075, 0.20

# How far a redrawn thing is from what it was, over its distance to the nearest other thing it could be taken for
# (another shape, texture or color, or none): below LIKE it still is that thing, above UNLIKE it is no longer, between
# them nobody is asked.
LIKE, UNLIKE = 0.65, 0.85
FAR = 1.1  # of a student's own work: from here on it is nearer to another thing, and the oracle agrees on nine of ten
BARE = 0.08  # root mean square error of the background up to which nothing has been added to it
STAIN = 0.3  # the same of its worst five by five pixels, from which on something has been
SWAPPED = 0.2  # root mean square difference to what stood at a place, from which on it is something else

Softener = Callable[[Tensor, Tensor], Tensor]  # pictures (B, 3, S, S), caption ids (B, L) -> pictures redrawn
Editor = Callable[[Tensor, Tensor], Tensor]  # references (B, 3, S, S), instruction ids (B, L) -> edits


def soil(images: Tensor, rng: random.Random) -> tuple[Tensor, list[float]]:
    """Smudge, speckle or blur some pictures; returns them and the root mean square of the change."""
    out = images.clone()
    for i in range(len(images)):
        dice = rng.random()
        if dice < 0.3:
            cells = rng.choice([n for n in (2, 4, 8, 16, 32) if n <= images.shape[-1]])
            scale = rng.uniform(0, 0.35) if rng.random() < 0.5 else rng.uniform(0, 0.15)
            dirt = torch.randn(1, 3, cells, cells) * scale
            if cells < images.shape[-1]:
                dirt = F.interpolate(dirt, size=images.shape[-2:], mode=rng.choice(("bilinear", "nearest")))
            out[i] = (images[i] + dirt[0]).clamp(-1, 1)
        elif dice < 0.45:
            blurred = images[i][None]
            for _ in range(rng.choice((1, 1, 2, 3))):
                blurred = F.avg_pool2d(F.pad(blurred, (1, 1, 1, 1), mode="replicate"), 3, 1)
            out[i] = torch.lerp(images[i], blurred[0], rng.uniform(0.2, 1))
    return out, (out - images).flatten(1).square().mean(1).sqrt().tolist()


def blotch(picture: Tensor, scene: Scene, rng: random.Random) -> Tensor:
    """A picture (3, S, S) with one or two colored stains between its things: more than any small perturbation, yet
    nothing of the world. A student can bribe a judge with such a mark; the judge has to have seen that it proves
    nothing."""
    side = picture.shape[-1]
    center = (torch.arange(side) + 0.5) / side
    free = torch.ones(side, side)
    for t in scene.things:
        free[near(t, side)] = 0
    out = picture
    for _ in range(rng.choice((1, 1, 2))):
        x, y = rng.random(), rng.random()
        wide, high = rng.uniform(0.05, 0.2), rng.uniform(0.05, 0.2)
        bump = torch.exp(-(((center - y) / high) ** 4))[:, None] * torch.exp(-(((center - x) / wide) ** 4))[None]
        cells = rng.choice((4, 8, 16))
        ragged = F.interpolate(torch.randn(1, 1, cells, cells), size=(side, side), mode="bilinear")[0, 0]
        alpha = (bump * (ragged * rng.uniform(1, 4) + rng.uniform(0, 1)).sigmoid() * rng.uniform(0.5, 1.4)).clamp(max=1) * free
        color = torch.tensor([rng.choice((-1.0, 1.0, rng.uniform(-1, 1))) for _ in range(3)])
        out = torch.lerp(out, color.view(3, 1, 1).expand_as(out), alpha)
    return out


@dataclass(frozen=True)
class Clarity:
    """How much of its scene a redrawn picture still shows: per thing the ratio of LIKE and UNLIKE; the background's
    error."""

    things: dict[str, float] = field(default_factory=dict)
    background: float = 0.0

    def worst(self, free: str | None = None) -> float:
        return max((e for shape, e in self.things.items() if shape != free), default=0.0)

    def clear(self) -> bool:
        return self.worst() < LIKE and self.background < BARE

    def done(self, edit: Edit, done: bool) -> bool | None:
        """The answer to the edit question where the scenes say `done`; None where the picture leaves it open."""
        if not done or edit.type in ("remove", "background", "style", "nothing", "customise"):
            return done if self.clear() else None
        subject = self.things.get(edit.new_shape or edit.shape, 1.0)
        if subject < LIKE and self.background < BARE:
            return True
        return False if subject > UNLIKE and edit.type in ("add", "replace", "texture", "move") else None

    def kept(self, edit: Edit, kept: bool) -> bool | None:
        """The answer to the identity question where the scenes say `kept`; None where the picture leaves it open."""
        worst = self.worst(free={"add": edit.shape, "replace": edit.new_shape}.get(edit.type))
        if not kept or worst > UNLIKE or self.background > 2 * BARE:
            return False
        return True if worst < LIKE and self.background < BARE else None


@dataclass(frozen=True)
class OwnWork:
    """A student's edit beside the scene it was asked for: the answers to both questions, None where the picture leaves
    them open. Nobody knows where an added thing should be, so of additions only the other things are looked at."""

    edit: Edit
    clear: Clarity  # of the scene asked for; the place of a thing that was to leave is not background
    leftover: float  # root mean square error at that place
    instead: float  # the same against what stood there before
    stain: float  # the same of the worst five by five pixels of background

    def done(self) -> bool | None:
        tidy = self.clear.background < BARE and self.leftover < BARE
        if self.edit.type == "add":
            return None
        if self.edit.type in ("replace", "texture", "move", "recolor"):
            subject = self.clear.things[self.edit.new_shape or self.edit.shape]
            if subject > FAR and self.edit.type != "recolor":
                return False
            return True if subject < LIKE and tidy else None
        return True if self.clear.clear() and tidy else None

    def kept(self) -> bool | None:
        subject = self.edit.new_shape or self.edit.shape
        stained = self.stain > STAIN and self.edit.type not in ("add", "background", "style")
        stained |= self.edit.type == "remove" and self.leftover > STAIN and self.instead > SWAPPED
        if self.clear.worst(free=subject) > FAR or stained:
            return False
        tidy = self.clear.background < BARE and self.leftover < BARE
        return True if self.edit.type != "add" and self.clear.worst() < LIKE and tidy else None


def own_work(examples: list[Example], targets: list[Scene], drawn: Tensor) -> list[OwnWork]:
    """A student's edits (B, 3, S, S) of the examples, beside their targets."""
    side = drawn.shape[-1]
    clean, before = render(targets, side), render([e.scene for e in examples], side)
    origins = [
        tuple(t for t in e.scene.things if t.shape == e.edit.shape) if e.edit.type in ("move", "remove") else ()
        for e in examples
    ]
    found = clarity(drawn, clean, targets, origins)
    nowhere = torch.zeros(side, side, dtype=torch.bool)
    masks = [torch.stack([nowhere, *(near(t, side) for t in target.things)]).any(0) for target in targets]
    errors, changes = ((drawn - picture).square().mean(1) for picture in (clean, before))
    works = []
    for example, thing, clear, error, change, taken in zip(examples, origins, found, errors, changes, masks):
        there = near(thing[0], side) & ~taken if thing else torch.zeros_like(taken)
        leftover, instead = (float(e[there].mean().sqrt()) if there.any() else 0.0 for e in (error, change))
        stain = F.avg_pool2d((error * ~(taken | there))[None], 5, 1).max().sqrt()
        works.append(OwnWork(example.edit, clear, leftover, instead, float(stain)))
    return works


def mistakable(scene: Scene, index: int) -> list[Scene]:
    """The scene with one thing missing, or of another shape, texture or color."""
    thing = scene.things[index]
    others = [replace(thing, shape=s) for s in SHAPES if s != thing.shape and can_wear(s, thing.texture)]
    others += [replace(thing, texture=t) for t in TEXTURES if t != thing.texture and can_wear(thing.shape, t)]
    others += [replace(thing, color=c) for c in COLORS if c != thing.color]
    without = (*scene.things[:index], *scene.things[index + 1 :])
    return [replace(scene, things=without)] + [replace(scene, things=(*without, other)) for other in others]


def near(thing: Thing, side: int) -> Tensor:
    """Mask (S, S) of the square around a thing, a pixel and a half wider than it."""
    center = (torch.arange(side) + 0.5) / side
    reach = thing.size + 1.5 / side
    return ((center - thing.y).abs() <= reach)[:, None] & ((center - thing.x).abs() <= reach)[None]


def clarity(pictures: Tensor, clean: Tensor, scenes: list[Scene], apart: Sequence[Sequence[Thing]] | None = None) -> list[Clarity]:
    """Compare redrawn pictures (B, 3, S, S) with the clean ones of their scenes, thing by thing. The places of the
    things in `apart`, per picture, do not count as background."""
    side = pictures.shape[-1]
    found, boxes, owners, others = [], [], [], []
    for i, scene in enumerate(scenes):
        free = torch.ones(side, side, dtype=torch.bool)
        for t in apart[i] if apart else ():
            free &= ~near(t, side)
        for k, t in enumerate(scene.things):
            box = near(t, side)
            free &= ~box
            alternatives = mistakable(scene, k)
            boxes += [box] * len(alternatives)
            owners += [(i, t.shape)] * len(alternatives)
            others += alternatives
        error = (pictures[i] - clean[i]).square().mean(0)
        found.append(Clarity({}, float(error[free].mean().sqrt()) if free.any() else 0.0))
    rows = torch.tensor([i for i, _ in owners])
    weight = torch.stack(boxes).unsqueeze(1)
    own, other = (
        ((pictures[rows] - drawn).square() * weight).flatten(1).sum(1).sqrt() for drawn in (clean[rows], render(others, side))
    )
    for (i, shape), ratio in zip(owners, (own / other.clamp(min=1e-6)).tolist()):
        found[i].things[shape] = max(found[i].things.get(shape, 0.0), ratio)
    return found


def redraw(pictures: Tensor, scenes: list[Scene], softener: Softener | None, chosen: list[bool]) -> tuple[Tensor, list[Clarity]]:
    """Let a generator redraw the chosen pictures, some with another picture's caption; says how clear each still is."""
    clear = [Clarity() for _ in scenes]
    rows = [i for i, c in enumerate(chosen) if c]
    if softener is None or not rows:
        return pictures, clear
    captions = [caption(scenes[i]) for i in rows]
    half = len(rows) // 4
    captions[:half] = captions[1 : half + 1]  # a quarter are drawn after another's words
    drawn = softener(pictures[rows], encode(captions, TEXT_LENGTH)).clamp(-1, 1)
    for i, c in zip(rows, clarity(drawn, pictures[rows], [scenes[i] for i in rows])):
        clear[i] = c
    return pictures.index_copy(0, torch.tensor(rows), drawn), clear
