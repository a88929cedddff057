"""A whole real run in miniature on disk: pipeline, judge and data of a few thousand random weights, made where a setting says "tiny:NAME".

    backbone: tiny:z-image    judge: tiny:internvl    data: tiny:shapes

or the suite's own trained models, so that the trainer of real models can be seen to teach:

    backbone: tiny:shapes     judge: tiny:shapes      data: tiny:squares     start: tiny:shapes (the warm-up's student)

The pipeline is the family's own, text encoder and tokenizer included, so that nothing of a real run is left out but size. The data are
drawn scenes in several aspect ratios with requests in plain words. `vlmedit train npedit --config tiny` runs it on a CPU.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from vlmedit.data.world import EDIT_SHARES, FULFILLABLE_TYPES, as_fulfilled, from_example, references, sample_example
from vlmedit.errors import InputError
from vlmedit.io import to_image
from vlmedit.pipelines.shapes import assemble, checkpoint
from vlmedit.seeds import rng_for
from vlmedit.testing import PREFIX
from vlmedit.testing import random_models as tiny
from vlmedit.world.render import render

KINDS = {"recolor": "color", "texture": "material", "move": "action", "nothing": "other"}  # edits of drawn scenes under real data's names
ROWS, SQUARES = 12, 2000
SETTLED = 0.2  # of the squares: requests that are fulfilled already [NPEditConfig.settled]


def save_shapes(folder: Path) -> Path:
    """The suite's own pipeline: its trained teacher and its tokenizer."""
    assemble(checkpoint("shapes", "teacher"), None).save_pretrained(folder)
    return folder


def save_data(folder: Path, rows: int = ROWS, seed: int = 0) -> Path:
    """A manifest of drawn scenes, some of them wide or tall."""
    lines = []
    for i in range(rows):
        example = sample_example(rng_for("tiny", seed, i), EDIT_SHARES)
        request = from_example(example)
        size = [(64, 64), (96, 48), (48, 96)][i % 3]
        to_image(render([example.scene], 64)[0]).resize(size).save(folder / f"{i:03d}.png")
        words = dict(type=KINDS.get(request.type, request.type), object=request.thing, target_caption=request.target_caption, caption=request.reference_caption)
        lines.append(json.dumps({"image": f"{i:03d}.png", "instruction": request.instruction, **words}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


def save_squares(folder: Path, rows: int = SQUARES, seed: int = 0) -> Path:
    """A manifest of the requests that the miniature trains on, their pictures as it draws them: 32 x 32, some through JPEG."""
    rng = rng_for("squares", seed)
    examples = [sample_example(rng, EDIT_SHARES) for _ in range(rows)]
    examples = [as_fulfilled(e, rng) if e.edit.type in FULFILLABLE_TYPES and rng.random() < SETTLED else e for e in examples]
    lines = []
    for i, (example, picture) in enumerate(zip(examples, references(examples, 32, rng))):
        request = from_example(example)
        to_image(picture).save(folder / f"{i:05d}.png")
        words = dict(type=request.type, object=request.thing, target_caption=request.target_caption, caption=request.reference_caption)
        lines.append(json.dumps({"image": f"{i:05d}.png", "instruction": request.instruction, **words}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


DATA = {"shapes": save_data, "squares": save_squares}
OWN = {"judge": "judge", "start": "warm"}  # shipped checkpoints that are complete as they are


def savers(what: str) -> dict[str, Callable[[Path], object]]:
    """What can be made for a setting, by name: each writes into an empty folder."""
    if what == "data":
        return DATA
    if what == "start":
        return {}
    names, save = (tiny.backbones(), tiny.save_pipeline) if what == "backbone" else (tiny.JUDGES, tiny.save_judge)
    made = {name: functools.partial(save, name) for name in names}
    return made | ({"shapes": save_shapes} if what == "backbone" else {})


def make(name: str, folder: Path, what: str) -> str:
    """A tiny model or data of that name, made below `folder` unless it is there. Raises `InputError` for a name that is not known."""
    known = savers(what)
    if what in OWN and name == "shapes":
        return str(checkpoint("shapes", OWN[what]))
    if name not in known:
        names = dict.fromkeys((*known, *(["shapes"] if what in OWN else [])))
        raise InputError(f"{what} is {PREFIX + name!r}; tiny ones: {', '.join(names)}")
    target = Path(folder) / what / name
    if not target.is_dir():
        partial = target.with_name(f".{name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        known[name](partial)
        partial.rename(target)
    return str(target / "train.jsonl" if what == "data" else target)
