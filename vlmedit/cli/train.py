"""`vlmedit train`: the main job, a stage of the miniature, or a stage on real models; shows the updates and says how to
go on."""

from __future__ import annotations

import dataclasses
import difflib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import Progress
from tyro.conf import Positional

from vlmedit.cli._settings import parse_pairs, read_settings, typed
from vlmedit.cli._shared import RUN_BYTES, JsonFile, Tier, check_json, leads, progress_bar, refuse, say, show_table
from vlmedit.errors import ConfigError, InputError

ORDER = 2
RENAMED = {"warmup": "copy_warmup", "grpo": "flow_grpo", "synthetic": "synthetic_pairs", "cyclegan": "cyclegan_turbo"}


def train(
    stage: Positional[str] = "main",
    *,
    tier: Tier = "laptop",
    config: Path | None = None,
    set: tuple[str, ...] = (),
    out: Path | None = None,
    dry_run: bool = False,
    json: JsonFile = None,
) -> int:
    """Train: the README's main job, or one stage. The same command resumes a run that was stopped.

    Settings that name a backbone train real models: `train npedit --config zimage_internvl` (shipped), `train
    copy_warmup` their copy warm-up.

    Args:
        stage: main, or one of the stages teacher, judge, copy_warmup, npedit, sft, flow_grpo, synthetic_pairs, cyclegan_turbo, bootstrap, distill.
        tier: smoke (seconds), laptop (the shipped checkpoints) or gpu (a larger world).
        config: Settings as a .json or .yaml file, for example a run folder's config.json, or the name of shipped ones for real models.
        set: Settings as key=value; they win over the file.
        out: Run folder.
        dry_run: Of a real run: print memory and FLOPs per role and load nothing.
    """  # noqa: E501
    from vlmedit.io import save_json

    refuse(check_json(json))
    if out is not None:
        check_room(out)
    given = (read_settings(config) if config else {}) | parse_pairs(set) | ({"out": str(out)} if out else {})
    if "backbone" in given:
        check_real_stage(stage, config)
        result = train_real(stage, tier, given, dry_run)
    elif dry_run:
        lacking = "the settings name no backbone (--config zimage_internvl, for example)"
        raise InputError(f"--dry-run counts runs of real models; {lacking}")
    else:
        result = train_main(tier, given) if stage == "main" else train_stage(stage, tier, given)
    if json and leads():
        save_json(result, json)
    leave_together()
    return 0


def leave_together() -> None:
    """Close the connection between processes that a launcher started, when all are done: one that leaves with it open,
    or while another still needs it, may abort at its very end."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        import torch.distributed as dist

        if dist.is_initialized():  # a dry run only counts processes
            dist.barrier()
            dist.destroy_process_group()


def check_room(out: Path) -> None:
    """Raise `InputError` unless a run's folder can be written."""
    from vlmedit.io import check_space, check_writable

    check_writable(out, "folder")
    check_space(out, RUN_BYTES)


def check_real_stage(stage: str, config: Path | None) -> None:
    """Raise `InputError` for a stage that no real models are trained by."""
    if stage not in ("npedit", "copy_warmup"):
        problem = "the settings name a backbone, and real models are trained by the stages npedit and copy_warmup"
        raise InputError(f"{problem}, not {stage}: vlmedit train npedit --config {config or 'FILE'}")


def check_run(config) -> None:
    """Raise `InputError` unless a run's models are there and its folder can be written."""
    from vlmedit.doctor import lacking_models

    refuse(lacking_models(config))
    check_room(Path(config.out))


def train_stage(stage: str, tier: str, given: dict) -> dict:
    """Run one training stage; returns its configuration and last metrics."""
    from vlmedit.methods import find, names

    if stage not in names():
        if stage in RENAMED:
            raise ConfigError(f"unknown stage {stage!r}; it is called {RENAMED[stage]} now")
        near = difflib.get_close_matches(stage, ("main", *names()), 1)
        nearest = f" (nearest: {near[0]})" if near else ""
        raise ConfigError(f"unknown stage {stage!r}{nearest}; known: main, {', '.join(names())}")
    config_class, stage_loop = find(stage)
    config = config_class.make(tier, **typed(config_class, given))
    check_run(config)
    return follow(stage, tier, config, stage_loop)


def train_real(stage: str, tier: str, given: dict, dry_run: bool) -> dict:
    """Run a stage on real models, or count what it would cost."""
    from vlmedit.training.settings import CopyConfig, RealConfig

    config_class = RealConfig if stage == "npedit" else CopyConfig
    real, copy = ({f.name for f in dataclasses.fields(c)} for c in (RealConfig, CopyConfig))
    if stage == "npedit" and (copying := sorted(given.keys() & (copy - real))):
        problem = "settings of the copy warm-up, not of npedit; run vlmedit train copy_warmup with them"
        raise InputError(f"{', '.join(copying)}: {problem}")
    config = config_class.make(tier, **typed(config_class, given))
    if dry_run:
        return {"stage": stage, "dry_run": True, **count(config)}
    check_room(Path(config.out))
    from vlmedit.training import real_models as real_train

    return follow(stage, tier, config, real_train.train_real if stage == "npedit" else real_train.train_copy)


def count(config) -> dict:
    """What a run on real models would hold and compute; shows it."""
    from vlmedit.cost import plan, table

    try:
        found = plan.plan(config)
    except InputError:
        raise
    except ValueError as error:  # a class that nobody here knows
        raise InputError(f"cannot be counted: {str(error).splitlines()[0]}") from error
    if leads():
        table.show(found)
    return found.report()


def follow(stage: str, tier: str, config, loop) -> dict:
    """Run a stage's loop to its end; returns the run's record."""
    began = time.time()
    with following(stage, config) as watch:
        for step in loop(config):
            watch(step)
    if watch.step is None:
        say(f"nothing left to do: {config.out} holds a finished run of {config.steps} updates")
    else:
        show_table(f"{stage}, {watch.step.index} updates", watch.step.metrics)
    last = watch.step.metrics if watch.step else {}
    return {"stage": stage, "tier": tier, **watch.record(), "metrics": last, "seconds": round(time.time() - began, 2)}


def train_main(tier: str, given: dict) -> dict:
    """Run the README's main job; returns its configuration and what the oracle measured."""
    from vlmedit.experiments.live import live_config, run_main
    from vlmedit.methods.npedit import NPEditConfig

    settings = typed(NPEditConfig, given)
    config = live_config(tier, **settings)
    check_run(config)
    began = time.time()
    with following("main", config) as watch:
        metrics = run_main(tier, progress=watch, **settings)
    for name, found in metrics.items():
        if isinstance(found, dict):
            show_table(name, {k: v for k, v in found.items() if isinstance(v, float)})
    say(f"pictures, metrics and logs are in {config.out}")
    seconds = round(time.time() - began, 2)
    return {"stage": "main", "tier": tier, **watch.record(), "metrics": metrics, "seconds": seconds}


class Watch:
    """Shows every `Step` it is called with and remembers the last one."""

    def __init__(self, stage: str, config, progress: Progress):
        self.config, self.progress, self.step, self.skipped = config, progress, None, 0
        self.task = progress.add_task(stage, total=config.steps, note="")

    def __call__(self, step) -> None:
        self.step, self.skipped = step, self.skipped + step.skipped
        note = "  ".join(f"{k} {v:.3g}" for k, v in list(step.metrics.items())[:3])
        self.progress.update(self.task, completed=step.index, total=step.total, note=note)

    def record(self) -> dict:
        """Where the run is, its configuration, and how far it came."""
        done = self.step.index if self.step else self.config.steps
        config = self.config.flat()
        return {"out": self.config.out, "config": config, "updates": done, "skipped": self.skipped}


@contextmanager
def following(stage: str, config) -> Iterator[Watch]:
    """A progress bar for a run; when the run is interrupted, says how to go on."""
    from vlmedit.io import disk_errors

    with progress_bar() as progress, disk_errors(Path(config.out)):
        watch = Watch(stage, config, progress)
        try:
            yield watch
        except KeyboardInterrupt:
            progress.stop()
            done = f"stopped after update {watch.step.index if watch.step else 0} of {config.steps}"
            kept = f"the last checkpoint in {config.out} (one every {config.save_every} updates)"
            say(f"{done}; the same command resumes from {kept}")
            raise
