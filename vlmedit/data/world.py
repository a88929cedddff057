"""What each trainer may see, as batches of tensors.

* `CaptionedBatch`: picture and caption, for the text-to-image teacher.
* `UnpairedBatch`: the no-pair path. A reference, an instruction, a target *caption*, and two questions: no field could
  hold a target image, and a test says so.
* `PairedBatch`: reference, instruction and exact target, for the paired rivals alone.

Everything is drawn from (seed, step, rank) anew, so a training run has no data position to lose and resumes exactly.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from PIL import Image
from torch import Tensor

from vlmedit.errors import ImpossibleEdit
from vlmedit.io import to_image, to_tensor
from vlmedit.networks.text import encode
from vlmedit.world.edits import ALL_TYPES, Edit, apply_edit, sample_edit
from vlmedit.world.language import Question, caption, edit_question, identity_question, instruct
from vlmedit.world.render import render
from vlmedit.world.scene import BACKGROUNDS, COLORS, SHAPES, SIDES, STYLES, TEXTURES, Scene, sample_scene

GROUND_CLASSES = (len(SHAPES) + 1, len(COLORS) + 1, len(TEXTURES) + 1)  # of a patch, each with "nothing"
TEXT_LENGTH = 24  # words of a caption, an instruction or a question, padded
HELD_OUT = "held-out"  # prefix of every evaluation stream's seed; no trainer uses it

# Share of each edit type in training. As in the released recipe, removals are drawn most often, and doing nothing 1 %.
EDIT_SHARES = {
    "add": 0.13, "remove": 0.18, "replace": 0.17, "recolor": 0.12, "texture": 0.12,
    "background": 0.09, "move": 0.10, "style": 0.08, "nothing": 0.01,
}  # fmt: skip


# What a no-pair trainer practises: local edits, or the free-form second task, this very thing in a new scene.
TASKS = {"edit": EDIT_SHARES, "customise": {"customise": 0.99, "nothing": 0.01}, "both": {**EDIT_SHARES, "customise": 0.2}}


class Batch:
    """Tensors move with `.to(device)`; other fields stay."""

    def to(self, device):
        return type(self)(**{f.name: v.to(device) if isinstance(v := getattr(self, f.name), Tensor) else v for f in fields(self)})

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))


@dataclass(frozen=True)
class CaptionedBatch(Batch):
    image: Tensor  # (B, 3, S, S) in [-1, 1]
    caption: Tensor  # (B, L) ids
    ground: Tensor  # (B, (S / 4)^2, 3): what each patch shows, see `ground`


@dataclass(frozen=True)
class UnpairedBatch(Batch):
    reference: Tensor  # (B, 3, S, S) in [-1, 1]
    instruction: Tensor  # (B, L) ids
    reference_caption: Tensor  # (B, L) ids: what the reference shows
    target_caption: Tensor  # (B, L) ids: what the edited picture would show
    edit_question: Tensor  # (B, L) ids
    edit_answer: Tensor  # (B,) 1 where "yes" is right
    edit_pair: Tensor  # (B,) 1 where the question is about both pictures
    identity_question: Tensor  # (B, L) ids
    nothing: Tensor  # (B,) 1 where the instruction asks for no change
    types: tuple[str, ...]


@dataclass(frozen=True)
class PairedBatch(Batch):
    reference: Tensor
    instruction: Tensor
    target: Tensor  # (B, 3, S, S): what the no-pair trainer never sees
    types: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """A request: a scene, an edit of it, and the edit in words."""

    scene: Scene
    edit: Edit
    instruction: str


def rng_for(*parts) -> random.Random:
    """A generator that depends on nothing but its parts."""
    return random.Random("/".join(str(p) for p in parts))


def seed_torch(*parts) -> None:
    """Seed torch's global generator from the parts."""
    torch.manual_seed(rng_for(*parts).getrandbits(62))


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
    """What each patch shows: (B, grid * grid, 3) indices of shape, color and texture, counted from 1; 0 is background."""
    labels = torch.zeros(len(scenes), grid, grid, 3, dtype=torch.long)
    center = (torch.arange(grid) + 0.5) / grid
    for b, scene in enumerate(scenes):
        for t in scene.things:
            reach = t.size + 0.25 / grid
            inside = ((center - t.y).abs() <= reach)[:, None] & ((center - t.x).abs() <= reach)[None]
            labels[b, inside] = torch.tensor((SHAPES.index(t.shape) + 1, tuple(COLORS).index(t.color) + 1, TEXTURES.index(t.texture) + 1))
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


SETTLED_TYPES = ("recolor", "texture", "background", "move", "style")  # can be asked for when it is so already


def settle(example: Example, rng: random.Random) -> Example:
    """The same request of a picture that fulfils it already, so that nothing is to be done."""
    scene = apply_edit(example.scene, example.edit, rng)
    return Example(scene, Edit("nothing"), instruct(example.edit, scene, rng))


def unpaired_batch(batch: int, side: int, *seed, kinds=None, pool: int | None = None, settled: float = 0.0) -> UnpairedBatch:
    """Requests without targets. `pool` limits the data to that many distinct examples, drawn with replacement (for data studies); the first
    part of the seed, a run's own, says which. `settled` is the share that asks for what is so already, and is then a "do nothing" in the words of a real request."""
    rng = rng_for("unpaired", *seed)
    kinds = kinds or EDIT_SHARES
    if pool is None:
        examples = [sample_example(rng, kinds) for _ in range(batch)]
    else:
        examples = [sample_example(rng_for("pool", *seed[:1], rng.randrange(pool)), kinds) for _ in range(batch)]
    examples = [settle(e, rng) if settled and e.edit.type in SETTLED_TYPES and rng.random() < settled else e for e in examples]
    return batch_of(examples, references(examples, side, rng))


def batch_of(examples: Sequence[Example], reference: Tensor) -> UnpairedBatch:
    """These requests, of these pictures, as the no-pair trainer sees them."""
    edit_qs: list[Question] = [edit_question(e.edit, e.instruction) for e in examples]
    identity_qs = [identity_question(e.edit, e.instruction) for e in examples]
    ids = lambda texts: encode(list(texts), TEXT_LENGTH)
    return UnpairedBatch(
        reference=reference,
        instruction=ids(e.instruction for e in examples),
        reference_caption=ids(caption(e.scene) for e in examples),
        target_caption=ids(caption(apply_edit(e.scene, e.edit, random.Random(0))) for e in examples),
        edit_question=ids(q.text for q in edit_qs),
        edit_answer=torch.tensor([float(q.answer) for q in edit_qs]),
        edit_pair=torch.tensor([float(q.pair) for q in edit_qs]),
        identity_question=ids(q.text for q in identity_qs),
        nothing=torch.tensor([float(e.edit.type == "nothing") for e in examples]),
        types=tuple(e.edit.type for e in examples),
    )


SLOTS = {
    "type": ALL_TYPES, "shape": SHAPES, "color": tuple(COLORS), "texture": TEXTURES, "new_shape": SHAPES,
    "background": tuple(BACKGROUNDS), "side": tuple(SIDES), "style": STYLES,
}  # fmt: skip


def reading_batch(batch: int, *seed) -> tuple[Tensor, Tensor]:
    """Instructions (B, L) ids and what they ask for: (B, slots) indices from 1, 0 where a slot is not named. No pictures."""
    rng = rng_for("reading", *seed)
    examples = [sample_example(rng, ALL_TYPES) for _ in range(batch)]
    index = lambda words, word: 0 if word is None else words.index(word) + 1
    labels = [[index(words, getattr(e.edit, slot)) for slot, words in SLOTS.items()] for e in examples]
    return encode([e.instruction for e in examples], TEXT_LENGTH), torch.tensor(labels)


def paired_batch(batch: int, side: int, *seed, kinds=None) -> PairedBatch:
    """Requests with exact targets, drawn from the same stream as `unpaired_batch`."""
    rng = rng_for("unpaired", *seed)
    examples = [sample_example(rng, kinds or EDIT_SHARES) for _ in range(batch)]
    reference = references(examples, side, rng)
    target = render([target_of(e, rng_for("target", *seed, i)) for i, e in enumerate(examples)], side)
    return PairedBatch(reference, encode([e.instruction for e in examples], TEXT_LENGTH), target, tuple(e.edit.type for e in examples))


def held_out(n: int, seed: int, kinds: Sequence[str]) -> list[Example]:
    """The evaluation set: `n` requests, edit types in turn, from a stream no trainer draws from."""
    rng = rng_for(HELD_OUT, seed)
    return [sample_example(rng, (kinds[i % len(kinds)],)) for i in range(n)]
