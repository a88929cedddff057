"""The judge's school: pairs of pictures, questions about them, and the right answers.

A lesson starts from a scene and an edit of it and shows one of: the right result, nothing done, the right result with
collateral damage, a wrong edit, things drifted, another scene, a half-done blend, a soiled or blotched picture. Labels
come from the scene descriptions (`world/verdict.py`). The mixture mirrors how a few-step student fails; where earlier
students are at hand, some outputs are theirs, and the label says how near they came to the scene that was asked for
(`OwnWork`). Questions of a pair: edit and identity of the true instruction and of a hypothetical one; of the output
alone: presence of a thing, and a caption. Dense supervision on top: what each patch of either picture shows
(grounding), without which shapes are learnt an order of magnitude later (papers/log.md).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmedit.data.batches import TEXT_LENGTH, Lesson
from vlmedit.data.lesson_pictures import (
    RUINED,
    SOILED,
    SPOTLESS,
    Clarity,
    Editor,
    OwnWork,
    Softener,
    blotch,
    own_work,
    redraw,
    soil,
)
from vlmedit.data.world import Example, ground, sample_example, target_of
from vlmedit.errors import ImpossibleEdit
from vlmedit.seeds import rng_for
from vlmedit.world.edits import ALL_TYPES, EDIT_TYPES, Edit, apply_edit, sample_edit
from vlmedit.world.language import DESCRIBE, PRESENCE, Question, caption, edit_question, identity_question, instruct
from vlmedit.world.render import render
from vlmedit.world.scene import SHAPES, Scene, sample_scene
from vlmedit.world.tokenizer import END, PAD, build_tokenizer, encode
from vlmedit.world.verdict import edit_done, rest_kept

SHARES = {"right": 0.30, "same": 0.12, "collateral": 0.22, "wrong": 0.18, "drifted": 0.12, "other": 0.06}
KIND_SHARES = {k: 1.0 for k in ALL_TYPES} | {"remove": 1.5, "replace": 1.5, "move": 1.3, "nothing": 0.4, "customise": 0.6}
BLOTCH_SHARE = 0.12  # of the pictures that no generator drew
OWN_SHARE = 0.3  # of the pictures, where there are students: a student's own work; twice as many of moves
SOFT_SHARE = 0.4  # of the pictures, where there is a softener: redrawn by a generator, as a student would draw them


def _drift(scene: Scene, rng: random.Random) -> Scene:
    """Things moved or resized far beyond the tolerance, or hardly at all."""
    far = rng.random() < 0.6
    things = []
    for t in scene.things:
        if far and rng.random() < 0.7:
            angle = rng.choice(((1, 0), (0, 1), (-1, 0), (0, -1), (0.8, 0.8), (-0.8, -0.8)))
            step = rng.uniform(0.09, 0.25)
            t = replace(t, x=t.x + step * angle[0], y=t.y + step * angle[1], size=t.size * rng.choice((1, 1, 0.6, 1.5)))
        else:
            t = replace(t, x=t.x + rng.uniform(-0.015, 0.015), y=t.y + rng.uniform(-0.015, 0.015))
        things.append(t)
    return replace(scene, things=tuple(things))


def _shown(example: Example, kind: str, rng: random.Random) -> Scene:
    """The scene the output shows, by lesson kind."""
    right = target_of(example, rng)
    if kind in ("right", "own"):
        return right
    if kind == "same":
        return example.scene
    if kind == "drifted":
        return _drift(right, rng)
    if kind == "other":
        return sample_scene(rng)
    start = right if kind == "collateral" else example.scene
    for _ in range(8):
        same_type = kind == "wrong" and rng.random() < 0.7
        edit = sample_edit(start, example.edit.type if same_type else rng.choice(ALL_TYPES[:8]), rng)
        try:
            if edit is not None and edit != example.edit:
                return apply_edit(start, edit, rng)
        except ImpossibleEdit:
            continue
    return start


@dataclass(frozen=True)
class Shown:
    """All that is known of one output picture: what was asked for, what it shows, and how far it can be seen."""

    example: Example
    after: Scene  # what it shows, or a student was asked to show
    blend: float  # share of the output; the rest is the reference's
    dirt: float  # root mean square of what soiled it
    clear: Clarity
    soft: bool  # redrawn by a generator
    stained: bool
    own: OwnWork | None  # where a student made it

    @property
    def half(self) -> bool:
        return self.blend < 0.8

    @property
    def spotless(self) -> bool:
        return self.dirt < SPOTLESS

    @property
    def soiled(self) -> bool:
        return self.dirt > SOILED

    @property
    def plain(self) -> bool:
        """Whether everything in it can be asked about."""
        covered = self.half or self.stained or self.own is not None
        return self.dirt < RUINED and not covered and self.clear.clear()

    def done(self, edit: Edit) -> bool | None:
        """Whether an edit of the reference has been done; None where the picture leaves it open."""
        so = edit_done(self.example.scene, self.after, edit)
        done = so and not self.half
        if edit.type == "nothing":
            done = rest_kept(self.example.scene, self.after, edit) and not self.soiled
        if self.soft:
            return self.clear.done(edit, done)
        if self.own is not None:
            return self.own.done() if edit is self.example.edit else None
        left_open = (self.half and not so) or self.dirt >= RUINED
        if edit.type == "nothing":
            left_open = not self.spotless and not self.soiled
        if self.stained and edit.type in ("add", "replace", "customise"):
            left_open = True  # a stain can look like a thing
        return None if left_open else done

    def kept(self, edit: Edit) -> bool | None:
        """Whether all that the edit does not name is as it was; None where the picture leaves it open."""
        kept = rest_kept(self.example.scene, self.after, edit)
        if self.soft:
            return self.clear.kept(edit, kept)
        if self.own is not None:
            return self.own.kept() if edit is self.example.edit else None
        if self.soiled:
            return False
        known = not self.half or (kept and edit is self.example.edit)
        return kept if self.spotless and known else None


Rows = list[tuple[str, int]]  # questions and their answers: 1 yes, 0 no, -1 not asked


def _scenes(pairs: int, rng: random.Random, with_students: bool) -> tuple[list[Example], list[Scene], list[str]]:
    """The requests of a lesson, the scene that each output shows, and of which kind it is."""
    examples, shown, kinds = [], [], []
    for _ in range(pairs):
        example = sample_example(rng, KIND_SHARES)
        kind = rng.choices(tuple(SHARES), tuple(SHARES.values()))[0]
        share = OWN_SHARE * (2 if example.edit.type == "move" else 1)
        if with_students and example.edit.type in EDIT_TYPES and rng.random() < share:
            kind = "own"
        examples.append(example)
        kinds.append(kind)
        shown.append(_shown(example, kind, rng))
    return examples, shown, kinds


def _blend(kind: str, rng: random.Random) -> float:
    """The share of the output in a picture that may be half-done: blended with the reference."""
    if kind in ("same", "own") or rng.random() < 0.78:
        return 1.0
    return rng.choice((rng.uniform(0.15, 0.55), rng.uniform(0.82, 1)))


def _pictures(
    reference: Tensor, examples: list[Example], scenes: list[Scene], kinds: list[str], rng: random.Random,
    softener: Softener | None, editor: Editor | None,
) -> tuple[Tensor, list[Shown]]:  # fmt: skip
    """The output pictures (P, 3, S, S), and what is known of each. Noise comes from torch's global generator."""
    output = render(scenes, reference.shape[-1])
    blend = torch.tensor([_blend(kind, rng) for kind in kinds])
    whole = [float(b) == 1 for b in blend]
    soft = [softener is not None and k != "own" and w and rng.random() < SOFT_SHARE for k, w in zip(kinds, whole)]
    output, clear = redraw(output, scenes, softener, soft)
    output = torch.lerp(reference, output, blend.view(-1, 1, 1, 1))
    soiled, dirt = soil(output, rng)
    spared = [s or kind == "own" for s, kind in zip(soft, kinds)]  # what a generator drew gets no dirt on top
    output = torch.where(torch.tensor(spared).view(-1, 1, 1, 1), output, soiled)
    dirt = [0.0 if s else d for s, d in zip(spared, dirt)]
    stained = [not s and w and rng.random() < BLOTCH_SHARE for s, w in zip(spared, whole)]
    for i in (i for i, s in enumerate(stained) if s):
        clean, output[i] = output[i].clone(), blotch(output[i], scenes[i], rng)
        dirt[i] = max(dirt[i], float((output[i] - clean).square().mean().sqrt()))
    own: dict[int, OwnWork] = {}
    if rows := [i for i, kind in enumerate(kinds) if kind == "own"]:
        asked = [examples[i] for i in rows]
        output[rows] = editor(reference[rows], encode([e.instruction for e in asked], TEXT_LENGTH)).clamp(-1, 1)
        own = dict(zip(rows, own_work(asked, [scenes[i] for i in rows], output[rows])))
    facts = zip(examples, scenes, blend.tolist(), dirt, clear, soft, stained)
    return output, [Shown(*fact, own.get(i)) for i, fact in enumerate(facts)]


def _answer(question: Question, truth: bool | None) -> tuple[str, int]:
    return question.text, -1 if truth is None else int(truth == question.answer)


def _questions(shown: Shown, rng: random.Random) -> tuple[Rows, Rows]:
    """Four questions about a pair, and three about its output alone: of the true edit and of a hypothetical one,
    whether it was done and the rest kept; whether some shape is there."""
    example, pair, single = shown.example, [], []
    hypothetical = sample_edit(example.scene, rng.choice(ALL_TYPES[:9]), rng) or example.edit
    for edit in (example.edit, hypothetical):
        mine = edit is example.edit
        words = example.instruction if mine else instruct(edit, example.scene, rng)
        question, identity = edit_question(edit, words), identity_question(edit, words)
        if question.pair:
            pair.append(_answer(question, shown.done(edit)))
        else:
            pair.append((identity.text, -1))
            # `is there a ...`: yes while any of it can be seen
            removed = mine and shown.own is not None and shown.own.done()
            there = not edit_done(example.scene, shown.after, edit)
            single.append((question.text, int(there) if shown.plain or removed else -1))
        pair.append(_answer(identity, shown.kept(edit)))
    shape = rng.choice(SHAPES)
    there = any(t.shape == shape for t in shown.after.things)
    single.append((PRESENCE.format(shape), int(there) if shown.plain else -1))
    single += [(PRESENCE.format(SHAPES[0]), -1)] * (3 - len(single))
    return pair, single


def _ids(texts: Sequence[str]) -> Tensor:
    """(N, L) ids, L the words of the longest."""
    return build_tokenizer()(list(texts), padding=True, return_tensors="pt")["input_ids"]


def _captions(shown: Sequence[Shown]) -> tuple[Tensor, Tensor]:
    """Request and caption of each output (P, L), and the next tokens that are asked for (P, L), -100 elsewhere."""
    ids = _ids([f"{DESCRIBE} {caption(s.after)} {END}" for s in shown])
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    labels[:, : len(DESCRIBE.split()) - 1] = -100
    labels[labels == build_tokenizer().convert_tokens_to_ids(PAD)] = -100
    labels[[not s.plain for s in shown]] = -100
    return ids, labels


def lesson(pairs: int, side: int, *seed, softener: Softener | None = None, editor: Editor | None = None) -> Lesson:
    """Draw a lesson of `pairs` picture pairs; a `softener` redraws some of the outputs, some are an `editor`'s own
    work."""
    rng = rng_for("lesson", *seed)
    examples, scenes, kinds = _scenes(pairs, rng, editor is not None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.getrandbits(60))
        reference = render([e.scene for e in examples], side)
        output, shown = _pictures(reference, examples, scenes, kinds, rng, softener, editor)
    asked = [_questions(s, rng) for s in shown]
    pair_rows, single_rows = ([row for rows in part for row in rows] for part in zip(*asked))
    captions, caption_labels = _captions(shown)
    ground_output = ground(scenes, side // 4)
    hidden = [s.half or s.dirt > RUINED or not s.clear.clear() or s.own is not None or s.stained for s in shown]
    ground_output[hidden] = -100  # patches that show no known things
    return Lesson(
        reference=reference,
        output=output,
        questions=_ids([text for text, _ in pair_rows]),
        answers=torch.tensor([answer for _, answer in pair_rows]),
        single_questions=_ids([text for text, _ in single_rows]),
        single_answers=torch.tensor([answer for _, answer in single_rows]),
        caption=captions,
        caption_labels=caption_labels,
        ground_reference=ground([e.scene for e in examples], side // 4),
        ground_output=ground_output,
        kinds=tuple(kinds),
        types=tuple(e.edit.type for e in examples),
    )
