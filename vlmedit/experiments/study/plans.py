"""What is to be done: a checked plan. What it trains is in trainings.py, where its results are in records.py."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vlmedit.errors import InputError
from vlmedit.experiments.study.arms import Arm, find, nearest
from vlmedit.experiments.study.records import check_results
from vlmedit.experiments.study.trainings import PATHS, ROLES, Plan, places, prepare
from vlmedit.io import check_space, check_writable
from vlmedit.methods import find as find_method
from vlmedit.pipelines.shapes import checkpoint

RUNS = Path("runs/studies")
UPDATES = {"smoke": 2, "laptop": 600, "gpu": 3000}  # of the student, unless said
REQUESTS = {"smoke": 8, "laptop": 512, "gpu": 2048}  # held-out edits
EQUAL = {"updates": "updates", "calls": "calls of the student", "cpu": "CPU-seconds"}  # what arms may have in common
CELL_BYTES = 80 * 2**20  # disk space of one training while it runs


def known_settings(arms: Iterable[Arm]) -> dict[str, set[str]]:
    """Stage -> names of its settings that a study's user may override: not those that all its trainings set themselves."""
    arms = list(arms)
    stages = {part.stage for arm in arms for part in arm.parts}
    parts = {stage: [part for arm in arms for part in arm.parts if part.stage == stage] for stage in stages}
    studied = {stage: set.intersection(*(set(part.settings) for part in of_stage)) for stage, of_stage in parts.items()}
    fixed = {"data", "out", "seed", "steps"}
    return {stage: set(find_method(stage)[0].known()) - fixed - studied[stage] for stage in sorted(stages)}


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


def side_of(folder: str) -> int | None:
    """The side of the pictures a saved model is made for, None where there is no model."""
    try:
        return json.loads((Path(folder) / "config.json").read_text())["side"]
    except (OSError, ValueError, KeyError):
        return None


def check(plan: Plan) -> None:
    """Models there and of the right side, configurations valid, folders writable and of this plan, before anything is trained."""
    problems = [f"{role} is {folder!r}, no folder with a model" for role, folder in plan.models.items() if side_of(folder) is None]
    if problems:
        raise InputError(problems, "train one (vlmedit train) or name another with --set ROLE=FOLDER")
    tasks = [task for arm in plan.arms for seed in plan.seeds for task in prepare(plan, arm, seed)]
    made = {f"{task.config.out}/model" for task in tasks}
    for name in PATHS:
        asked = {folder for task in tasks for folder in places(getattr(task.config, name, None))} - made - set(plan.models.values())
        problems += [f"{name} is {folder!r}, no folder with a model; train one (vlmedit train) or leave it out" for folder in sorted(asked) if side_of(folder) is None]
    for role, folder in plan.models.items():
        for side in sorted({task.config.side for task in tasks} - {side_of(folder)}):
            problems.append(f"side is {side}, and the {role} in {folder} is made for {side_of(folder)}; pass --set side={side_of(folder)}, or models of side {side}")
    if problems:
        raise InputError(problems)
    check_results(plan)
    check_writable(Path(plan.out), "folder")
    check_writable(Path(plan.runs), "folder")
    check_space(Path(plan.runs), CELL_BYTES)
