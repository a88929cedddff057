"""The world's drawing: scenes, edits and their words, as the batches that each trainer may see (`data.batches`).

Everything is drawn from (seed, step, rank) anew, so a training run has no data position to lose and resumes exactly.
Shapes: pictures (B, 3, S, S) in [-1, 1]; texts (B, L) ids.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from vlmedit.config import TrainConfig, WorldConfig
from vlmedit.data.batches import TEXT_LENGTH, Batch, CaptionedBatch, PairedBatch, ReadingBatch, UnpairedBatch
from vlmedit.data.requests import Request, batch_of
from vlmedit.errors import ImpossibleEdit
from vlmedit.io import to_image, to_tensor
from vlmedit.seeds import rng_for
from vlmedit.world.edits import ALL_TYPES, Edit, apply_edit, sample_edit
from vlmedit.world.language import caption, edit_question, instruct
from vlmedit.world.render import render
from vlmedit.world.scene import BACKGROUNDS, COLORS, SHAPES, SIDES, STYLES, TEXTURES, Scene, sample_scene
from vlmedit.world.tokenizer import Words, encode

HELD_OUT = "held-out"  # prefix of every evaluation stream's seed; no trainer uses it

# Share of each edit type in training. As in the released recipe, removals are drawn most often, and doing nothing 1 %.
EDIT_SHARES = {
    "add": 0.13, "remove": 0.18, "replace": 0.17, "recolor": 0.12, "texture": 0.12,
    "background": 0.09, "move": 0.10, "style": 0.08, "nothing": 0.01,
}  # fmt: skip


# What a no-pair trainer practises: local edits, or the free-form second task, this very thing in a new scene.
TASKS = {"edit": EDIT_SHARES, "customise": {"customise": 0.99, "nothing": 0.01}, "both": {**EDIT_SHARES, "customise": 0.2}}


@dataclass(frozen=True)
class Example:
    """A request: a scene, an edit of it, and the edit in words."""

    scene: Scene
    edit: Edit
    instruction: str


def jpeg(image: Tensor, quality: int) -> Tensor:
    """One picture (3, S, S) in [-1, 1] through a JPEG encoder."""
    buffer = io.BytesIO()
    to_image(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return to_tensor(Image.open(buffer))


def sample_example(rng: random.Random, kinds: Sequence[str] | dict[str, float]) -> Example:
    """Draw an edit type, then a scene that allows it. `kinds`: types, or their shares."""
    unknown = sorted(set(kinds) - set(ALL_TYPES))
    if unknown:
        raise ValueError(f"unknown edit type {', '.join(unknown)}; known: {', '.join(ALL_TYPES)}")
    names = tuple(kinds)
    kind = rng.choices(names, [kinds[k] for k in names] if isinstance(kinds, dict) else None)[0]
    while True:
        scene = sample_scene(rng)
        edit = sample_edit(scene, kind, rng)
        if edit is not None:
            try:
                apply_edit(scene, edit, random.Random(0))
            except ImpossibleEdit:
                continue
            return Example(scene, edit, instruct(edit, scene, rng))


def target_of(example: Example, rng: random.Random) -> Scene:
    """The scene the instruction asks for. For evaluation, the judge's schooling and the paired rivals."""
    for _ in range(20):
        try:
            return apply_edit(example.scene, example.edit, rng)
        except ImpossibleEdit:
            continue
    return apply_edit(example.scene, example.edit, random.Random(0))


def ground(scenes: list[Scene], grid: int) -> Tensor:
    """What each patch shows: (B, grid * grid, 3) indices of shape, color and texture, counted from 1; 0 is
    background."""
    labels = torch.zeros(len(scenes), grid, grid, 3, dtype=torch.long)
    center = (torch.arange(grid) + 0.5) / grid
    for b, scene in enumerate(scenes):
        for t in scene.things:
            reach = t.size + 0.25 / grid
            inside = ((center - t.y).abs() <= reach)[:, None] & ((center - t.x).abs() <= reach)[None]
            shown = SHAPES.index(t.shape) + 1, tuple(COLORS).index(t.color) + 1, TEXTURES.index(t.texture) + 1
            labels[b, inside] = torch.tensor(shown)
    return labels.flatten(1, 2)


def captioned_batch(batch: int, side: int, *seed) -> CaptionedBatch:
    """Pictures with their captions."""
    rng = rng_for("captioned", *seed)
    scenes = [sample_scene(rng) for _ in range(batch)]
    return CaptionedBatch(render(scenes, side), encode([caption(s) for s in scenes], TEXT_LENGTH), ground(scenes, side // 4))


def references(examples: Sequence[Example], side: int, rng: random.Random, jpeg_share: float = 0.2) -> Tensor:
    """Rendered references, some of them through JPEG."""
    images = render([e.scene for e in examples], side)
    for i in range(len(images)):
        if rng.random() < jpeg_share:
            images[i] = jpeg(images[i], rng.randrange(70, 96))
    return images


FULFILLABLE_TYPES = ("recolor", "texture", "background", "move", "style")  # can be asked for when it is so already


def as_fulfilled(example: Example, rng: random.Random) -> Example:
    """The same request of a picture that fulfils it already, so that nothing is to be done."""
    scene = apply_edit(example.scene, example.edit, rng)
    return Example(scene, Edit("nothing"), instruct(example.edit, scene, rng))


def draw_examples(batch: int, rng: random.Random, *seed, kinds=None, request_limit: int | None = None, fulfilled_share: float = 0.0) -> list[Example]:
    """The requests of one batch. `request_limit` limits the data to that many distinct examples, drawn with replacement (for data
    studies); the first part of the seed, a run's own, says which. `fulfilled_share` is the share that asks for what is so already,
    and is then a "do nothing" in the words of a real request."""
    kinds = kinds or EDIT_SHARES
    if request_limit is None:
        examples = [sample_example(rng, kinds) for _ in range(batch)]
    else:
        examples = [sample_example(rng_for("pool", *seed[:1], rng.randrange(request_limit)), kinds) for _ in range(batch)]
    found = []
    for e in examples:
        fulfilled = fulfilled_share and e.edit.type in FULFILLABLE_TYPES and rng.random() < fulfilled_share
        found.append(as_fulfilled(e, rng) if fulfilled else e)
    return found


def unpaired_batch(batch: int, side: int, *seed, **which) -> UnpairedBatch:
    """Requests without targets; `which` of them is said as to `draw_examples`: `kinds`, `request_limit`, `fulfilled_share`."""
    rng = rng_for("unpaired", *seed)
    examples = draw_examples(batch, rng, *seed, **which)
    return batch_of_examples(examples, references(examples, side, rng))


def from_example(example: Example) -> Request:
    """A request of the world of shapes in plain words."""
    edit = example.edit
    after = apply_edit(example.scene, edit, random.Random(0))
    thing = f"a {edit.shape}" if not edit_question(edit, example.instruction).pair else None
    return Request(example.instruction, caption(example.scene), caption(after), edit.type, thing)


def batch_of_examples(examples: Sequence[Example], reference: Tensor) -> UnpairedBatch:
    """These requests, of these pictures, as the no-pair trainer sees them: texts are words of the world."""
    words = Words(TEXT_LENGTH)
    return batch_of([from_example(e) for e in examples], reference, words, words, "shapes")


SLOTS = {
    "type": ALL_TYPES, "shape": SHAPES, "color": tuple(COLORS), "texture": TEXTURES, "new_shape": SHAPES,
    "background": tuple(BACKGROUNDS), "side": tuple(SIDES), "style": STYLES,
}  # fmt: skip


def reading_batch(batch: int, *seed) -> ReadingBatch:
    """Instructions and what they ask for. No pictures."""
    rng = rng_for("reading", *seed)
    examples = [sample_example(rng, ALL_TYPES) for _ in range(batch)]
    labels = [[_number(words, getattr(e.edit, slot)) for slot, words in SLOTS.items()] for e in examples]
    return ReadingBatch(encode([e.instruction for e in examples], TEXT_LENGTH), torch.tensor(labels))


def _number(words: Sequence[str], word: str | None) -> int:
    return 0 if word is None else words.index(word) + 1


def paired_batch(batch: int, side: int, *seed, kinds=None) -> PairedBatch:
    """Requests with exact targets, drawn from the same stream as `unpaired_batch`."""
    rng = rng_for("unpaired", *seed)
    examples = [sample_example(rng, kinds or EDIT_SHARES) for _ in range(batch)]
    reference = references(examples, side, rng)
    target = render([target_of(e, rng_for("target", *seed, i)) for i, e in enumerate(examples)], side)
    instruction = encode([e.instruction for e in examples], TEXT_LENGTH)
    return PairedBatch(reference, instruction, target, tuple(e.edit.type for e in examples))


def held_out(n: int, seed: int, kinds: Sequence[str]) -> list[Example]:
    """The evaluation set: `n` requests, edit types in turn, from a stream no trainer draws from."""
    rng = rng_for(HELD_OUT, seed)
    return [sample_example(rng, (kinds[i % len(kinds)],)) for i in range(n)]


def shares(world: WorldConfig) -> dict[str, float]:
    """How often each edit type is drawn, relative to the others."""
    return {kind: share * (2 if kind in world.emphasis else 1) for kind, share in TASKS[world.task].items()}


def request_settings(world: WorldConfig) -> dict:
    """Which requests a run draws, as `draw_examples` takes it."""
    return {"kinds": shares(world), "request_limit": world.request_limit, "fulfilled_share": world.fulfilled_share}


Draw = Callable[..., Batch]  # (samples, *seed) -> a batch


class WorldData:
    """The world as a trainer's data. `draws` adds kinds of batches that live elsewhere, or draws one in another way."""

    def __init__(self, config: TrainConfig, draws: dict[type, Draw] | None = None):
        self.seed, world = config.seed, config.data
        self.draws: dict[type, Draw] = {
            CaptionedBatch: lambda size, *key: captioned_batch(size, world.side, *key),
            PairedBatch: lambda size, *key: paired_batch(size, world.side, *key),
            ReadingBatch: reading_batch,
            UnpairedBatch: lambda size, *key: unpaired_batch(size, world.side, *key, **request_settings(world)),
            **(draws or {}),
        }

    def gives(self, kind: type) -> bool:
        return kind in self.draws

    def batches(self, kind: type, key: tuple, size: int, total: int, mine: Sequence[int]) -> Iterator[tuple[int, Batch]]:
        index, *more = key
        for number in mine:
            yield number, self.draws[kind](size, self.seed, index, number, *more)

    def labels(self, batch: UnpairedBatch) -> list[tuple[str, str]]:
        return list(zip(batch.types, Words(TEXT_LENGTH).look_up(batch.instruction), strict=True))

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass
