"""The records of cells, an arm and a seed each, in `out/cells`: what they say of themselves, and how they are found
again.

A record states its trainings (stage, settings, starting weights) and how their student was measured, and is found by
that: a setting that did not exist when it was written had what is its default today, settings of the machine do not
count. The hash in a file's name only keeps cells of other settings apart. Records that are older than their form state
423b563 as the code that made them, the last commit that found them by such a hash.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

import vlmedit
from vlmedit.errors import InputError
from vlmedit.experiments.study.arms import WAYS, find
from vlmedit.experiments.study.trainings import (
    PATHS,
    Plan,
    Task,
    digest,
    prepare,
    settings_of,
    short_hash,
    student_updates,
)

Differences = dict[str, tuple]  # what -> (there, now)
NAMED = 5  # differences in a message
ROOT = Path(vlmedit.__file__).parents[1]


def git(*words: str) -> str:
    """What git answers about the folder of the package."""
    told = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    return told.stdout.strip()


@cache
def code() -> str:
    """The commit of the checkout that runs, with a plus where files differ from it; the version of an installed
    package."""
    if (ROOT / ".git").exists():
        try:
            return git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", "vlmedit", "kernels"))
        except (OSError, subprocess.CalledProcessError):
            pass
    return metadata.version("vlmedit")


def identity(plan: Plan, arm: str, seed: int) -> dict:
    """What a cell's record says of how its result was made."""
    tasks = prepare(plan, arm, seed)
    return {
        "study": plan.name,
        "arm": arm,
        "seed": seed,
        "tier": plan.tier,
        "updates": student_updates(tasks),
        "code": code(),
        "trainings": [
            {"stage": task.stage, "settings": settings_of(task.config), "starts": dict(task.starts)} for task in tasks
        ],
        "measured": measured(plan, arm),
    }


def measured(plan: Plan, arm: str) -> dict:
    """How an arm's student is used, and who is asked what he thinks of it. Without trainings the teacher is the
    student."""
    chosen = find(plan.name).arms[arm]
    asked = {
        "ways": {way: dict(WAYS[way]) for way in chosen.ways},
        "watched": chosen.watched,
        "before": chosen.before,
        "n": plan.n,
    }
    roles = ("judge", "held_out") if chosen.parts else ("teacher", "judge", "held_out")
    return asked | {role: digest(plan.models[role]) for role in roles}


def training_differences(then: Mapping, task: Task) -> Differences:
    """In what a recorded training is another one than `task`."""
    if then["stage"] != task.stage:
        return {"stage": (then["stage"], task.stage)}
    now = task.config.flat()
    found = task.config.differences({**then["settings"], **{k: now[k] for k in PATHS if k in now}})
    if then["settings"]["steps"] != now["steps"]:
        found["steps"] = (then["settings"]["steps"], now["steps"])
    return found | {
        k: (then["starts"].get(k), task.starts.get(k)) for k in PATHS if then["starts"].get(k) != task.starts.get(k)
    }


def differences(plan: Plan, cell: Mapping) -> Differences:
    """In what a recorded cell is not the one that the plan has of its arm and seed."""
    if "measured" not in cell:
        return {"version": ("before 0.2", "0.2")}
    tasks, then, now = prepare(plan, cell["arm"], cell["seed"]), cell["measured"], measured(plan, cell["arm"])
    if len(tasks) != len(cell["trainings"]):
        return {"trainings": (len(cell["trainings"]), len(tasks))}
    found: Differences = {}
    for trained, task in zip(cell["trainings"], tasks, strict=True):
        found |= training_differences(trained, task)
    return found | {k: (then.get(k), now.get(k)) for k in {**now, **then} if then.get(k) != now.get(k)}


def read_cells(plan: Plan, pattern: str = "*") -> Iterator[tuple[Path, dict]]:
    """The records in the study's folder, of whatever settings, of arms that the study has."""
    for file in sorted((Path(plan.out) / "cells").glob(f"{pattern}.json")):
        try:
            cell = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if cell["arm"] in find(plan.name).arms:
            yield file, cell


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("%", "percent")).strip("-")


def record_of(plan: Plan, arm: str, seed: int) -> tuple[Path, dict] | None:
    """The file and the record of a cell, one that went well before one that failed; None where there is none."""
    named = [
        (file, cell)
        for file, cell in read_cells(plan, f"{slug(arm)}-seed{seed}-*")
        if (cell["arm"], cell["seed"]) == (arm, seed)
    ]
    mine = [(file, cell) for file, cell in named if not differences(plan, cell)]
    return max(mine, key=lambda found: found[1]["ok"], default=None)


def cell_file(plan: Plan, arm: str, seed: int) -> Path:
    """Where a cell's record is, or is to be."""
    if found := record_of(plan, arm, seed):
        return found[0]
    about = {k: v for k, v in identity(plan, arm, seed).items() if k != "code"}
    return Path(plan.out) / "cells" / f"{slug(arm)}-seed{seed}-{short_hash(about)}.json"


def finished(plan: Plan, arm: str, seed: int) -> dict | None:
    """The record of a cell that went well, or None."""
    found = record_of(plan, arm, seed)
    return found[1] if found and found[1]["ok"] else None


def cells(plan: Plan) -> list[dict]:
    """All records in the study's folder that belong to this plan: any arm and seed at its tier, updates, requests
    and settings."""
    found = {(cell["arm"], cell["seed"]) for _, cell in read_cells(plan)}
    mine = [record for arm, seed in found if (record := record_of(plan, arm, seed))]
    order = list(find(plan.name).arms)
    return sorted((cell for _, cell in mine), key=lambda c: (order.index(c["arm"]), c["seed"]))


def check_results(plan: Plan) -> None:
    """Raise `InputError` where the plan's folder holds results that cannot stand in one table with the plan's: its
    table would lose them."""
    try:
        there = json.loads((Path(plan.out) / "table.json").read_text())
    except (OSError, ValueError):
        return
    mine = {
        "tier": plan.tier,
        "equal": plan.equal,
        "updates": plan.updates,
        "n": plan.n,
        "overrides": {k: dict(v) for k, v in plan.overrides.items() if v},
    }
    apart = [f"{key} {there.get(key)} there, {value} now" for key, value in mine.items() if there.get(key) != value]
    known = plan.equal == "updates" or plan.factors  # how many updates each arm makes
    if known and not apart:
        apart = strangers(plan)
    if apart:
        rest = [f"and {len(apart) - NAMED} more"] * (len(apart) > NAMED)
        told = "; ".join(apart[:NAMED] + rest)
        raise InputError(
            f"{plan.out} holds results of another plan ({told}); name another folder with --out, or delete it"
        )


def strangers(plan: Plan) -> list[str]:
    """The good cells in the plan's folder that are none of the plan's, and why not."""
    told = []
    for arm, seed in {(cell["arm"], cell["seed"]): None for _, cell in read_cells(plan) if cell["ok"]}:
        if not finished(plan, arm, seed):
            cell = next(c for _, c in read_cells(plan) if c["ok"] and (c["arm"], c["seed"]) == (arm, seed))
            told += [
                f"{arm}, seed {seed}: "
                + ", ".join(f"{k} {then} there, {now} now" for k, (then, now) in differences(plan, cell).items())
            ]
    return told
