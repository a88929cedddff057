"""Is this machine ready, and how long will training take on it? One line per check, OK or FAIL.

Durations are measured, not looked up: each stage makes three real updates at a tier's own batch size, from random weights,
and the mean time of the last two is multiplied by the number of updates.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.resources import files
from pathlib import Path

from packaging.requirements import Requirement

from vlmedit.io import free_bytes

LEAST_PYTHON = (3, 11)
LEAST_DISK = 2**30  # bytes: a run's checkpoints, logs and pictures
PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "pillow")
EXTRAS = {"train": "training", "notebooks": "the notebooks", "data": "parquet files"}  # of the package -> what they are for
ROLES = ("editor", "teacher", "warm", "judge")
TRAINED_BY = {"teacher": "teacher", "softener": "teacher", "judge": "judge", "student": "copy_warmup", "students": "npedit"}  # setting that names a model -> stage that trains it
SLOW, PATIENCE = 10.0, 90.0  # seconds on one stage before its third update is left out, on one tier before its other stages are
COSTLIEST = {"attack_from": 0}  # times the updates as they are for most of a run


@dataclass(frozen=True)
class Check:
    """One line. `values` holds what a program would want to know."""

    name: str
    ok: bool
    detail: str
    values: dict = field(default_factory=dict)

    def line(self) -> str:
        return f"{'OK  ' if self.ok else 'FAIL'}  {self.name}: {self.detail}"


def python_version() -> Check:
    ok, least = sys.version_info >= LEAST_PYTHON, ".".join(map(str, LEAST_PYTHON))
    return Check("python", ok, platform.python_version() + ("" if ok else f"; {least} or newer is needed"), {"version": platform.python_version()})


def bounds(extra: str = "") -> dict[str, Requirement]:
    """The version bounds that this installation declares, or those that an extra adds; none when the package runs from its source folder."""
    try:
        declared = [Requirement(text) for text in metadata.requires("vlmedit") or ()]
    except metadata.PackageNotFoundError:
        return {}
    always = [r for r in declared if r.marker is None or r.marker.evaluate({"extra": ""})]
    chosen = [r for r in declared if r not in always and r.marker.evaluate({"extra": extra})] if extra else always
    return {r.name.lower(): r for r in chosen if r.name != "vlmedit"}


def packages() -> Iterator[Check]:
    known = bounds()
    for name in dict.fromkeys((*PACKAGES, *known)):
        bound = known[name].specifier if name in known else ""
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check(name, False, f"not installed; pip install '{name}{bound}'")
            continue
        ok = not bound or bound.contains(version, prereleases=True)
        yield Check(name, ok, version + ("" if ok else f"; {bound} is needed: pip install '{name}{bound}'"), {"version": version})


def extras() -> Iterator[Check]:
    """What was installed beyond the plain package: nothing has to be, but what is there must be of a version that works."""
    for extra, use in EXTRAS.items():
        lacking, wrong = [], []
        for name, requirement in bounds(extra).items():
            try:
                version = metadata.version(name)
            except metadata.PackageNotFoundError:
                lacking.append(name)
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                wrong.append(f"{name} {version}, {requirement.specifier} is needed")
        told = wrong + [f"not installed: {', '.join(lacking)}"] * bool(lacking)
        remedy = f"; pip install 'vlmedit[{extra}]'" if told else "there"
        yield Check(f"extra {extra}, for {use}", not wrong, "; ".join(told) + remedy, {"lacking": lacking})


def device() -> Check:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    values = {"cores": cores, "threads": torch.get_num_threads(), "device": "cpu"}
    words = f"cpu, {cores} cores, {values['threads']} threads"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        values |= {"device": "cuda", "gpu": card.name, "gpus": torch.cuda.device_count()}
        words = f"{values['gpus']} x {card.name}, {card.total_memory / 2**30:.0f} GB; {words}"
    elif torch.backends.mps.is_available():
        values["device"], words = "mps", f"mps; {words}"
    return Check("device", True, words, values)


def disk(place: Path = Path(".")) -> Check:
    free = free_bytes(place)
    return Check("disk", free >= LEAST_DISK, f"{free / 2**30:.1f} GB free here" + ("" if free >= LEAST_DISK else f"; {LEAST_DISK / 2**30:.0f} GB are needed"), {"free_bytes": free})


def checkpoints(root: Path | None = None, family: str = "shapes") -> Iterator[Check]:
    """The shipped models: there, and their weights readable."""
    from safetensors import SafetensorError, safe_open

    root = root or Path(str(files("vlmedit"))) / "checkpoints"
    for role in ROLES:
        folder = root / family / role
        weights = sorted(folder.glob("*.safetensors"))
        if not weights or not (folder / "config.json").is_file():
            yield Check(f"checkpoint {role}", False, f"not found in {folder}; train it (vlmedit train) or install the package again")
            continue
        try:
            json.loads((folder / "config.json").read_text())
            count = 0
            for path in weights:
                with safe_open(path, "pt") as file:
                    count += len(file.keys())
        except (SafetensorError, OSError, ValueError) as error:
            yield Check(f"checkpoint {role}", False, f"{folder} is damaged ({error}); install the package again")
            continue
        size = sum(p.stat().st_size for p in weights)
        yield Check(f"checkpoint {role}", True, f"{size / 1e6:.1f} MB in {folder}", {"bytes": size, "tensors": count})


def lacking_models(config) -> list[str]:
    """Which models a stage starts from are not where its configuration says, and what trains them."""
    given = {name: getattr(config, name, None) or () for name in TRAINED_BY}
    places = [(name, Path(place)) for name, value in given.items() for place in ((value,) if isinstance(value, str) else value)]
    return [
        f"{name} is {str(place)!r}, no folder with a model; train it (vlmedit train {TRAINED_BY[name]}) or name another with --set {name}=FOLDER"
        for name, place in places
        if not (place / "config.json").is_file()
    ]


def random_models(tier: str, folder: Path) -> dict[str, str]:
    """Untrained models of a tier, saved: what a stage starts from when only its speed matters."""
    from vlmedit.data.batches import TEXT_LENGTH
    from vlmedit.methods.judge import JudgeConfig, build_judge
    from vlmedit.networks.dit import DiT
    from vlmedit.world.tokenizer import build_tokenizer

    config = JudgeConfig.make(tier)
    DiT(side=config.side, vocab_size=len(build_tokenizer()), text_length=TEXT_LENGTH).save_pretrained(folder / "dit")
    build_judge(config.size, config.side).save_pretrained(folder / "judge")
    return {name: str(folder / ("judge" if name == "judge" else "dit")) for name in TRAINED_BY if name != "students"}


def stage_seconds(config, loop) -> float:
    """Seconds per update of a stage, without its first; of one update alone where updates are slow."""
    steps, marks = loop(config), [time.perf_counter()]
    for _ in itertools.islice(steps, 3):
        marks.append(time.perf_counter())
        if len(marks) > 2 and marks[-1] - marks[0] > SLOW:
            break
    steps.close()
    return (marks[-1] - marks[1]) / (len(marks) - 2)


def durations(tiers: tuple[str, ...]) -> Iterator[Check]:
    """Minutes per tier and stage, measured. A stage that cannot make an update is a FAIL of its tier."""
    from vlmedit.methods import find, names

    for tier in tiers:
        minutes, failed, began = {}, [], time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            models = random_models(tier, Path(scratch) / "models")
            for name in names():
                config_class, loop = find(name)
                if time.perf_counter() - began > PATIENCE:
                    break
                given = {k: v for k, v in (models | COSTLIEST).items() if k in config_class.known()}
                config = config_class.make(tier, out=str(Path(scratch) / "runs" / name), **given)
                try:
                    minutes[name] = stage_seconds(config, loop) * config.steps / 60
                except Exception as error:  # whatever it is: a doctor reports it and goes on
                    failed.append(f"{name} fails ({type(error).__name__}: {str(error).splitlines()[0]})")
        words = [f"{name} {m:.0f}" if m >= 10 else f"{name} {m:.2g}" for name, m in minutes.items()]
        rest = [f"{name} not timed: this machine is slow or busy" for name in names()[len(minutes) + len(failed) :]]
        yield Check(f"minutes, tier {tier}", not failed, ", ".join(failed + words + rest), {"minutes": {k: round(v, 2) for k, v in minutes.items()}})


def examine(timed: bool = True) -> Iterator[Check]:
    """All checks, in order; each is made when it is asked for."""
    found = [python_version(), *packages()]
    yield from found
    if not all(c.ok for c in found):
        return  # what follows needs the packages
    here = device()
    more = list(extras())
    yield from (*more, here, disk(), *checkpoints())
    if timed and not more[0].values["lacking"]:
        yield from durations(("smoke", "laptop", "gpu") if here.values["device"] == "cuda" else ("smoke", "laptop"))


def report(checks: list[Check]) -> dict:
    """The checks for `--json`."""
    return {"ok": all(c.ok for c in checks), "checks": [asdict(c) for c in checks]}
