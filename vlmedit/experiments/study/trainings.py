"""Every training of a plan: its configuration, the weights that it starts from, and what of both identifies it.

Trainings live in `runs/STAGE-HASH`, named by their settings and the weights they start from, so that arms and
studies that share one train it once. The hash names a working folder alone: a result is found by what its record
says (records.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vlmedit.config import TrainConfig
from vlmedit.experiments.study.arms import Part, Role, Share, find
from vlmedit.methods import find as find_method

ROLES = {
    "teacher": "teacher",
    "judge": "judge",
    "student": "warm",
    "held_out": "second_judge",
}  # what all arms share, and its shipped checkpoint
PATHS = (*ROLES, "softener", "start", "students")  # settings that name models' folders


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
    factors: Mapping[str, float] = field(
        default_factory=dict
    )  # arm -> its updates as a multiple of the plan's, where cost is made equal
    pilot: bool = False  # a few updates, to learn their cost


Starts = Mapping[str, str | list[str]]  # setting -> digest of its model's weights, or "training N" of the same arm


@dataclass(frozen=True)
class Task:
    """A training with its configuration; `key` names its folder."""

    stage: str
    config: TrainConfig
    key: str
    starts: Starts


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


def places(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The folders that a setting names: none, one or several."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def find_role(value, models: Mapping[str, str]):
    """A setting, the roles in it replaced by their models' folders."""
    if isinstance(value, tuple):
        return tuple(find_role(v, models) for v in value)
    return models[value] if isinstance(value, Role) else value


def name_of(value: str | tuple[str, ...], known: Mapping[str, str]) -> str | list[str]:
    """What identifies the models of a setting: the training that is to make them, or their weights."""
    return [name_of(v, known) for v in value] if isinstance(value, tuple) else known.get(value) or digest(value)


def starts_of(config: TrainConfig, known: Mapping[str, str]) -> dict[str, str | list[str]]:
    """What a training starts from, by setting; `known` names folders that are still to be filled."""
    return {k: name_of(v, known) for k in PATHS if (v := getattr(config, k, None))}


def settings_of(config: TrainConfig) -> dict:
    """What decides, besides the weights that it starts from, what comes out of a training: neither folders nor
    settings of the machine."""
    left_out = {*PATHS, *config.machine} - {"steps"}
    return {k: v for k, v in config.flat().items() if k not in left_out}


def updates_of(plan: Plan, arm: str, part: Part) -> int:
    """How many updates one of an arm's trainings makes."""
    if part.updates is not None:
        return 2 if plan.tier == "smoke" or plan.pilot else part.updates
    return max(1, round(part.share * plan.factors.get(arm, 1.0) * plan.updates))


def configure(plan: Plan, arm: str, seed: int, part: Part, models: Mapping[str, str]) -> TrainConfig:
    """The configuration of one of an arm's trainings. `models` are the plan's and those that earlier trainings of
    the arm give."""
    config_class = find_method(part.stage)[0]
    updates, names = updates_of(plan, arm, part), config_class.known()
    settings = {k: find_role(v, models) for k, v in part.settings.items()}
    given = {k: v for k, v in models.items() if k in names} | plan.overrides.get(part.stage, {}) | settings
    if plan.tier != "smoke" and "softener" in names:
        given.setdefault("softener", models["teacher"])
    given |= {"seed": seed, "steps": updates} | ({} if plan.tier == "smoke" else {"save_every": 100})
    draws = updates * config_class.make(plan.tier, **{k: v for k, v in given.items() if not isinstance(v, Share)}).batch
    return config_class.make(
        plan.tier, **{k: max(1, round(v * draws)) if isinstance(v, Share) else v for k, v in given.items()}
    )


def prepare(plan: Plan, arm: str, seed: int) -> list[Task]:
    """An arm's trainings, in order. What one gives, the next start from."""
    models, keys, numbers, tasks = dict(plan.models), {}, {}, []
    for number, part in enumerate(find(plan.name).arms[arm].parts, 1):
        config = configure(plan, arm, seed, part, models)
        key = short_hash([part.stage, settings_of(config), starts_of(config, keys)])
        out = Path(plan.runs) / f"{part.stage}-{key}"
        tasks.append(Task(part.stage, config.replace(out=str(out)), key, starts_of(config, numbers)))
        models[part.gives] = folder = str(out / "model")
        keys[folder], numbers[folder] = key, f"training {number}"
    return tasks


def student_updates(tasks: Iterable[Task]) -> int:
    return sum(task.config.steps for task in tasks if task.stage != "judge")
