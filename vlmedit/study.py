"""Studies: a claim's arms, each trained on several seeds at equal cost, measured by the oracle, in one table and one plot.

A study is a dictionary of arms; an arm is one or more trainings, one after the other, and the ways its student is then used.
Whatever an arm does not say is the tier's configuration, from the shipped warm start, teacher and judge. A cell is an arm and a seed.

    plan = study.plan("objective", updates=300, seeds=(0, 1))
    for cell in study.run(plan): ...
    study.write_tables(plan)

* Equal cost means equally many updates of the student, of its calls on one picture, or of CPU-seconds (`equal`). For the latter two the
  first arm's updates are the measure: a short pilot of every arm tells what its updates cost, and each gets as many as cost the same. What
  was spent in the end is in the table; it differs by what the pilot did not see (a percent or two of seconds; calls drawn at random).
* Cost: every cell records the student's calls on one picture (`calls`) and the process's CPU-seconds (`cpu_seconds`) of its
  trainings; a judge that an arm schools for itself is counted apart (`judge_cpu_seconds`). What the teacher does for an arm, synthetic
  pairs for instance, shows in the seconds alone.
* Trainings live in `runs/STAGE-HASH`, named by their configuration and the weights they start from, so that arms and studies
  that share one train it once. Results live in `out`: cells/*.json, table.csv, table.json, plot.png.
* A finished cell is not repeated, a stopped training goes on from its checkpoint, a failed cell is recorded and tried again next time.
* A student that is `watched` is measured several times on its way, so that a judge's word can be seen to come apart from the oracle's. What
  a judge believes is compared with the oracle three ways: on average (`hacking_gap`), answer by answer (`calibration`, the expected
  calibration error), and against the belief of a held-out judge that taught nobody (`held_out_gap`).
* Errors are standard errors over seeds, of shares of edits never below that over requests (binomial): two seeds may agree by luck. With one
  seed shares alone have one.

This module measures by the oracle: no trainer may import it.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from vlmedit.models.pipeline import checkpoint
from vlmedit.pictures import InputError, check_space, check_writable, save_json
from vlmedit.train.config import TrainConfig
from vlmedit.train.stages import STAGES

RESULTS = Path("papers/results/studies")
RUNS = Path("runs/studies")
UPDATES = {"smoke": 2, "laptop": 300, "gpu": 3000}  # of the student, unless said
REQUESTS = {"smoke": 8, "laptop": 512, "gpu": 2048}  # held-out edits
ROLES = {"teacher": "teacher", "judge": "judge", "student": "warm", "held_out": "second_judge"}  # what all arms share, and its shipped checkpoint
JUDGES = ("judge", "held_out")  # who is asked what he thinks of a student
PATHS = (*ROLES, "second", "softener", "start", "students")  # settings that name models' folders
EQUAL = {"updates": "updates", "calls": "calls of the student", "cpu": "CPU-seconds"}  # what arms may have in common
PILOT, UNTIMED = 24, 2  # updates of an arm's pilot, and how many of them warm up
CELL_BYTES = 80 * 2**20  # disk space of one training while it runs


class Share(float):
    """A setting as a share of the requests that a training draws (updates x batch)."""


class Role(str):
    """A setting that takes the folder of the model in this role: a shared one's, or of an earlier training of the arm."""


@dataclass(frozen=True)
class Part:
    """One training of an arm."""

    stage: str
    settings: Mapping = field(default_factory=dict)
    share: float = 1.0  # of the study's updates
    updates: int | None = None  # a fixed number instead; 2 at tier smoke
    gives: str = "student"  # the role its model takes in what follows


@dataclass(frozen=True)
class Arm:
    parts: tuple[Part, ...]  # none: the teacher as it is
    ways: tuple[str, ...] = ("4 steps",)
    watched: int = 1  # times that the last training's student is measured, the last time at its end


@dataclass(frozen=True)
class Study:
    question: str
    arms: Mapping[str, Arm]


def npedit(ways: Sequence[str] = ("4 steps",), watched: int = 1, **settings) -> Arm:
    """An arm of one no-pair training."""
    return Arm((Part("npedit", settings),), tuple(ways), watched)


OTHER = dict(size="small", attack_from=500)  # settings of a second judge


def schooled(size: str, updates: int = 1500, watched: int = 1, editor: Mapping = {}, **settings) -> Arm:
    """The no-pair editor (with its own settings) under a judge of its own, schooled from nothing for half of what the shipped one was."""
    return Arm((Part("judge", {**OTHER, "size": size, **settings}, updates=updates, gives="judge"), Part("npedit", editor)), watched=watched)


ALONE = dict(dmd_weight=0.0)  # judge only


# How a model is used: settings of `evaluate.evaluate_student`, or with an `editor` of `training_free.edit_by_captions`.
WAYS = {
    "1 step": dict(steps=1),
    "2 steps": dict(steps=2),
    "4 steps": dict(steps=4),
    "8 steps": dict(steps=8),
    "4 steps, Euler": dict(steps=4, sampler="euler"),
    "30 steps": dict(steps=30, sampler="euler"),
    "best of 4": dict(steps=4, particles=4),
    "best of 8": dict(steps=4, particles=8),
    "FK of 4": dict(steps=4, particles=4, strength=1.0),
    "FK of 8": dict(steps=4, particles=8, strength=1.0),
    "ReNO": dict(steps=1, noise_steps=20),
    **{f"from {t}": dict(editor="sdedit", start=t, steps=15) for t in (0.4, 0.6, 0.8)},
    **{f"back to {t}": dict(editor="inversion", start=t, steps=15, iterations=3) for t in (0.6, 0.8, 1.0)},
    **{f"through {t}": dict(editor="flowedit", start=t, steps=15) for t in (0.6, 0.8, 1.0)},
}

PAIRED = Arm((Part("sft"),), ("4 steps", "4 steps, Euler", "30 steps"))

STUDIES: dict[str, Study] = {
    "objective": Study(
        "which terms of the objective are needed",
        {
            "full": npedit(),
            "DMD only": npedit(judge_weight=0.0),
            "judge only": npedit(dmd_weight=0.0),
            "caption-blind DMD": npedit(target_caption=False),
            "no identity question": npedit(identity=False),
            "full-vocabulary loss": npedit(answer_loss="vocabulary"),
            "paired SFT": PAIRED,
        },
    ),
    "matching": Study(
        "what may stand in DMD's place",
        {
            "DMD": npedit(),
            "f-distill JS": npedit(matching="f-js"),
            "SiD": npedit(matching="sid"),
            "pseudo-Huber": npedit(matching="pseudo-huber"),
            "DMD + GAN": npedit(gan_weight=0.5),
            "GAN": npedit(matching="gan", dmd_weight=2.0),  # its gradient is half of DMD's at the start [X]
            "MMD": npedit(matching="mmd", dmd_weight=12.0),  # its gradient is a twelfth of DMD's at the start; the others' are alike [X]
        },
    ),
    "reward": Study(
        "is the reward's gradient enough without distribution matching, and what must then hold the student",
        {
            "NP-Edit": npedit(),
            "judge only": npedit(dmd_weight=0.0),
            "ReFL": npedit(dmd_weight=0.0, gradient_calls=1, pretrain_weight=1.0),
            "DRaFT-1": npedit(dmd_weight=0.0, calls="all", gradient_calls=1),
            "DRaFT-2": npedit(dmd_weight=0.0, calls="all", gradient_calls=2),
            "DRaFT (all calls)": npedit(dmd_weight=0.0, calls="all"),
            "AlignProp": npedit(dmd_weight=0.0, calls="all", truncate="random"),
            "R0": npedit(dmd_weight=0.0, anchor_weight=0.1),
        },
    ),
    "teacher_judge": Study(
        "must the judge be a VLM, or does the teacher know which caption fits",
        {
            "VLM": npedit(),
            "teacher for the edit and VLM for the rest": npedit(reward="teacher"),
            "teacher alone": npedit(reward="teacher", identity=False),
            "nobody": npedit(judge_weight=0.0),
        },
    ),
    "asking": Study(
        "how far the outcome hangs on who is asked, and how",
        {
            "as schooled": npedit(),
            "short questions": npedit(wording="short"),
            "turned questions": npedit(wording="turned"),
            "bare questions": npedit(wording="bare"),
            "augmented pictures": npedit(augment=True),
            "another judge": schooled("small"),
            "both judges": Arm((Part("judge", OTHER, updates=1500, gives="second"), Part("npedit"))),
        },
    ),
    "hacking": Study(
        "when does the judge's word come apart from the oracle's, and what holds them together",
        {
            "NP-Edit": npedit(watched=4),
            "judge only": npedit(watched=4, **ALONE),
            "augmented pictures": npedit(watched=4, augment=True, **ALONE),
            "small judge": schooled("small", watched=4, editor=ALONE),
            "small judge (never attacked)": schooled("small", watched=4, editor=ALONE, attack_share=0.0),
            "both judges": Arm((Part("judge", OTHER, updates=1500, gives="second"), Part("npedit", ALONE)), watched=4),
            "judge relearns halfway": Arm(
                (
                    Part("npedit", ALONE, share=0.5),
                    Part("judge", dict(start=Role("judge"), students=(Role("student"),), attack_from=0, lr=7e-4, warmup=20), updates=300, gives="judge"),
                    Part("npedit", ALONE, share=0.5),
                ),
                watched=2,
            ),
        },
    ),
    "unpaired": Study(
        "what other ways without a pair reach, and what synthetic pairs are worth",
        {
            "NP-Edit": npedit(),
            "CycleGAN-Turbo": Arm((Part("cyclegan"),)),
            "Bootstrap Your Generator": Arm((Part("bootstrap"),)),
            "synthetic pairs": Arm((Part("synthetic"),)),
            "synthetic pairs (nobody chooses)": Arm((Part("synthetic", dict(threshold=0.0)),)),
            "synthetic pairs (twins)": Arm((Part("synthetic", dict(maker="twins")),)),
            "synthetic pairs + NP-Edit": Arm((Part("synthetic", share=0.5), Part("npedit", share=0.5))),
            "paired SFT": Arm((Part("sft"),)),
        },
    ),
    "unroll": Study(
        "how many calls are unrolled, and how many of them carry a gradient",
        {
            "mixed": npedit(),
            "one call": npedit(calls="one"),
            "two calls": npedit(calls="two"),
            "two calls (gradient in the last)": npedit(calls="two", gradient_calls=1),
            "all calls": npedit(calls="all"),
            "all calls (gradient in the last)": npedit(calls="all", gradient_calls=1),
            "mixed (same noise)": npedit(renoise="same"),
        },
    ),
    "judge_size": Study(
        "does a larger judge teach more, and a better schooled one",
        {
            "shipped": npedit(),
            **{size: schooled(size) for size in ("small", "medium", "large")},
            "medium (half the school)": schooled("medium", updates=750, attack_from=250),
            "medium (never attacked)": schooled("medium", attack_share=0.0),
        },
    ),
    "data": Study(
        "how many distinct requests are needed (shares of those that the training draws)",
        {name: npedit(pool=Share(share)) for name, share in (("1 %", 0.01), ("50 %", 0.5), ("100 %", 1.0))},
    ),
    "rl": Study(
        "reward by gradient or by policy, with and without pairs first, the judge being the same",
        {
            "SFT": PAIRED,
            "SFT + Flow-GRPO": Arm((Part("sft", share=0.5), Part("grpo", share=0.5))),
            "SFT + NP-Edit": Arm((Part("sft", share=0.5), Part("npedit", share=0.5))),
            "Flow-GRPO": Arm((Part("grpo"),)),
            "NP-Edit": npedit(),
        },
    ),
    "steps": Study(
        "how many steps are needed in use",
        {
            "NP-Edit": npedit(("1 step", "2 steps", "4 steps", "8 steps")),
            "paired SFT": Arm((Part("sft"),), ("1 step", "2 steps", "4 steps", "8 steps")),
        },
    ),
    "fake_updates": Study("how many updates of the fake score per update of the student", {str(k): npedit(fake_updates=k) for k in (1, 2, 5, 10)}),
    "caption": Study(
        "must the caption that distribution matching reads carry the edit",
        {"target caption": npedit(), "reference caption": npedit(target_caption=False), "target caption (DMD only)": npedit(judge_weight=0.0)},
    ),
    "shift": Study("the schedule's shift towards noise, in training and use", {str(s): npedit(sampler_shift=float(s)) for s in (1, 2, 3, 6)}),
    "search": Study(
        "what the judge gives in use, without any training for it",
        {"NP-Edit": npedit(("1 step", "4 steps", "best of 4", "best of 8", "FK of 4", "FK of 8", "ReNO"))},
    ),
    "training_free": Study(
        "how far the teacher comes without any training, given both captions",
        {
            "SDEdit": Arm((), ("from 0.4", "from 0.6", "from 0.8")),
            "inversion": Arm((), ("back to 0.6", "back to 0.8", "back to 1.0")),
            "FlowEdit": Arm((), ("through 0.6", "through 0.8", "through 1.0")),
            "NP-Edit": npedit(),
        },
    ),
}


# --- what is to be done


@dataclass(frozen=True)
class Plan:
    """Plain values only: a plan travels to other processes."""

    name: str
    tier: str
    updates: int
    n: int
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    overrides: Mapping[str, Mapping]  # of a stage's settings, where the arm does not set them
    models: Mapping[str, str]  # role -> folder
    out: str
    runs: str
    equal: str = "updates"
    factors: Mapping[str, float] = field(default_factory=dict)  # arm -> its updates as a multiple of the plan's, where cost is made equal
    pilot: bool = False  # a few updates, to learn their cost


@dataclass(frozen=True)
class Task:
    """A training with its configuration; `key` identifies what comes out of it."""

    stage: str
    config: TrainConfig
    key: str


def nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, 1, 0.4)
    return f" (nearest: {near[0]})" if near else ""


def find(name: str) -> Study:
    """A study by name. Raises `InputError` with the list of known ones."""
    if name not in STUDIES:
        raise InputError(f"unknown study {name!r}{nearest(name, STUDIES)}; known: {', '.join(STUDIES)}")
    return STUDIES[name]


def known_settings(arms: Iterable[Arm]) -> dict[str, set[str]]:
    """Stage -> names of its settings that a study's user may override."""
    stages = {part.stage for arm in arms for part in arm.parts}
    fixed = {"out", "seed", "steps"}
    return {stage: {f.name for f in dataclasses.fields(STAGES[stage][0])} - fixed for stage in sorted(stages)}


def sort_overrides(name: str, given: Mapping, arms: Sequence[str] = ()) -> tuple[dict[str, dict], dict[str, str]]:
    """{"lr": 1, "sft.lr": 2, "judge": folder} -> settings of each stage, and the models all arms start from. A bare name is meant for
    every stage of the study that has such a setting. Raises `InputError` for unknown ones."""
    study = find(name)
    known = known_settings(study.arms[a] for a in arms or study.arms if a in study.arms)
    stages, models, wrong = {stage: {} for stage in known}, {}, []
    for key, value in given.items():
        stage, dot, setting = key.rpartition(".")
        if key in ROLES:
            models[key] = str(value)
        elif dot and setting in known.get(stage, ()):
            stages[stage][setting] = value
        elif not dot and any(setting in names for names in known.values()):
            for other in (s for s, names in known.items() if setting in names):
                stages[other].setdefault(setting, value)
        else:
            wrong.append(key)
    if wrong:
        every = sorted(set(ROLES).union(*known.values()))
        problems = [f"unknown override {key!r} of study {name!r}{nearest(key.rpartition('.')[2], every)}" for key in wrong]
        raise InputError(problems, f"known: {', '.join(every)}; for one stage alone ({', '.join(known)}): STAGE.NAME")
    return stages, models


def plan(
    name: str,
    tier: str = "laptop",
    seeds: Sequence[int] = (0,),
    arms: Sequence[str] = (),
    updates: int | None = None,
    n: int | None = None,
    overrides: Mapping | None = None,
    out: str | os.PathLike | None = None,
    runs: str | os.PathLike | None = None,
    equal: str = "updates",
) -> Plan:
    """A checked plan: every arm's configuration is built, every model looked for, before any work. Raises `InputError` or
    `ConfigError` naming what cannot be used and what is known."""
    study = find(name)
    problems = [f"unknown arm {a!r} of study {name!r}{nearest(a, study.arms)}; known: {', '.join(study.arms)}" for a in arms if a not in study.arms]
    problems += [f"seed is {s!r}; it must be a whole number of at least 0" for s in seeds if not isinstance(s, int) or s < 0]
    problems += [f"{what} is {v}; it must be at least 1" for what, v in (("updates", updates), ("n", n)) if v is not None and v < 1]
    problems += [] if seeds else ["no seeds given; pass at least one"]
    if tier not in UPDATES:
        problems.append(f"unknown tier {tier!r}; known: {', '.join(UPDATES)}")
    if equal not in EQUAL:
        problems.append(f"equal is {equal!r}; known: {', '.join(EQUAL)}")
    if problems:
        raise InputError(problems)
    chosen = tuple(dict.fromkeys(arms)) or tuple(study.arms)
    stages, models = sort_overrides(name, overrides or {}, chosen)
    for role, kind in ROLES.items():
        if role not in models:
            models[role] = str(checkpoint("shapes", kind))
    made = Plan(
        name, tier, updates or UPDATES[tier], n or REQUESTS[tier], tuple(dict.fromkeys(seeds)), chosen, stages, models,
        str(out or RESULTS / name), str(runs or RUNS), equal,
    )  # fmt: skip
    check(made)
    return made


def side_of(folder: str) -> int | None:
    """The side of the pictures a saved model is made for, None where there is no model."""
    try:
        return json.loads((Path(folder) / "config.json").read_text())["side"]
    except (OSError, ValueError, KeyError):
        return None


def check(plan: Plan) -> None:
    """Models there and of the right side, configurations valid, folders writable, before anything is trained."""
    problems = [f"{role} is {folder!r}, no folder with a model" for role, folder in plan.models.items() if side_of(folder) is None]
    if problems:
        raise InputError(problems, "train one (vlmedit train) or name another with --set ROLE=FOLDER")
    tasks = [task for arm in plan.arms for seed in plan.seeds for task in prepare(plan, arm, seed)]
    for role, folder in plan.models.items():
        for side in sorted({task.config.side for task in tasks} - {side_of(folder)}):
            problems.append(f"side is {side}, and the {role} in {folder} is made for {side_of(folder)}; pass --set side={side_of(folder)}, or models of side {side}")
    if problems:
        raise InputError(problems)
    check_writable(Path(plan.out), "folder")
    check_writable(Path(plan.runs), "folder")
    check_space(Path(plan.runs), CELL_BYTES)


_digests: dict[tuple, str] = {}


def digest(folder: str) -> str:
    """Of a saved model's weights."""
    files = sorted(Path(folder).glob("*.safetensors"))
    key = tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    if key not in _digests:
        _digests[key] = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]
    return _digests[key]


def short_hash(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def find_role(value, models: Mapping[str, str]):
    """A setting, the roles in it replaced by their models' folders."""
    if isinstance(value, tuple):
        return tuple(find_role(v, models) for v in value)
    return models[value] if isinstance(value, Role) else value


def name_of(value: str | tuple[str, ...], known: Mapping[str, str]) -> str | list[str]:
    """What identifies the models of a setting: the training that is to make them, or their weights."""
    return [name_of(v, known) for v in value] if isinstance(value, tuple) else known.get(value) or digest(value)


def prepare(plan: Plan, arm: str, seed: int) -> list[Task]:
    """An arm's trainings, in order. What one gives, the next start from."""
    models, known, tasks = dict(plan.models), {}, []
    for part in find(plan.name).arms[arm].parts:
        config_class = STAGES[part.stage][0]
        share = part.share * plan.factors.get(arm, 1.0)
        updates = max(1, round(share * plan.updates)) if part.updates is None else (2 if plan.tier == "smoke" or plan.pilot else part.updates)
        names = {f.name for f in dataclasses.fields(config_class)}
        settings = {k: find_role(v, models) for k, v in part.settings.items()}
        given = {k: v for k, v in models.items() if k in names} | plan.overrides.get(part.stage, {}) | settings
        if plan.tier != "smoke" and "softener" in names:
            given.setdefault("softener", models["teacher"])
        given |= {"seed": seed, "steps": updates} | ({} if plan.tier == "smoke" else {"save_every": 100})
        draws = updates * config_class.make(plan.tier, **{k: v for k, v in given.items() if not isinstance(v, Share)}).batch
        given = {k: max(1, round(v * draws)) if isinstance(v, Share) else v for k, v in given.items()}
        config = config_class.make(plan.tier, **given)
        starts = {k: name_of(v, known) for k in PATHS if (v := getattr(config, k, None))}
        settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in (*PATHS, "out", "save_every")}
        key = short_hash([part.stage, settings, starts])
        out = Path(plan.runs) / f"{part.stage}-{key}"
        tasks.append(Task(part.stage, dataclasses.replace(config, out=str(out)), key))
        models[part.gives] = str(out / "model")
        known[models[part.gives]] = key
    return tasks


def balance(plan: Plan, say: Callable[[str], object] = lambda text: None) -> Plan:
    """The plan with every arm's updates at the same cost as the first arm's of the study. Runs a pilot of each arm on the plan's first seed, once:
    what it found is kept in `out`, so that a study that goes on later goes on with the same numbers."""
    if plan.equal == "updates":
        return plan
    first = next(iter(find(plan.name).arms))
    arms = [arm for arm in dict.fromkeys((first, *plan.arms)) if find(plan.name).arms[arm].parts]
    identity = short_hash([plan.tier, plan.updates, plan.overrides, {role: digest(folder) for role, folder in plan.models.items()}])
    file = Path(plan.out) / f"equal-{plan.equal}-{identity}.json"
    costs = json.loads(file.read_text()) if file.is_file() else {}
    for arm in arms:
        if arm not in costs:
            say(f"pilot of {arm}")
            costs[arm] = pilot_cost(plan, arm)
            save_json(costs, file)
    if not costs.get(first):
        raise InputError(f"study {plan.name!r} cannot be made equal in {EQUAL[plan.equal]}: its first arm, {first!r}, has none; pass --equal updates")
    return dataclasses.replace(plan, factors={arm: costs[first] / costs[arm] for arm in arms if costs[arm]})


def pilot_cost(plan: Plan, arm: str) -> float:
    """What one of an arm's updates of its student costs, its trainings weighted by their shares."""
    small = dataclasses.replace(plan, updates=PILOT if plan.tier != "smoke" else 2, pilot=True, factors={}, runs=str(Path(plan.runs) / "pilots"))
    total = 0.0
    for part, task in zip(find(plan.name).arms[arm].parts, prepare(small, arm, plan.seeds[0]), strict=True):
        shutil.rmtree(task.config.out, ignore_errors=True)
        config = dataclasses.replace(task.config, steps=max(task.config.steps, UNTIMED + 1), save_every=10**6)
        for step in STAGES[task.stage][1](config):
            if step.index <= UNTIMED:
                calls, began = 0, time.process_time()
            else:
                calls, spent = calls + int(step.metrics.get("calls", 0)), time.process_time() - began
        if part.gives == "student":
            total += part.share * (calls if plan.equal == "calls" else spent) / (config.steps - UNTIMED)
    shutil.rmtree(small.runs)
    return total


def cell_key(plan: Plan, arm: str, seed: int) -> str:
    """Identifies a cell's result: its trainings, how its student is used, who is asked what he thinks of it."""
    chosen = find(plan.name).arms[arm]
    trained = [t.key for t in prepare(plan, arm, seed)] or [digest(plan.models["teacher"]), seed]
    return short_hash([trained, {way: WAYS[way] for way in chosen.ways}, chosen.watched, plan.n, *(digest(plan.models[role]) for role in JUDGES)])


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("%", "percent")).strip("-")


def cell_file(plan: Plan, arm: str, seed: int) -> Path:
    return Path(plan.out) / "cells" / f"{slug(arm)}-seed{seed}-{cell_key(plan, arm, seed)}.json"


def finished(plan: Plan, arm: str, seed: int) -> dict | None:
    """The record of a cell that went well, or None."""
    try:
        cell = json.loads(cell_file(plan, arm, seed).read_text())
    except (OSError, ValueError):
        return None
    return cell if cell.get("ok") else None


# --- doing it

Watch = Callable[[str, object], None]  # (what is trained, engine.Step)


def times(task: Task, watched: int) -> list[int]:
    """Updates after which a watched student is kept, besides its last."""
    return sorted({round(task.config.steps * k / watched) for k in range(1, watched)} - {0, task.config.steps})


def kept(task: Task, updates: int) -> Path:
    return Path(task.config.out) / f"after-{updates}.safetensors"


def train(task: Task, watch: Watch | None = None, keep: Sequence[int] = ()) -> dict:
    """Train, or take what is there. Returns what it cost, over all interruptions. The averaged weights after `keep` updates stay beside the
    model; a training that was begun without keeping them is made again."""
    out = Path(task.config.out)
    file = out / "cost.json"
    fresh = {"done": False, "kept": sorted(keep), "calls": 0, "cpu_seconds": 0.0, "seconds": 0.0, "skipped": 0}
    cost = json.loads(file.read_text()) if file.is_file() else fresh
    if not set(keep) <= set(cost.get("kept", ())):
        shutil.rmtree(out)
        cost = fresh
    if cost["done"] and (out / "model" / "config.json").is_file():
        return cost
    config = dataclasses.replace(task.config, save_every=math.gcd(task.config.save_every, *keep))
    cpu, wall = time.process_time(), time.perf_counter()
    for step in STAGES[task.stage][1](config):
        if step.index - 1 in keep:  # an update's checkpoint is written when the next is asked for
            shutil.copy(out / "checkpoint" / "model.ema.safetensors", kept(task, step.index - 1))
        now, then = time.process_time(), time.perf_counter()
        cost |= {"cpu_seconds": cost["cpu_seconds"] + now - cpu, "seconds": cost["seconds"] + then - wall}
        cost |= {"calls": cost["calls"] + int(step.metrics.get("calls", 0)), "skipped": cost["skipped"] + int(step.skipped)}
        cpu, wall = now, then
        save_json(cost, file)
        if watch:
            watch(f"{task.stage}, seed {task.config.seed}", step)
    save_json(cost := cost | {"done": True, "updates": task.config.steps}, file)
    for scrap in ("checkpoint", "tensorboard"):
        shutil.rmtree(out / scrap, ignore_errors=True)
    return cost


def use(model, judge, held_out_judge, n: int, seed: int, shift: float, way: Mapping) -> dict:
    """Oracle metrics of a model used in one way, on the first `n` held-out requests, what both judges think of them, and its calls and
    CPU-seconds per edit. `seed` is of an untrained editor's noise; trained ones differ by their training."""
    from vlmedit import training_free
    from vlmedit.data import held_out
    from vlmedit.evaluate import ask_judge, evaluate_student, judge_by_oracle, summary
    from vlmedit.world.edits import EDIT_TYPES

    began = time.process_time()
    if "editor" in way:
        way, examples = {"guidance": 2.0, **way}, held_out(n, 0, EDIT_TYPES)
        judged = judge_by_oracle(examples, *training_free.edit_by_captions(model, examples, seed=seed, **way))
        metrics, calls = summary(judged, judge) | {"n": n}, training_free.calls(**way)
    else:
        metrics, judged = evaluate_student(model, judge, n, 0, shift=shift, **way)
        calls = way["steps"] * way.get("particles", 1) * (1 + way.get("noise_steps", 0))
    spent = time.process_time() - began
    believed = ask_judge(held_out_judge, judged.examples, judged.reference, judged.output).mean().item()
    return {**metrics, "held_out_gap": believed - metrics["success"], "calls_per_edit": calls, "use_cpu_seconds": spent}


def measure(plan: Plan, arm: Arm, tasks: Sequence[Task], seed: int) -> dict[str, dict]:
    """What comes of an arm's student, for each way of using it and each time that it was kept."""
    from vlmedit.models.dit import DiT
    from vlmedit.models.judge import JudgeModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = lambda kind, folder: kind.from_pretrained(folder).eval().to(device)
    model = load(DiT, Path(tasks[-1].config.out) / "model" if tasks else plan.models["teacher"])
    judges = [load(JudgeModel, plan.models[role]) for role in JUDGES]
    shift = getattr(tasks[-1].config, "sampler_shift", 1.0) if tasks else 1.0
    found, before = {}, student_updates(tasks[:-1])
    if arm.watched > 1:
        last = {k: v.clone() for k, v in model.state_dict().items()}
        for k in times(tasks[-1], arm.watched):
            model.load_state_dict(load_file(kept(tasks[-1], k)))
            found |= {f"{way} after {before + k}": use(model, *judges, plan.n, seed, shift, WAYS[way]) for way in arm.ways}
        model.load_state_dict(last)
    end = f" after {student_updates(tasks)}" if arm.watched > 1 else ""
    return found | {f"{way}{end}": use(model, *judges, plan.n, seed, shift, WAYS[way]) for way in arm.ways}


def student_updates(tasks: Iterable[Task]) -> int:
    return sum(task.config.steps for task in tasks if task.stage != "judge")


def run_cell(plan: Plan, arm: str, seed: int, watch: Watch | None = None) -> dict:
    """Train and measure one cell and write its record. An exception is a record too; only an interruption ends the study."""
    tasks, chosen = prepare(plan, arm, seed), find(plan.name).arms[arm]
    record = {"study": plan.name, "arm": arm, "seed": seed, "tier": plan.tier, "updates": student_updates(tasks)}
    record["trainings"] = [{"stage": t.stage, "key": t.key, "config": {k: v for k, v in dataclasses.asdict(t.config).items() if k not in (*PATHS, "out")}} for t in tasks]
    try:
        costs = [train(task, watch, times(task, chosen.watched) if task is tasks[-1] else ()) for task in tasks]
        student = [(t, c) for t, c in zip(tasks, costs) if t.stage != "judge"]
        record |= {"calls": sum(c["calls"] for _, c in student), "cpu_seconds": sum(c["cpu_seconds"] for _, c in student)}
        record |= {"seconds": sum(c["seconds"] for c in costs), "skipped": sum(c["skipped"] for c in costs)}
        record["judge_cpu_seconds"] = sum(c["cpu_seconds"] for t, c in zip(tasks, costs) if t.stage == "judge")
        record |= {"ways": measure(plan, chosen, tasks, seed), "ok": True}
    except Exception as error:  # whatever it is: the other arms go on, and the report says it
        record |= failure(error)
    save_json(record, cell_file(plan, arm, seed))
    return record


def failure(error: BaseException) -> dict:
    return {"ok": False, "error": f"{type(error).__name__}: {error}", "traceback": "".join(traceback.format_exception(error)[-3:])}


def _process(plan: Plan, arm: str, seed: int, threads: int) -> None:
    torch.set_num_threads(threads)
    run_cell(plan, arm, seed)


def run(plan: Plan, jobs: int = 1, watch: Watch | None = None) -> Iterator[tuple[dict, bool]]:
    """Every cell's record as it ends, and whether it was there already. Seeds turn slowest: an interrupted study has all arms of its
    first seeds. With several jobs each cell has a process of its own, and cells that share a training wait for each other."""
    todo = []
    for seed in plan.seeds:
        for arm in plan.arms:
            if cell := finished(plan, arm, seed):
                yield cell, True
            else:
                todo.append((arm, seed))
    if jobs == 1:
        for arm, seed in todo:
            yield run_cell(plan, arm, seed, watch), False
        return
    folders = {pair: sorted({t.key for t in prepare(plan, *pair)}) for pair in todo}
    locks = {key: threading.Lock() for keys in folders.values() for key in keys}
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def one(pair: tuple[str, int]) -> dict:
        arm, seed = pair
        with ExitStack() as held:
            for key in folders[pair]:
                held.enter_context(locks[key])
            file = cell_file(plan, arm, seed)
            file.unlink(missing_ok=True)
            process = multiprocessing.get_context("spawn").Process(target=_process, args=(plan, arm, seed, threads))
            process.start()
            process.join()
            if not file.is_file():
                record = {"study": plan.name, "arm": arm, "seed": seed, "tier": plan.tier, "updates": student_updates(prepare(plan, *pair)), "ok": False}
                save_json(record | {"error": f"its process died with exit code {process.exitcode}"}, file)
            return json.loads(file.read_text())

    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(one, pair) for pair in todo]):
            yield future.result(), False


# --- what came out

FIGURES = ("success", "done", "kept", "on_manifold", "keep_psnr", "manifold_psnr", "p_edit", "p_identity", "hacking_gap", "held_out_gap", "calibration")
SHARES = FIGURES[:4]
COSTS = ("calls", "cpu_seconds", "judge_cpu_seconds", "skipped")
IN_USE = ("calls_per_edit", "use_cpu_seconds", "n")


def rows_of(cell: Mapping) -> list[dict]:
    """One flat row for each way a cell's student was used."""
    rows = []
    for way, m in cell["ways"].items():
        name = cell["arm"] if len(cell["ways"]) == 1 else f"{cell['arm']}, {way}"
        row = {"arm": name, "seed": cell["seed"], "updates": cell["updates"], **{k: cell[k] for k in COSTS if k in cell}}
        row |= {k: m[k] for k in (*FIGURES, *IN_USE) if k in m}
        row |= {"p_edit": m["judge_p_yes"]["edit"], "p_identity": m["judge_p_yes"]["identity"]}
        row["calibration"] = sum(m["calibration_error"].values()) / len(m["calibration_error"])
        rows.append(row | {f"success_{kind}": value for kind, value in m["success_by_type"].items()})
    return rows


def cells(plan: Plan) -> list[dict]:
    """All records in the study's folder that belong to this plan: any arm and seed at its tier, updates, requests and settings."""
    found = []
    for file in sorted((Path(plan.out) / "cells").glob("*.json")):
        try:
            cell = json.loads(file.read_text())
        except ValueError:
            continue
        if cell["arm"] in STUDIES[plan.name].arms and file.name == cell_file(plan, cell["arm"], cell["seed"]).name:
            found.append(cell)
    order = list(STUDIES[plan.name].arms)
    return sorted(found, key=lambda c: (order.index(c["arm"]), c["seed"]))


def error_of(values, n: int) -> float | None:
    """Standard error of a mean over seeds; of shares of n edits each at least the binomial one; None for one seed of anything else."""
    over_seeds = [float(values.std(ddof=1) / len(values) ** 0.5)] if len(values) > 1 else []
    over_edits = [float((values.mean() * (1 - values.mean()) / (n * len(values))) ** 0.5)] if values.name in SHARES else []
    return max(over_seeds + over_edits, default=None)


def summarize(rows: Sequence[Mapping]) -> list[dict]:
    """Per arm, in order: seeds, and mean and standard error of every figure and cost."""
    import pandas

    table, out = pandas.DataFrame(rows), []
    for arm, group in table.groupby("arm", sort=False):
        entry = {"arm": arm, "seeds": group["seed"].tolist(), "updates": int(group["updates"].iloc[0]), "n": int(group["n"].iloc[0])}
        for name in (c for c in table.columns if c not in ("arm", "seed", "updates", "n")):
            values = group[name].dropna()
            if len(values):
                entry[name] = float(values.mean())
                if (error := error_of(values, entry["n"])) is not None and name not in (*COSTS, *IN_USE):
                    entry[f"{name}_se"] = error
        out.append(entry)
    return out


def write_tables(plan: Plan) -> dict:
    """table.csv (a row per arm, way and seed), table.json (means, errors, what failed) and plot.png. Returns the JSON's content."""
    import pandas

    every = cells(plan)
    rows = [row for cell in every if cell["ok"] for row in rows_of(cell)]
    failed = [{"arm": c["arm"], "seed": c["seed"], "error": c["error"]} for c in every if not c["ok"]]
    study, out = STUDIES[plan.name], Path(plan.out)
    result = {
        "study": plan.name, "question": study.question, "tier": plan.tier, "equal": plan.equal, "updates": plan.updates, "n": plan.n,
        "overrides": {k: dict(v) for k, v in plan.overrides.items() if v}, "arms": summarize(rows) if rows else [], "failed": failed,
    }  # fmt: skip
    save_json(result, out / "table.json")
    if rows:
        pandas.DataFrame(rows).to_csv(out / "table.csv", index=False)
        draw(result, out / "plot.png")
    return result


def draw(result: Mapping, path: Path) -> Path:
    """Dots with errors per arm: success; done and kept; what the judges believe beyond it; distance to the manifold; what it cost; and
    success by edit type."""
    from matplotlib.figure import Figure

    from vlmedit.show import BAD, GOOD, save

    arms = result["arms"]
    names = [a["arm"] for a in arms]
    panels = [
        ("success", {"success": ("", GOOD, "o")}),
        ("edit and rest", {"done": ("done", GOOD, "o"), "kept": ("kept", BAD, "s")}),
        ("belief above success", {"hacking_gap": ("its judge", BAD, "o"), "held_out_gap": ("held-out judge", "#999999", "D")}),
        ("manifold-PSNR, dB", {"manifold_psnr": ("", GOOD, "o")}),
        ("CPU-seconds", {"cpu_seconds": ("", GOOD, "o")}),
    ]
    kinds = [k.removeprefix("success_") for k in arms[0] if k.startswith("success_") and not k.endswith("_se")]
    figure = Figure(figsize=(15, 1.6 + 0.36 * len(arms)))
    *axes, by_type = figure.subplots(1, len(panels) + 1, sharey=True, width_ratios=[1] * len(panels) + [1.6])
    for axis, (title, series) in zip(axes, panels):
        for key, (label, color, mark) in series.items():
            errors = [a.get(f"{key}_se", 0.0) for a in arms]
            axis.errorbar([a[key] for a in arms], range(len(arms)), xerr=errors, fmt=mark, color=color, capsize=3, label=label)
        axis.set_title(title, fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(alpha=0.3)
        if len(series) > 1:
            axis.legend(fontsize=7)
    by_type.imshow([[a[f"success_{k}"] for k in kinds] for a in arms], vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for i, a in enumerate(arms):
        for j, kind in enumerate(kinds):
            value = a[f"success_{kind}"]
            by_type.text(j, i, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=7, color="black" if value > 0.5 else "white")
    by_type.set_xticks(range(len(kinds)), kinds, rotation=40, fontsize=7)
    by_type.set_title("success by type", fontsize=9)
    axes[0].set_yticks(range(len(arms)), names, fontsize=8)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)  # the first on top
    best = max(arms, key=lambda a: a["success"])
    seeds = max(len(a["seeds"]) for a in arms)
    spent = f"{result['updates']} updates" if result["equal"] == "updates" else f"equal {EQUAL[result['equal']]}"
    figure.suptitle(f"{result['study']}, {spent}, {seeds} seed{'s' * (seeds > 1)}: {best['arm']} does best, {best['success']:.2f}", fontsize=10)
    return save(figure, path)


def read(name: str, folder: str | os.PathLike | None = None) -> dict:
    """A study's table.json. Raises `InputError` where it has not been run."""
    find(name)
    path = Path(folder or RESULTS / name) / "table.json"
    if not path.is_file():
        raise InputError(f"{path}: study {name!r} has not been run; run it: vlmedit study {name}")
    return json.loads(path.read_text())
