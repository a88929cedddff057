"""The judge's school: pairs of pictures, questions about them, and the right answers.

A lesson starts from a scene and an edit of it and shows one of: the right result, nothing done, the right result with
collateral damage, a wrong edit, things drifted, another scene, a half-done blend, a soiled or blotched picture. Labels come
from the scene descriptions (`world/verdict.py`). The mixture mirrors how a few-step student fails; where earlier students are
at hand, some outputs are theirs, and the label says how near they came to the scene that was asked for (`OwnWork`).
Questions of a pair: edit and identity of the true instruction and of a hypothetical one; of the output alone: presence
of a thing, and a caption. Dense supervision on top: what each patch of either picture shows (grounding), without which
shapes are learnt an order of magnitude later (papers/log.md).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmedit.data.world import TEXT_LENGTH, Batch, Example, ground, rng_for, sample_example, target_of
from vlmedit.errors import ImpossibleEdit
from vlmedit.networks.text import END, NO, PAD, YES, build_tokenizer, encode
from vlmedit.world.edits import ALL_TYPES, EDIT_TYPES, Edit, apply_edit, sample_edit
from vlmedit.world.language import DESCRIBE, PRESENCE, Question, caption, edit_question, identity_question, instruct
from vlmedit.world.render import render
from vlmedit.world.scene import COLORS, SHAPES, TEXTURES, Scene, Thing, can_wear, sample_scene
from vlmedit.world.verdict import edit_done, rest_kept

SHARES = {"right": 0.30, "same": 0.12, "collateral": 0.22, "wrong": 0.18, "drifted": 0.12, "other": 0.06}
KIND_SHARES = {k: 1.0 for k in ALL_TYPES} | {"remove": 1.5, "replace": 1.5, "move": 1.3, "nothing": 0.4, "customise": 0.6}


@dataclass(frozen=True)
class Lesson(Batch):
    """P pairs with Q questions each (P * Q rows, pair-major), and S single-picture rows."""

    reference: Tensor  # (P, 3, S, S)
    output: Tensor  # (P, 3, S, S)
    questions: Tensor  # (P * 4, L) ids about both pictures; rows of removals' edit questions are in `single`
    answers: Tensor  # (P * 4,) 1 yes, 0 no, -1 not asked
    single_questions: Tensor  # (P * 3, L) ids about the output alone
    single_answers: Tensor  # (P * 3,)
    caption: Tensor  # (P, L) request and caption of the output
    caption_labels: Tensor  # (P, L) next tokens, -100 where not asked
    ground_reference: Tensor  # (P, (S / 4)^2, 3) shape, color, texture per patch, 0 nothing, -100 not asked
    ground_output: Tensor
    kinds: tuple[str, ...]
    types: tuple[str, ...]


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
    """A picture (3, S, S) with one or two colored stains between its things: more than any small perturbation, yet nothing of the
    world. A student can bribe a judge with such a mark; the judge has to have seen that it proves nothing."""
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


# Root mean square of dirt, [-1, 1] units. Up to SPOTLESS a picture still counts as the same (the adversary's radius lies
# below); from SOILED on it does not; beyond RUINED what it shows is not asked about.
SPOTLESS, SOILED, RUINED = 0.04, 0.075, 0.20

BLOTCH_SHARE = 0.12  # of the pictures that no generator drew
OWN_SHARE = 0.3  # of the pictures, where there are students: a student's own work; twice as many of moves
SOFT_SHARE = 0.4  # of the pictures, where there is a softener: redrawn by a generator, as a student would draw them
# How far a redrawn thing is from what it was, over its distance to the nearest other thing it could be taken for (another shape,
# texture or color, or none): below LIKE it still is that thing, above UNLIKE it is no longer, between them nobody is asked.
LIKE, UNLIKE = 0.65, 0.85
FAR = 1.1  # of a student's own work: from here on it is nearer to another thing, and the oracle agrees on nine of ten
BARE = 0.08  # root mean square error of the background up to which nothing has been added to it
STAIN = 0.3  # the same of its worst five by five pixels, from which on something has been
SWAPPED = 0.2  # root mean square difference to what stood at a place, from which on it is something else

Softener = Callable[[Tensor, Tensor], Tensor]  # pictures (B, 3, S, S), caption ids (B, L) -> pictures redrawn
Editor = Callable[[Tensor, Tensor], Tensor]  # references (B, 3, S, S), instruction ids (B, L) -> edits


@dataclass(frozen=True)
class Clarity:
    """How much of its scene a redrawn picture still shows: per thing the ratio of LIKE and UNLIKE; the background's error."""

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
    """A student's edit beside the scene it was asked for: the answers to both questions, None where the picture leaves them open.
    Nobody knows where an added thing should be, so of additions only the other things are looked at."""

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
    origins = [tuple(t for t in e.scene.things if t.shape == e.edit.shape) if e.edit.type in ("move", "remove") else () for e in examples]
    found = clarity(drawn, clean, targets, origins)
    masks = [torch.stack([near(t, side) for t in target.things] or [torch.zeros(side, side, dtype=torch.bool)]).any(0) for target in targets]
    works = []
    error_of = lambda picture: (drawn - picture).square().mean(1)
    for example, thing, clear, error, change, taken in zip(examples, origins, found, error_of(clean), error_of(before), masks):
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
    """Compare redrawn pictures (B, 3, S, S) with the clean ones of their scenes, thing by thing. The places of the things in
    `apart`, per picture, do not count as background."""
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
    distance = lambda a, b: ((a - b).square() * weight).flatten(1).sum(1).sqrt()
    own, other = distance(pictures[rows], clean[rows]), distance(pictures[rows], render(others, side))
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


def lesson(pairs: int, side: int, *seed, softener: Softener | None = None, editor: Editor | None = None) -> Lesson:
    """Draw a lesson of `pairs` picture pairs; a `softener` redraws some of the outputs, some are an `editor`'s own work."""
    rng = rng_for("lesson", *seed)
    torch_rng = torch.random.fork_rng(devices=[])
    tokenizer = build_tokenizer()
    examples, shown, kinds = [], [], []
    for _ in range(pairs):
        example = sample_example(rng, KIND_SHARES)
        kind = rng.choices(tuple(SHARES), tuple(SHARES.values()))[0]
        if editor is not None and example.edit.type in EDIT_TYPES and rng.random() < OWN_SHARE * (2 if example.edit.type == "move" else 1):
            kind = "own"
        examples.append(example)
        kinds.append(kind)
        shown.append(_shown(example, kind, rng))
    with torch_rng:
        torch.manual_seed(rng.getrandbits(60))
        reference = render([e.scene for e in examples], side)
        output = render(shown, side)
        # half-done: the output blended with the reference
        blend = torch.tensor([1.0 if kind in ("same", "own") or rng.random() < 0.78 else rng.choice((rng.uniform(0.15, 0.55), rng.uniform(0.82, 1))) for kind in kinds])
        soft = [softener is not None and kind != "own" and float(b) == 1 and rng.random() < SOFT_SHARE for kind, b in zip(kinds, blend)]
        output, clear = redraw(output, shown, softener, soft)
        output = torch.lerp(reference, output, blend.view(-1, 1, 1, 1))
        soiled_output, dirt = soil(output, rng)
        own_rows = [i for i, kind in enumerate(kinds) if kind == "own"]
        clean_room = [s or kind == "own" for s, kind in zip(soft, kinds)]
        output = torch.where(torch.tensor(clean_room).view(-1, 1, 1, 1), output, soiled_output)
        dirt = [0.0 if s else d for s, d in zip(clean_room, dirt)]
        stained = [not c and float(b) == 1 and rng.random() < BLOTCH_SHARE for c, b in zip(clean_room, blend)]
        for i in (i for i, s in enumerate(stained) if s):
            clean_picture, output[i] = output[i].clone(), blotch(output[i], shown[i], rng)
            dirt[i] = max(dirt[i], float((output[i] - clean_picture).square().mean().sqrt()))
        own: dict[int, OwnWork] = {}
        if own_rows:
            mine = [examples[i] for i in own_rows]
            drawn = editor(reference[own_rows], encode([e.instruction for e in mine], TEXT_LENGTH)).clamp(-1, 1)
            output[own_rows] = drawn
            own = dict(zip(own_rows, own_work(mine, [shown[i] for i in own_rows], drawn)))

    pair_rows: list[tuple[str, int]] = []
    single_rows: list[tuple[str, int]] = []
    captions: list[tuple[str, bool]] = []
    unseen: list[bool] = []  # outputs whose patches show no known things

    def label(question: Question, truth: bool, asked: bool) -> tuple[str, int]:
        return question.text, int(truth == question.answer) if asked else -1

    for i, (example, after) in enumerate(zip(examples, shown)):
        before = example.scene
        half = float(blend[i]) < 0.8
        clean, spotless, soiled = dirt[i] < RUINED, dirt[i] < SPOTLESS, dirt[i] > SOILED
        plain = clean and not half and not stained[i] and i not in own and clear[i].clear()  # everything in it can be asked about
        hypothetical = sample_edit(before, rng.choice(ALL_TYPES[:9]), rng) or example.edit
        asked_single: list[tuple[str, int]] = []
        for edit in (example.edit, hypothetical):
            words = example.instruction if edit is example.edit else instruct(edit, before, rng)
            question, identity = edit_question(edit, words), identity_question(edit, words)
            done, kept = edit_done(before, after, edit), rest_kept(before, after, edit)
            if half:
                done, kept_known = False, rest_kept(before, after, edit) and edit is example.edit
            else:
                kept_known = True
            if edit.type == "nothing":
                done = kept and not soiled
            # an edit that a half blend or heavy dirt leaves open is not asked about
            open_edit = (half and not edit_done(before, after, edit)) or (not clean)
            if edit.type == "nothing":
                open_edit = not spotless and not soiled
            if stained[i] and edit.type in ("add", "replace", "customise"):
                open_edit = True  # a stain can look like a thing
            if soft[i] or i in own:
                verdict = clear[i].done(edit, done) if soft[i] else own[i].done() if edit is example.edit else None
                done, open_edit = bool(verdict), verdict is None
            row = label(question, done, not open_edit)
            if question.pair:
                pair_rows.append(row)
            else:
                pair_rows.append((identity.text, -1))
                # `is there a ...`: yes while any of it can be seen
                removed = i in own and edit is example.edit and own[i].done()
                asked_single.append((question.text, int(not edit_done(before, after, edit)) if plain or removed else -1))
            kept_truth, asked = kept and not soiled, (spotless and kept_known) or soiled
            if soft[i] or i in own:
                verdict = clear[i].kept(edit, kept) if soft[i] else own[i].kept() if edit is example.edit else None
                kept_truth, asked = bool(verdict), verdict is not None
            pair_rows.append(label(identity, kept_truth, asked))
        shape = rng.choice(SHAPES)
        there = any(t.shape == shape for t in after.things)
        asked_single.append((PRESENCE.format(shape), int(there) if plain else -1))
        while len(asked_single) < 3:
            asked_single.append((PRESENCE.format(SHAPES[0]), -1))
        single_rows += asked_single
        captions.append((caption(after), plain))
        unseen.append(i in own or stained[i])

    ids = lambda texts: tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    heads = [f"{DESCRIBE} {text} {END}" for text, _ in captions]
    caption_ids = ids(heads)
    labels = torch.full_like(caption_ids, -100)
    labels[:, :-1] = caption_ids[:, 1:]
    start = len(DESCRIBE.split()) - 1
    labels[:, :start] = -100
    labels[labels == tokenizer.convert_tokens_to_ids(PAD)] = -100
    for i, (_, asked) in enumerate(captions):
        if not asked:
            labels[i] = -100
    ground_output = ground(shown, side // 4)
    ground_output[(blend < 0.8) | (torch.tensor(dirt) > RUINED) | ~torch.tensor([c.clear() for c in clear]) | torch.tensor(unseen)] = -100
    return Lesson(
        reference=reference,
        output=output,
        questions=ids([t for t, _ in pair_rows]),
        answers=torch.tensor([a for _, a in pair_rows]),
        single_questions=ids([t for t, _ in single_rows]),
        single_answers=torch.tensor([a for _, a in single_rows]),
        caption=caption_ids,
        caption_labels=labels,
        ground_reference=ground([e.scene for e in examples], side // 4),
        ground_output=ground_output,
        kinds=tuple(kinds),
        types=tuple(e.edit.type for e in examples),
    )


def answer_ids(answers: Tensor) -> Tensor:
    """Token ids of yes and no for 1 and 0, -100 where nothing was asked."""
    tokenizer = build_tokenizer()
    yes, no = tokenizer.convert_tokens_to_ids(YES), tokenizer.convert_tokens_to_ids(NO)
    return torch.where(answers < 0, -100, torch.where(answers > 0, yes, no))
