"""What is to be done: a checked plan, the configuration of every training in it, and the names of what comes out.

Trainings live in `runs/STAGE-HASH`, named by their configuration and the weights they start from, so that arms and studies that share one
train it once. A cell, an arm and a seed, has its record in `out/cells`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlmedit.config import TrainConfig
from vlmedit.experiments.study.arms import WAYS, Arm, Role, Share, find, nearest
from vlmedit.io import InputError, check_space, check_writable
from vlmedit.methods.stages import STAGES
from vlmedit.pipelines.shapes import checkpoint

RUNS = Path("runs/studies")
UPDATES = {"smoke": 2, "laptop": 600, "gpu": 3000}  # of the student, unless said
REQUESTS = {"smoke": 8, "laptop": 512, "gpu": 2048}  # held-out edits
ROLES = {"teacher": "teacher", "judge": "judge", "student": "warm", "held_out": "second_judge"}  # what all arms share, and its shipped checkpoint
PATHS = (*ROLES, "second", "softener", "start", "students")  # settings that name models' folders
EQUAL = {"updates": "updates", "calls": "calls of the student", "cpu": "CPU-seconds"}  # what arms may have in common
CELL_BYTES = 80 * 2**20  # disk space of one training while it runs


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


def known_settings(arms: Iterable[Arm]) -> dict[str, set[str]]:
    """Stage -> names of its settings that a study's user may override: not those that all its trainings set themselves."""
    arms = list(arms)
    stages = {part.stage for arm in arms for part in arm.parts}
    parts = {stage: [part for arm in arms for part in arm.parts if part.stage == stage] for stage in stages}
    studied = {stage: set.intersection(*(set(part.settings) for part in of_stage)) for stage, of_stage in parts.items()}
    fixed = {"out", "seed", "steps"}
    return {stage: {f.name for f in dataclasses.fields(STAGES[stage][0])} - fixed - studied[stage] for stage in sorted(stages)}


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
        str(out or folder_of(name, tier, equal)), str(runs or RUNS), equal,
    )  # fmt: skip
    check(made)
    return made


def results_folder() -> Path:
    """Where studies keep their results: with the papers in a checkout, anywhere else with their trainings."""
    papers = Path("papers/results")
    return papers / "studies" if papers.is_dir() else RUNS


def folder_of(name: str, tier: str = "laptop", equal: str = "updates") -> Path:
    """Where a study's results go by default: with the others, but for tier smoke, whose figures mean nothing."""
    return (results_folder() if tier != "smoke" else RUNS.parent / "smoke") / (name if equal == "updates" else f"{name}-equal-{equal}")


def other_results(plan: Plan) -> str | None:
    """What is in the plan's folder already, where it cannot stand in one table with the plan's."""
    try:
        there = json.loads((Path(plan.out) / "table.json").read_text())
    except (OSError, ValueError):
        return None
    mine = {"tier": plan.tier, "equal": plan.equal, "updates": plan.updates, "n": plan.n, "overrides": {k: dict(v) for k, v in plan.overrides.items() if v}}
    apart = [f"{key} {there.get(key)} there, {value} now" for key, value in mine.items() if there.get(key) != value]
    return f"{plan.out} holds results of another plan ({'; '.join(apart)}); name another folder with --out, or delete it" if apart else None


def side_of(folder: str) -> int | None:
    """The side of the pictures a saved model is made for, None where there is no model."""
    try:
        return json.loads((Path(folder) / "config.json").read_text())["side"]
    except (OSError, ValueError, KeyError):
        return None


def check(plan: Plan) -> None:
    """Models there and of the right side, configurations valid, folders writable and of this plan, before anything is trained."""
    if told := other_results(plan):
        raise InputError(told)
    problems = [f"{role} is {folder!r}, no folder with a model" for role, folder in plan.models.items() if side_of(folder) is None]
    if problems:
        raise InputError(problems, "train one (vlmedit train) or name another with --set ROLE=FOLDER")
    tasks = [task for arm in plan.arms for seed in plan.seeds for task in prepare(plan, arm, seed)]
    made = {f"{task.config.out}/model" for task in tasks}
    for name in PATHS:
        asked = {value for task in tasks if isinstance(value := getattr(task.config, name, None), str)} - made - set(plan.models.values())
        problems += [f"{name} is {folder!r}, no folder with a model; train one (vlmedit train) or leave it out" for folder in sorted(asked) if side_of(folder) is None]
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


def cell_key(plan: Plan, arm: str, seed: int) -> str:
    """Identifies a cell's result: its trainings, how its student is used, who is asked what he thinks of it."""
    chosen = find(plan.name).arms[arm]
    trained = [t.key for t in prepare(plan, arm, seed)] or [digest(plan.models["teacher"]), seed]
    return short_hash([trained, {way: WAYS[way] for way in chosen.ways}, chosen.watched, chosen.before, plan.n, *(digest(plan.models[role]) for role in ("judge", "held_out"))])


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


def student_updates(tasks: Iterable[Task]) -> int:
    return sum(task.config.steps for task in tasks if task.stage != "judge")
