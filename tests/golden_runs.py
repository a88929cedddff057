"""For golden.py: what is run, and how. When stages, settings or modules are renamed, this file alone is edited.

Labels on the left of the tables are keys of golden.json and stay; the stage and its settings beside them are the
package's. A value "models/NAME" is a folder that `starting_models` makes.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from helpers.tiny_models import SIDE, tiny_dit, tiny_judge, tiny_pipeline

UPDATES, WIDTH = 3, 100
ROWS = 24  # of the manifest of real runs

# with this seed every update of a batch of four has a request for nothing, and with seed 3 where few are drawn
SMALL = dict(seed=8, side=SIDE, steps=UPDATES, batch=4, warmup=1, save_every=UPDATES, precision="no")
TEACHER, STUDENT, JUDGE = ({role: f"models/{role}"} for role in ("teacher", "student", "judge"))
ALL = {**TEACHER, **STUDENT, **JUDGE}
PAIRS = {**ALL, "candidates": 6, "pair_editor_steps": 2, "capacity": 16, "threshold": 0.42}

STAGES = {
    "teacher": dict(stage="teacher"),
    "judge": dict(stage="judge", size="small", attack_from=1, softener="models/teacher", students=("models/student",)),
    "warmup": dict(stage="copy_warmup", **TEACHER, reading_steps=1, reading_batch=4),
    "npedit": dict(stage="npedit", **ALL),
    "sft": dict(stage="sft", **STUDENT),
    "grpo": dict(stage="flow_grpo", **STUDENT, **JUDGE, group=2),
    "synthetic": dict(stage="synthetic_pairs", **PAIRS),
    "cyclegan": dict(stage="cyclegan_turbo", **TEACHER, **STUDENT),
    "bootstrap": dict(stage="bootstrap", **TEACHER, **STUDENT),
    "distill": dict(stage="distill", **TEACHER),
}
BF16 = ("judge", "npedit", "grpo", "synthetic", "bootstrap")
CHANGES = {  # label of a stage, what is changed
    "npedit fresh fakes": ("npedit", dict(fake_rollouts="fresh")),
    "npedit gan, random truncation": ("npedit", dict(gan_weight=0.5, truncate="random")),
    "npedit both tasks, few requests": (
        "npedit",
        dict(task="both", request_limit=5, fulfilled_share=0.6, seed=3, emphasis=("move",)),
    ),
    "npedit customise": ("npedit", dict(task="customise", target_caption=False, fulfilled_share=0.0)),
    "npedit two judges": (
        "npedit",
        dict(judge=("models/judge", "models/second"), augment=True, wording="short", logit_gain_steps=2),
    ),
    "npedit teacher as judge": ("npedit", dict(reward="teacher", teacher_draws=1)),
    "npedit reward alone": ("npedit", dict(dmd_weight=0.0, gradient_calls=1, anchor_weight=0.01, pretrain_weight=1.0)),
    "npedit one question": ("npedit", dict(identity=False, answer_loss="vocabulary", ema=0.0)),
    "npedit no judge": ("npedit", dict(judge_weight=0.0, dmd_norm="pixel", guidance=1.0, renoise="same")),
    "npedit skipped updates": ("npedit", dict(skip_above=1e-6)),
    **{f"npedit {name}": ("npedit", dict(matching=name)) for name in ("f-js", "sid", "pseudo-huber", "mmd", "gan")},
    "teacher continued": ("teacher", dict(start="models/teacher")),
    "judge continued": ("judge", dict(start="models/judge", softener=None, students=())),
    "grpo euler": ("grpo", dict(policy="euler", advantage_spread="batch", kl_weight=0.0, inner=1, request_limit=3)),
    "synthetic twins": ("synthetic", dict(pair_editor="twins", threshold=0.0)),
    "synthetic sdedit": ("synthetic", dict(pair_editor="sdedit", threshold=0.0)),
    "synthetic empty pool": ("synthetic", dict(threshold=0.99)),
    "cyclegan no cycle": ("cyclegan", dict(cycle_weight=0.0, critic_updates=2, mismatch=0.0)),
    "cyclegan often nothing to do": ("cyclegan", dict(fulfilled_share=0.6, request_limit=5, seed=3)),
    "bootstrap often nothing to do": ("bootstrap", dict(fulfilled_share=0.6, request_limit=5, seed=3)),
    "bootstrap no cycle": ("bootstrap", dict(cycle_weight=0.0, nothing_weight=0.0, target_decay=0.5)),
    "distill pixel norm": ("distill", dict(dmd_norm="pixel", guidance=1.0, fake_updates=1)),
}
VARIANTS = {label: {**STAGES[of], **change} for label, (of, change) in CHANGES.items()}

REAL_SMALL = dict(steps=UPDATES, batch=2, save_every=UPDATES, strip_every=100, trackers=[], warmup=1)
DATA = dict(data="models/train.jsonl")
SHAPES = dict(file="shapes.yaml", backbone="models/pipeline", judge=["models/judge"], start="models/student", **DATA)
Z_IMAGE = dict(file="tiny.yaml", backbone="models/backbone/z-image", judge=["models/internvl"], **DATA)
KINDS = {
    "shapes": {**SHAPES, "buckets": ["16x16"]},
    "z-image": {**Z_IMAGE, "text_cache": "models/text", "fake_rollouts": "fresh"},
}
REAL = {
    f"{name} {part}, {accumulate} per update": dict(part=part, accumulate=accumulate, **REAL_SMALL, **settings)
    for name, settings in KINDS.items()
    for part in ("edit", "copy")
    for accumulate in (1, 2)
}

# --- what the package calls things


def start_stage(stage: str, settings: dict, out: Path) -> Iterator:
    """The generator of a miniature stage."""
    from vlmedit.methods import find

    config_class, train = find(stage)
    return train(config_class.make("smoke", **settings, out=str(out)))


def start_real(part: str, file: str, settings: dict, out: Path) -> Iterator:
    """The generator of a run on real models: `part` edit or copy, a shipped file's settings below the given ones."""
    from vlmedit.cli._settings import read_settings, typed
    from vlmedit.training.real_models import train_copy, train_real
    from vlmedit.training.settings import CONFIGS, CopyConfig, RealConfig

    config_class, train = {"edit": (RealConfig, train_real), "copy": (CopyConfig, train_copy)}[part]
    given = {**read_settings(CONFIGS / file), **settings, "out": str(out)}
    if part == "copy":
        given.pop("start", None)
    return train(config_class.make("laptop", **typed(config_class, given)))


def starting_models(folder: Path, real: bool = False) -> Path:
    """Random weights on disk; for real runs also a pipeline of them, a tiny Z-Image with its judge, and a manifest."""
    from vlmedit.world.tokenizer import build_tokenizer

    for seed, name in enumerate(("teacher", "student")):
        tiny_dit(seed).save_pretrained(folder / name)
    for seed, name in ((3, "judge"), (4, "second")):
        tiny_judge(seed).save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    if real:
        from vlmedit.testing import random_models, resolve, tiny_data

        tiny_pipeline(shift=1.0, judge=False).save_pretrained(folder / "pipeline")
        resolve("tiny:z-image", folder, "backbone")
        random_models.save_judge("internvl", folder / "internvl")
        tiny_data.save_squares(folder, rows=ROWS)
    return folder


def shipped_answers() -> tuple:
    """32 edits of the shipped editor as bytes (32, S, S, 3), the shipped judge's 64 margins of them, and the figures of
    64 held-out edits."""
    import numpy as np

    import vlmedit
    from vlmedit.data.world import batch_of_examples, held_out
    from vlmedit.equations.judge_loss import answer_margins
    from vlmedit.evaluation.editing import evaluate
    from vlmedit.world.edits import EDIT_TYPES
    from vlmedit.world.render import render

    pipe, examples = vlmedit.load("shapes"), held_out(32, 0, EDIT_TYPES)
    reference = render([e.scene for e in examples], pipe.side)
    pictures = pipe(reference, [e.instruction for e in examples], seed=0).images
    pixels = np.stack([np.asarray(p) for p in pictures])
    output = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        margins, _, _ = answer_margins(pipe.judge, batch_of_examples(examples, reference), output)
    assert pixels.dtype == np.uint8 and len(pixels) == 32 and len(margins) == 64
    return pixels, margins.tolist(), evaluate(pipe, n=64)


def help_texts() -> dict[str, list[str]]:
    """`vlmedit --help` and every command's, in lines of a fixed width."""
    from vlmedit.cli import main
    from vlmedit.cli._main import commands

    texts, before = {}, dict(os.environ)
    os.environ.update(COLUMNS=str(WIDTH), LINES="100", TERM="dumb", NO_COLOR="1")
    try:
        for words in ([], *([name] for name in commands())):
            with contextlib.redirect_stdout(io.StringIO()) as told:
                assert main([*words, "--help"]) == 0
            texts[" ".join(("vlmedit", *words))] = [line.rstrip() for line in told.getvalue().splitlines()]
            assert len(told.getvalue()) > 100
    finally:
        os.environ.clear()
        os.environ.update(before)
    return texts


def recorded(file: str) -> str:
    """What the record calls a file of a checkpoint: there, a run's result was "model", whatever its role."""
    role, _, rest = file.partition(".")
    return f"model.{rest}" if role in ("student", "teacher", "judge") else file
