"""The command line: `vlmedit doctor | train | edit | eval | export | data | bench | notebook | study`. Each command takes `--json FILE`.

Exit codes: 0 done, 1 a check of `doctor`, a notebook or an arm of a study failed, 2 bad input (one message, no traceback, nothing half-written), 130 interrupted.
Heavy imports wait until a command has checked what it was given.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from vlmedit.config import ConfigError
from vlmedit.io import InputError, check_space, check_writable, disk_errors, save_json
from vlmedit.world.edits import ImpossibleEdit
from vlmedit.world.language import UnknownInstruction

BAD_INPUT, INTERRUPTED = 2, 130
RUN_BYTES = 200 * 2**20  # disk space of a training run
MOST_SIDE = 4096  # pixels at which a real model may work
JsonFile = Annotated[Path | None, arg(name="json", metavar="FILE", help="Also write the result as JSON.")]
Tier = Literal["smoke", "laptop", "gpu"]


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _leads() -> bool:
    """Whether this is the first of the processes that a launcher started: the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def _table(title: str, rows: dict[str, Any]) -> None:
    if not _leads():
        return
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    return Progress(*columns, console=Console(stderr=True), disable=not _leads())


def _at_least(**values: tuple[int, int]) -> list[str]:
    """Problems of options that lie below their least value."""
    return [f"--{k.replace('_', '-')} is {value}; it must be at least {least}" for k, (value, least) in values.items() if value < least]


def _check_json(json: Path | None) -> list[str]:
    try:
        json and check_writable(json)
    except InputError as error:
        return list(error.problems)
    return []


def _raise(problems: list[str]) -> None:
    if problems:
        raise InputError(problems)


def doctor(*, quick: bool = False, json: JsonFile = None) -> int:
    """Check this installation and estimate how long training takes here.

    Args:
        quick: Do not time the training stages.
    """
    from vlmedit.doctor import examine, report

    _raise(_check_json(json))
    checks = []
    for check in examine(timed=not quick):
        print(check.line(), flush=True)
        checks.append(check)
    if json:
        save_json(report(checks), json)
    return 0 if all(check.ok for check in checks) else 1


def edit(
    input: Positional[Path],
    instruction: Positional[str] = "",
    *,
    out: Path,
    report: bool = False,
    steps: int | None = None,
    seed: int = 0,
    num_samples: int = 1,
    best_of: int = 0,
    model: str = "shapes",
    judge: str = "",
    side: int | None = None,
    skip_existing: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    json: JsonFile = None,
) -> int:
    """Edit a picture, a folder of pictures or a .jsonl manifest by instruction.

    The shipped model works at 32 x 32 pixels: the input is padded to a square with its border's color and scaled down, and the edit
    is scaled back to the input's size, without its finest detail. A real model (what `vlmedit export` wrote) takes any picture and any
    instruction: it works at as many pixels as it was trained at, or at --side, and the edit has the input's size too.

    Args:
        input: A PNG, JPEG or WebP picture, a folder of them, or a manifest of {"image": ..., "instruction": ...} lines.
        instruction: What to do, for example "make the circle red"; none for a manifest.
        out: The edited picture, or a folder when the input is a folder or a manifest.
        report: Also write, next to each edit, the judge's answers (.json) and a strip (-strip.png).
        steps: Network calls of the sampler; by default 4, or what a real model was trained with.
        seed: Of the noise; a picture's result does not depend on the others.
        num_samples: Edits to draw of each picture, numbered -1, -2, ...
        best_of: Draw that many and keep the one the judge likes best; 0 draws one without asking.
        model: "shapes" (shipped), the folder of a saved pipeline or training run, or what `vlmedit export` wrote: its folder or id.
        judge: Of a real model, for --report and --best-of: a vision-language model by folder or id.
        side: Pixels of the longer side at which a real model works.
        skip_existing: Leave alone what is edited already, to go on with a folder that was stopped.
        force: Try edits that the picture seems not to allow; a real model tries all.
        trust_remote_code: Run code that comes with a real model and is not the file that `vlmedit export` writes.
    """
    from vlmedit.pipelines.batch_edit import carry_out, find_exported, load_pipeline, model_side, prepare

    given = dict(steps=(steps, 1), seed=(seed, 0), num_samples=(num_samples, 1), best_of=(best_of, 0), side=(side, 16))
    problems = _at_least(**{k: v for k, v in given.items() if v[0] is not None}) + _check_json(json)
    if best_of and num_samples > 1:
        problems.append(f"--best-of {best_of} keeps one edit and --num-samples {num_samples} keeps all; choose one of them")
    exported, view, fitted = find_exported(model, trust_remote_code), 32, None
    problems += _unusable(model, exported is not None, best_of, judge, side, force, trust_remote_code)
    if exported and judge and not (report or best_of):
        problems.append(f"--judge {judge}: it is asked for --report or --best-of alone; add one of them, or leave it out")
    if exported:
        from vlmedit.pipelines import exported as editor

        fitted = lambda path: editor.fit(exported, path, side)
    else:
        try:
            view = model_side(model)
        except InputError as error:
            problems += error.problems
    hint, jobs = "", []
    try:
        jobs = prepare(input, instruction, out, view, num_samples, report, force, fitted)
    except InputError as error:
        problems, hint = [*error.problems, *problems], error.hint
    if problems:
        raise InputError(problems, hint)
    done = [skip_existing and job.is_done(report) for job in jobs]
    if all(done):
        _say(f"nothing left to do: every edit is in {out}")
        pipe = None
    elif exported:
        from vlmedit.networks.judges import load_judge
        from vlmedit.pipelines.shapes import quiet

        with quiet():
            seen = load_model(load_judge, "--judge", judge) if judge else None
        pipe = editor.load(exported, seen)
    else:
        pipe = load_pipeline(model)
        if pipe.judge is None and (report or best_of):
            raise InputError(f"--model {model}: it has no judge; leave out {'--report' if report else '--best-of'}")
    began, records = time.time(), []
    steps = steps or (exported.steps if exported else 4)
    with _progress() as progress:
        task = progress.add_task("edits", total=len(jobs), note="")
        for job, known in zip(jobs, done):
            if not known:
                records.append(carry_out(pipe, job, steps, seed, best_of, report))
            else:
                records.append({"input": str(job.picture.path), "instruction": job.instruction, "outputs": [str(p) for p in job.outputs], "skipped": True})
            progress.advance(task)
    if json:
        save_json({"model": model, **({"judge": judge} if judge else {}), "edits": records, "seconds": round(time.time() - began, 3)}, json)
    for record in records:
        found = record.get("judge")
        odds = f"  P(edit made) {max(found['p_edit']):.2f}  P(rest kept) {max(found['p_identity']):.2f}" if found and len(found["p_edit"]) == 1 else ""
        print(f"{', '.join(record['outputs'])}{odds}{'  (there already)' if 'skipped' in record else ''}")
    return 0


def _unusable(model: str, real: bool, best_of: int, judge: str, side: int | None, force: bool, trust: bool) -> list[str]:
    """Options of `edit` that this model cannot use."""
    if real:
        problems = [f"--force: {model} is a real model, which tries every edit; leave it out"] if force else []
        if side and side > MOST_SIDE:
            problems.append(f"--side is {side}; a real model works at {MOST_SIDE} pixels at most")
        if best_of and not judge:
            problems.append(f"--best-of {best_of}: {model} has no judge of its own; name one, for example --judge Qwen/Qwen2.5-VL-7B-Instruct")
        if judge:
            from vlmedit.networks.load import check_judge

            problems += [f"--{problem}" for problem in check_judge(judge)]
        return problems
    options = {"--judge": judge, "--side": side, "--trust-remote-code": trust}
    return [f"{option}: {model} is no real model that vlmedit export wrote; leave it out" for option, value in options.items() if value]


def evaluate(
    *,
    n: int = 512,
    seed: int = 0,
    steps: int = 4,
    checkpoint: str = "shapes",
    sampler: Literal["renoise", "euler", "corrector"] | None = None,
    json: JsonFile = None,
) -> int:
    """Measure an editor on held-out edits with the oracle.

    Args:
        n: Held-out edits, types in turn.
        seed: Of the held-out set and the noise.
        steps: Network calls of the sampler.
        checkpoint: "shapes" (shipped) or the folder of a saved pipeline or training run.
        sampler: How the few steps are taken; by default what the model was trained with.
    """
    from vlmedit.pipelines.batch_edit import load_pipeline, model_side

    problems = _at_least(n=(n, 1), seed=(seed, 0), steps=(steps, 1)) + _check_json(json)
    try:
        model_side(checkpoint)
    except InputError as error:
        problems += [p.replace("--model", "--checkpoint") for p in error.problems]
    _raise(problems)
    from vlmedit.evaluation.editing import evaluate as measure

    began = time.time()
    result = measure(load_pipeline(checkpoint), n=n, seed=seed, steps=steps, **({"sampler": sampler} if sampler else {}))
    result = {**result, "n": n, "seed": seed, "steps": steps, "checkpoint": checkpoint}
    result.setdefault("seconds", round(time.time() - began, 2))
    flat = {k: v for k, v in result.items() if not isinstance(v, dict)}
    nested = {f"{k}: {name}": v for k, inner in result.items() if isinstance(inner, dict) for name, v in inner.items()}
    _table(f"{checkpoint}, {n} held-out edits", flat | nested)
    if json:
        save_json(result, json)
    return 0


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

    Settings that name a backbone train real models: `train npedit --config zimage_internvl` (shipped), `train warmup` their copy warm-up.

    Args:
        stage: main, or one of the stages teacher, judge, warmup, npedit, sft, grpo, synthetic, cyclegan, bootstrap, distill.
        tier: smoke (seconds), laptop (the shipped checkpoints) or gpu (a larger world).
        config: Settings as a .json or .yaml file, for example a run folder's config.json, or the name of shipped ones for real models.
        set: Settings as key=value; they win over the file.
        out: Run folder.
        dry_run: Of a real run: print memory and FLOPs per role and load nothing.
    """
    _raise(_check_json(json))
    if out is not None:
        check_writable(out, "folder")
        check_space(out, RUN_BYTES)
    given = (read_settings(config) if config else {}) | parse_pairs(set) | ({"out": str(out)} if out else {})
    if "backbone" in given:
        if stage not in ("npedit", "warmup"):
            raise InputError(f"the settings name a backbone, and real models are trained by the stages npedit and warmup, not {stage}: vlmedit train npedit --config {config or 'FILE'}")
        result = train_real(stage, tier, given, dry_run)
    elif dry_run:
        raise InputError("--dry-run counts runs of real models; the settings name no backbone (--config zimage_internvl, for example)")
    else:
        result = train_main(tier, given) if stage == "main" else train_stage(stage, tier, given)
    if json and _leads():
        save_json(result, json)
    leave_together()
    return 0


def leave_together() -> None:
    """Close the connection between processes that a launcher started, when all are done: one that leaves with it open, or while another still
    needs it, may abort at its very end."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        import torch.distributed as dist

        if dist.is_initialized():  # a dry run only counts processes
            dist.barrier()
            dist.destroy_process_group()


def read_settings(path: Path) -> dict:
    """Settings of a .json or .yaml file. Raises `ConfigError` for anything but a mapping."""
    import yaml

    if not path.exists() and path.suffix.lower() in ("", ".yaml"):
        from vlmedit.training.settings import find_config

        path = find_config(path)
    if path.suffix.lower() not in (".json", ".yaml", ".yml"):
        raise ConfigError(f"--config {path}: unknown ending {path.suffix!r}; give a .json or .yaml file")
    try:
        found = yaml.safe_load(path.read_text())  # JSON is YAML
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not {path.suffix[1:].upper()} ({error})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"--config {path}: a {type(found).__name__}, not a mapping of settings")
    return {str(k): v for k, v in found.items()}


def parse_pairs(pairs: Sequence[str], option: str = "--set") -> dict:
    """['lr=1e-3', ...] as a dictionary of texts."""
    wrong = [p for p in pairs if "=" not in p or not p.split("=", 1)[0]]
    if wrong:
        raise ConfigError(f"{option} {' '.join(wrong)}: write key=value")
    return dict(p.split("=", 1) for p in pairs)


def convert(name: str, value: Any, kind: Any) -> Any:
    """A setting's text, or its JSON value, as the type its field declares. Raises `ConfigError` naming it."""
    origin, inner = get_origin(kind), get_args(kind)
    try:
        if type(None) in inner:
            return None if value in (None, "none", "None", "null") else convert(name, value, next(k for k in inner if k is not type(None)))
        if origin is tuple:
            parts = [p.strip() for p in value.strip("()[] ").split(",") if p.strip()] if isinstance(value, str) else list(value)
            kinds = inner[:1] * len(parts) if inner[1:] == (...,) else inner
            return tuple(convert(name, p, k) for p, k in zip(parts, kinds, strict=True))
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind is int and not isinstance(value, bool) and float(value) == int(float(value)):
            return int(float(value))
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is str and isinstance(value, (str, int, float)):
            return str(value)
        if kind not in (bool, int, float, str):
            return value
    except (ValueError, TypeError, KeyError, OverflowError):
        pass
    raise ConfigError(f"{name} is {value!r}; it must be {getattr(kind, '__name__', kind) if origin is None else kind}")


def typed(config_class, given: dict) -> dict:
    """Settings with their fields' types; unknown keys stay, for `make` to refuse."""
    kinds = get_type_hints(config_class)
    return {k: convert(k, v, kinds[k]) if k in kinds else v for k, v in given.items()}


def check_run(config) -> None:
    """Raise `InputError` unless a run's models are there and its folder can be written."""
    from vlmedit.doctor import lacking_models

    _raise(lacking_models(config))
    check_writable(Path(config.out), "folder")
    check_space(Path(config.out), RUN_BYTES)


def train_stage(stage: str, tier: str, given: dict) -> dict:
    """Run one training stage; returns its configuration and last metrics."""
    from vlmedit.methods.stages import STAGES

    if stage not in STAGES:
        near = difflib.get_close_matches(stage, ("main", *STAGES), 1)
        raise ConfigError(f"unknown stage {stage!r}{f' (nearest: {near[0]})' if near else ''}; known: main, {', '.join(STAGES)}")
    config_class, stage_loop = STAGES[stage]
    config = config_class.make(tier, **typed(config_class, given))
    check_run(config)
    began = time.time()
    with following(stage, config) as watch:
        for step in stage_loop(config):
            watch(step)
    if watch.step is None:
        _say(f"nothing left to do: {config.out} holds a finished run of {config.steps} updates")
    else:
        _table(f"{stage}, {watch.step.index} updates", watch.step.metrics)
    last = watch.step.metrics if watch.step else {}
    return {"stage": stage, "tier": tier, **watch.record(), "metrics": last, "seconds": round(time.time() - began, 2)}


def train_real(stage: str, tier: str, given: dict, dry_run: bool) -> dict:
    """Run a stage on real models, or count what it would cost."""
    from vlmedit.training.settings import CopyConfig, RealConfig

    config_class = RealConfig if stage == "npedit" else CopyConfig
    fields = lambda c: {f.name for f in dataclasses.fields(c)}
    if stage == "npedit" and (copying := sorted(given.keys() & (fields(CopyConfig) - fields(RealConfig)))):
        raise InputError(f"{', '.join(copying)}: settings of the copy warm-up, not of npedit; run vlmedit train warmup with them")
    if given.get("side") == RealConfig.side:  # as a run's config.json has it
        given = {k: v for k, v in given.items() if k != "side"}
    config = config_class.make(tier, **typed(config_class, given))
    if dry_run:
        from vlmedit.cost import plan

        try:
            found = plan.plan(config)
        except InputError:
            raise
        except ValueError as error:  # a class that nobody here knows
            raise InputError(f"cannot be counted: {str(error).splitlines()[0]}") from error
        if _leads():
            plan.show(found)
        return {"stage": stage, "dry_run": True, **found.report()}
    check_writable(Path(config.out), "folder")
    check_space(Path(config.out), RUN_BYTES)
    from vlmedit.training import real_models as real

    began = time.time()
    with following(stage, config) as watch:
        for step in (real.train_real if stage == "npedit" else real.train_copy)(config):
            watch(step)
    if watch.step is None:
        _say(f"nothing left to do: {config.out} holds a finished run of {config.steps} updates")
    else:
        _table(f"{stage}, {watch.step.index} updates", watch.step.metrics)
    return {"stage": stage, "tier": tier, **watch.record(), "metrics": watch.step.metrics if watch.step else {}, "seconds": round(time.time() - began, 2)}


def train_main(tier: str, given: dict) -> dict:
    """Run the README's main job; returns its configuration and what the oracle measured."""
    from vlmedit.config import NPEditConfig
    from vlmedit.experiments.live import live_config, run_main

    settings = typed(NPEditConfig, given)
    config = live_config(tier, **settings)
    check_run(config)
    began = time.time()
    with following("main", config) as watch:
        metrics = run_main(tier, progress=watch, **settings)
    for name, found in metrics.items():
        if isinstance(found, dict):
            _table(name, {k: v for k, v in found.items() if isinstance(v, float)})
    _say(f"pictures, metrics and logs are in {config.out}")
    return {"stage": "main", "tier": tier, **watch.record(), "metrics": metrics, "seconds": round(time.time() - began, 2)}


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
        done = self.step.index if self.step else self.config.steps
        return {"out": self.config.out, "config": dataclasses.asdict(self.config), "updates": done, "skipped": self.skipped}


@contextmanager
def following(stage: str, config) -> Iterator[Watch]:
    """A progress bar for a run; when the run is interrupted, says how to go on."""
    with _progress() as progress, disk_errors(Path(config.out)):
        watch = Watch(stage, config, progress)
        try:
            yield watch
        except KeyboardInterrupt:
            progress.stop()
            done = watch.step.index if watch.step else 0
            _say(f"stopped after update {done} of {config.steps}; the same command resumes from the last checkpoint in {config.out} (one every {config.save_every} updates)")
            raise


def data(
    action: Positional[Literal["examples", "prepare", "shards"]] = "examples",
    source: Positional[Path | None] = None,
    *,
    out: Path,
    n: int = 16,
    seed: int = 0,
    task: Literal["unpaired", "captioned", "paired"] = "unpaired",
    side: int | None = None,
    vlm: str = "",
    llm: str = "",
    layout: str = "folder",
    kinds: tuple[str, ...] = (),
    per_picture: int = 3,
    repeats: int = 20,
    batch: int = 8,
    kind: Literal["tar", "parquet"] = "tar",
    per_shard: int = 1000,
    json: JsonFile = None,
) -> int:
    """Write example training data of the miniature, or make unpaired data for real models out of pictures.

    examples: pictures, a data.jsonl (a manifest that `vlmedit edit` reads) and a contact sheet. prepare FOLDER: a vision-language model
    proposes, checks and captions edits of the folder's pictures; the same command goes on where it was stopped, and under accelerate launch
    or torchrun each process does its part. shards MANIFEST: a manifest and its pictures as tar or parquet files, which training reads as they are.

    Args:
        action: examples (default), prepare or shards.
        source: The folder of pictures, or the manifest.
        out: A new folder; for prepare and shards also the one of an interrupted run.
        n: Examples.
        seed: Of the examples, or of the edit types drawn for a picture.
        task: unpaired (what the no-pair editor learns from), captioned (the teacher) or paired (the paired rivals alone).
        side: Pixels per side of the examples (32), or of the longer side that the model is shown (512).
        vlm: prepare: a vision-language model, folder or id.
        llm: prepare: a language model that proposes and writes target captions; by default the VLM.
        layout: prepare: folder, pico-banana, gpt-image-edit, magicbrush, npedit or manifest. Targets are never read.
        kinds: prepare: edit types to propose, all by default.
        per_picture: prepare: instructions proposed per picture.
        repeats: prepare: how often one instruction may come altogether.
        batch: prepare: pictures at a time.
        kind: shards: tar (as webdataset reads them) or parquet (as Hugging Face datasets does).
        per_shard: shards: pictures per file.
    """
    _raise(_at_least(n=(n, 1), seed=(seed, 0), side=(side or 16, 16), batch=(batch, 1), repeats=(repeats, 1), per_shard=(per_shard, 1)) + _check_json(json))
    check_writable(out, "folder")
    if action != "examples":
        if source is None:
            raise InputError(f"data {action} needs {'a folder of pictures' if action == 'prepare' else 'a manifest'}: vlmedit data {action} SOURCE --out {out}")
        words = tuple(w.strip() for text in kinds for w in text.split(",") if w.strip())
        result = data_shards(source, out, kind, per_shard) if action == "shards" else data_prepare(source, out, vlm, llm, layout, words, per_picture, side or 512, seed, batch, repeats)
        if json and result:  # of several processes the first one tells
            save_json(result, json)
        return 0
    if source is not None:
        raise InputError(f"{source}: examples are drawn, not read; did you mean vlmedit data prepare {source}?")
    from vlmedit.data.samples import write_samples

    side = side or 32
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: the folder is not empty; name a new one")
    check_space(out, n * (6 * side * side + 20_000))
    result = write_samples(out, n, seed, task, side)
    if json:
        save_json(result, json)
    print(f"{n} {task} examples in {out}")
    return 0


def data_shards(manifest: Path, out: Path, kind: str, per_shard: int) -> dict:
    """Pack a manifest."""
    from vlmedit.data.layouts import read_items
    from vlmedit.data.shards import write_shards

    items = read_items(manifest)
    paths = write_shards(items, out, kind, per_shard)
    print(f"{len(items)} requests in {len(paths)} {kind} files in {out}")
    return {"out": str(out), "kind": kind, "requests": len(items), "files": [p.name for p in paths]}


def load_model(load, option: str, folder: str, half: bool = True):
    """A model by folder or id, on this process's GPU where there is one (in bf16 if `half`); what is wrong with it as `InputError`."""
    import torch

    here, count = max(0, int(os.environ.get("LOCAL_RANK", 0))), torch.cuda.device_count()
    if count and here >= count:
        raise InputError(f"process {here} of this machine has no GPU, there {'is' if count == 1 else 'are'} {count}; start at most one process per GPU")
    try:
        if not count:
            return load(folder)
        return load(folder, **({"dtype": torch.bfloat16} if half else {})).to(f"cuda:{here}")
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"{option} {folder}: {error}") from error


def data_prepare(source: Path, out: Path, vlm: str, llm: str, layout: str, kinds: tuple[str, ...], per_picture: int, side: int, seed: int, batch: int, repeats: int) -> dict:
    """Make a manifest of a folder of pictures; under a launcher every process does its part, and the first one makes the manifest."""
    if not vlm:
        raise InputError("--vlm is missing: name a vision-language model by folder or id, for example --vlm Qwen/Qwen2.5-VL-7B-Instruct")
    from accelerate.utils.environment import get_cpu_distributed_information

    from vlmedit.data.layouts import check_dataset
    from vlmedit.data.prepare.run import KINDS, Settings, prepare
    from vlmedit.networks.judges.text_vlm import load_writer
    from vlmedit.pipelines.shapes import quiet

    settings = Settings(str(source), layout, vlm, llm or None, kinds or tuple(KINDS), per_picture, side, seed)
    launched = get_cpu_distributed_information()  # of any launcher, by its environment; there is nothing to exchange
    check_dataset(source, layout)
    with quiet():
        writer = load_model(load_writer, "--vlm", vlm)
        scribe = load_model(load_writer, "--llm", llm) if llm else None
    with _progress() as progress:
        task = progress.add_task("pictures", total=None, note="", visible=launched.rank == 0)
        for step in prepare(out, settings, writer, scribe, batch, repeats, launched.rank, launched.world_size):
            progress.update(task, completed=step.pictures, note=f"{step.kept} kept, {step.refused} refused")
    if launched.rank:
        return {}
    report = read_json(out / "report.json")
    print(f"{report['kept']} requests of {report['pictures']} pictures in {out / 'manifest.jsonl'}; {report['refused']} refusals, see {out / 'report.html'}")
    return report


def bench(
    name: Positional[Literal["gedit", "imgedit", "dreambooth"]],
    folder: Positional[Path],
    *,
    edits: Path,
    out: Path,
    judge: str = "",
    clip: str = "",
    dino: str = "",
    model: str = "",
    seed: int = 0,
    against: tuple[Path, ...] = (),
    language: Literal["en", "cn"] = "en",
    batch: int = 4,
    side: int = 1024,
    partial: bool = False,
    json: JsonFile = None,
) -> int:
    """Measure edited pictures on a public benchmark: VIEScore by a local judge, CLIP-T, CLIP-I and DINO.

    With --model an exported editor draws the edits first. The same command goes on where it was stopped. Writes cases/KEY.json with the
    judge's words, result.json and contact.png.

    Args:
        name: The benchmark.
        folder: Of the benchmark, as it is published.
        edits: Folder of the edited pictures: GEdit-Bench fullset/TASK/LANGUAGE/KEY.png or KEY.png, ImgEdit-Bench KEY.png, DreamBooth SUBJECT/NN.png.
        out: Folder of the results.
        judge: A vision-language model by folder or id; it answers greedily.
        clip: A CLIP by folder or id, for CLIP-T and CLIP-I.
        dino: A DINO by folder or id, for example facebook/dino-vits16.
        model: What `vlmedit export` wrote, by folder or id: draws the edits that are missing.
        seed: Of the noise with --model, the same for each edit.
        against: Results of other runs by the same judge and encoders: compares case by case, with standard errors.
        language: Of GEdit-Bench's instructions.
        batch: Cases at a time.
        side: Pixels of the longer side that the judge is shown at most.
        partial: Measure the edits that are there, even if some are missing.
    """
    from vlmedit.benchmarks import Encoder, compare, find_edits, measure, read_benchmark
    from vlmedit.networks.judges import load_judge
    from vlmedit.pipelines.shapes import quiet

    _raise(_at_least(batch=(batch, 1), side=(side, 32), seed=(seed, 0)) + _check_json(json))
    check_writable(out, "folder")
    if not (judge or clip or dino):
        raise InputError("nothing to measure with: name a --judge, a --clip or a --dino")
    _raise([f"--against {other}: no result.json of a finished vlmedit bench in it" for other in against if not (other / "result.json").is_file()])
    cases = read_benchmark(name, folder, language)
    if model:
        bench_draw(name, cases, edits, model, seed, [judge] if judge else [])
    pairs = find_edits(cases, edits, partial)
    encoder = lambda option, place, words: load_model(functools.partial(Encoder, words=words), option, place, half=False) if place else None
    with quiet():
        models = [load_model(load_judge, "--judge", judge) if judge else None, encoder("--clip", clip, True), encoder("--dino", dino, False)]
    with _progress() as progress:
        task = progress.add_task(name, total=len(pairs), note="")
        for done in measure(name, pairs, out, *models, language, batch, side, len(cases), against):
            progress.update(task, completed=done)
    result = read_json(out / "result.json")
    for which, found in result["sets"].items():
        _table(f"{name}, {which} set, {found['n']} cases", {k: v["average"] for k, v in found.items() if k != "n"})
    if result["unreadable"]:
        _say(f"{result['unreadable']} of {len(pairs)} answers of the judge could not be read; they count in no average (see {out / 'cases'})")
    for other in against:
        result.setdefault("against", []).append(found := compare(out, other))
        rows = {k: _difference(v) for k, v in found["metrics"].items()}
        _table(f"against {other}, {found['cases']} cases that both have", rows)
    if json:
        save_json(result, json)
    return 0


def _difference(found: dict) -> str:
    """A metric of two runs, and how far they are apart."""
    error = "" if found["standard error"] is None else f" (standard error {found['standard error']:.2g})"
    return f"{found['here']:.4g} here, {found['there']:.4g} there: {found['difference']:+.3g}{error}, better in {found['better']:.0%}"


def bench_draw(name: str, cases: list, edits: Path, model: str, seed: int, judges: list[str]) -> None:
    """Draw the edits of a benchmark that are missing, after everything small is checked."""
    from vlmedit.benchmarks import draw_edits
    from vlmedit.networks.load import check_judge
    from vlmedit.pipelines import exported as editor
    from vlmedit.pipelines.batch_edit import find_exported

    exported = find_exported(model)
    if exported is None:
        raise InputError(f"--model {model}: no editor of real models that vlmedit export wrote; name its folder or id")
    _raise([f"--{problem}" for place in judges for problem in check_judge(place)])
    check_writable(edits, "folder")
    with _progress() as progress, disk_errors(edits):
        task = progress.add_task(f"edits of {name}", total=len(cases), note="")
        for done in draw_edits(cases, edits, exported, editor.load, seed):
            progress.update(task, completed=done)


def read_json(path: Path) -> dict:
    import json

    return json.loads(path.read_text())


def notebook(
    action: Positional[Literal["list", "copy", "run", "sweep", "results", "refresh"]],
    name: Positional[str] = "all",
    *,
    p: UseAppendAction[tuple[str, ...]] = (),
    out: Path = Path("runs/notebooks"),
    folder: Path | None = None,
    jobs: int = 1,
    csv: Path | None = None,
    parquet: Path | None = None,
    plot: Path | None = None,
    metric: str = "success",
    against: str = "",
    json: JsonFile = None,
) -> int:
    """List, copy, run and sweep the notebooks, gather their metrics, bring their outputs up to date.

    Args:
        action: list; copy (without outputs, into the folder NAME); run; sweep (a grid: -p SEED=0,1,2); results (of the runs below the folder NAME); refresh (the committed outputs).
        name: A notebook by name, number or path, or all; for copy a new folder, for results a folder of runs.
        p: A parameter, -p NAME=VALUE or -p NAME VALUE; again for another one. A sweep takes several values with commas.
        out: Folder of the executed notebooks and their results.
        folder: Of the notebooks; by default the package's own.
        jobs: Combinations of a sweep at a time.
        csv: Table of the results.
        parquet: The same as Parquet; needs pyarrow.
        plot: A metric against a parameter.
        metric: What is plotted.
        against: The parameter on the x axis; by default the one with most values.
    """
    from vlmedit.teaching import runner as suite

    _raise(_at_least(jobs=(jobs, 1)) + _check_json(json))
    given = parse_pairs(p, "-p")
    if action == "results":
        return notebook_results(Path(name if name != "all" else out), csv, parquet, plot, metric, against)
    if action == "copy":
        if name == "all":
            raise InputError("copy needs a folder: vlmedit notebook copy FOLDER")
        copied = suite.copy(suite.find("all", folder), Path(name))
        print(f"{len(copied)} notebooks in {name}; open them with: jupyter lab {name}")
        if json:
            save_json({"copied": [str(path) for path in copied]}, json)
        return 0
    chosen = suite.find(name, folder)
    if action == "list":
        listed = {n.name: {"title": n.title, "parameters": n.parameters} for n in chosen}
        for key, value in listed.items():
            print(f"{key}\n    {value['title']}\n    {', '.join(f'{k}={v!r}' for k, v in value['parameters'].items())}")
        if json:
            save_json(listed, json)
        return 0
    check_writable(out, "folder")
    check_space(out, RUN_BYTES)
    if action == "sweep":
        if len(chosen) != 1:
            raise InputError(f"{name}: a sweep takes one notebook, this names {len(chosen)}")
        found = []
        for texts, result, known in suite.sweep(chosen[0], given, out, jobs):
            print(f"{', '.join(f'{k}={v}' for k, v in texts.items())}: {_outcome(result)}{' (there already)' if known else ''}", flush=True)
            found.append(result)
    elif action == "refresh":
        if given:
            raise InputError("-p: refresh runs the notebooks as they are, at the laptop tier")
        found = []
        for n in chosen:
            found.append(suite.refresh(n, out))
            print(f"{n.name}: {_outcome(found[-1])}", flush=True)
    else:
        found = []
        for n, values in suite.checked(chosen, given):
            found.append(suite.run(n, values, out))
            print(f"{n.name}: {_outcome(found[-1])}", flush=True)
    if json:
        save_json({"ok": all(r.ok for r in found), "seconds": round(sum(r.seconds for r in found), 1), "notebooks": [dataclasses.asdict(r) for r in found]}, json)
    return 0 if all(r.ok for r in found) else 1


def _outcome(result) -> str:
    if result.ok:
        return f"ok, {result.cells} cells in {result.seconds:.0f} s"
    where = f"cell {result.failed_cell} fails" if result.failed_cell else "failed"
    return f"{where} after {result.seconds:.0f} s: {result.error} (kept: {result.output or 'nothing'})"


def notebook_results(runs: Path, csv: Path | None, parquet: Path | None, plot: Path | None, metric: str, against: str) -> int:
    """Gather the recorded metrics below a folder."""
    from vlmedit.teaching import runner as suite

    if not runs.is_dir():
        raise InputError(f"{runs}: no such folder; name a folder of runs")
    for path in (csv, parquet, plot):
        path and check_writable(path)
    table = suite.results(runs)
    if parquet:
        try:
            table.to_parquet(parquet)
        except ImportError:
            raise InputError(f"--parquet {parquet}: needs pyarrow, which is not installed (pip install pyarrow); --csv does without") from None
    if csv:
        table.to_csv(csv, index=False)
    if plot:
        suite.plot(table, metric, against or suite.swept(table), plot)
    print(table.to_string(index=False, max_cols=12))
    return 0


def study(
    name: Positional[str],
    *,
    tier: Tier = "laptop",
    seeds: tuple[str, ...] = ("0",),
    arms: tuple[str, ...] = (),
    updates: int | None = None,
    n: int | None = None,
    equal: Literal["updates", "calls", "cpu"] = "updates",
    set: tuple[str, ...] = (),
    jobs: int = 1,
    out: Path | None = None,
    runs: Path | None = None,
    json: JsonFile = None,
) -> int:
    """Train and measure the arms of a study, seed by seed; `vlmedit study list` names the studies and their arms.

    The same command goes on where it was stopped. Writes table.csv, table.json and plot.png. Exit code 1 when an arm failed.

    Args:
        name: A study, or list.
        tier: smoke, laptop or gpu: the configuration that the arms change.
        seeds: Of the trainings: 0,1,2.
        arms: Some of the study's arms, by name; by default all.
        updates: Student updates of every arm (of the first one, where something else is equal): 2, 600, 3000 by tier.
        n: Held-out edits: 8, 512, 2048 by tier.
        equal: What all arms spend alike: updates, calls of the student, or CPU-seconds; a pilot of each arm tells what its updates cost.
        set: Settings for all arms as key=value (of one stage: sft.lr=1e-3); teacher, judge and student name other models.
        jobs: Cells trained at a time, each in a process of its own.
        out: Folder of the results; by default papers/results/studies/NAME in a checkout, elsewhere runs/studies/NAME.
        runs: Folder of the trainings, shared by all studies; runs/studies by default.
    """
    from vlmedit.experiments import study as suite
    from vlmedit.methods.stages import STAGES

    if name == "list":
        _raise(_check_json(json))
        listed = {k: {"question": s.question, "arms": list(s.arms)} for k, s in suite.STUDIES.items()}
        for key, value in listed.items():
            print(f"{key}: {value['question']}\n    {', '.join(value['arms'])}")
        if json:
            save_json(listed, json)
        return 0
    suite.find(name)
    _raise(_at_least(jobs=(jobs, 1)) + _check_json(json))
    words = lambda given: [w.strip() for text in given for w in text.split(",") if w.strip()]
    numbers = [int(s) if s.isdecimal() else s for s in words(seeds)]
    chosen = words(arms)
    texts, models = suite.sort_overrides(name, parse_pairs(set), chosen)
    overrides = {f"{stage}.{k}": v for stage, given in texts.items() for k, v in typed(STAGES[stage][0], given).items()}
    plan = suite.plan(name, tier, numbers, chosen, updates, n, overrides | models, out, runs, equal)
    plan = suite.balance(plan, _say)
    count, failed = len(plan.arms) * len(plan.seeds), 0
    with _progress() as progress, disk_errors(Path(plan.runs)):
        whole = progress.add_task(f"study {name}", total=count, note="")
        part = progress.add_task("", total=None, note="", visible=jobs == 1)

        def watch(what: str, step) -> None:
            progress.update(part, description=what, completed=step.index, total=step.total)

        for cell, known in suite.run(plan, jobs, watch):
            failed += not cell["ok"]
            progress.update(whole, advance=1, note=cell["arm"])
            _say(f"{cell['arm']}, seed {cell['seed']}: {_cell_outcome(cell)}{' (there already)' if known else ''}")
            suite.write_tables(plan)
    result = suite.write_tables(plan)
    for row in result["arms"]:
        error = f" ({row['success_se']:.3f})" if "success_se" in row else ""
        rest = f"done {row['done']:.2f}  kept {row['kept']:.2f}  manifold {row['manifold_psnr']:.1f} dB  gap {row['hacking_gap']:.2f}"
        print(f"{row['arm']}: success {row['success']:.3f}{error}  {rest}  {len(row['seeds'])} seeds, {row['calls']:.0f} calls, {row['cpu_seconds']:.0f} CPU-s")
    print(f"table and plot are in {plan.out}")
    if json:
        save_json(result, json)
    return 1 if failed else 0


def _cell_outcome(cell) -> str:
    if not cell["ok"]:
        return f"failed: {cell['error']}"
    return ", ".join(f"{way} {m['success']:.3f}" for way, m in cell["ways"].items())


def export(
    run: Positional[Path],
    *,
    out: Path | None = None,
    kind: Literal["full", "adapter"] = "full",
    push: str = "",
    json: JsonFile = None,
) -> int:
    """Write the student of a run on real models as a diffusers pipeline that needs nothing of this package.

    Args:
        run: The folder of a finished run; with --push and no --out one that was exported before.
        out: A new folder.
        kind: full (a whole pipeline) or adapter (the LoRA weights alone).
        push: Also upload it to this repository of the Hub, OWNER/NAME; private.
    """
    from vlmedit.pipelines import export as real
    from vlmedit.pipelines.shapes import quiet

    _raise(_check_json(json))
    again = out is None and (run / "README.md").is_file()
    if again and not push:
        raise InputError(f"{run}: exported already; upload it with --push OWNER/NAME, or name a run and a new folder with --out")
    if out is None and not again:
        raise InputError(f"--out is missing: name a new folder, vlmedit export {run} --out FOLDER")
    folder = run if again else out
    if push:
        real.check_name(push)
    if not again:
        check_writable(folder, "folder")
        with quiet(), disk_errors(folder):
            real.export(run, folder, kind)
    address = real.push_to_hub(folder, push) if push else None
    print(address or f"the pipeline is in {folder}; its README.md says how to run it")
    if json:
        save_json({"out": str(folder), "kind": real.read_about(folder).get("kind", kind), "address": address}, json)
    return 0


COMMANDS = {"doctor": doctor, "train": train, "edit": edit, "eval": evaluate, "export": export, "data": data, "bench": bench, "notebook": notebook, "study": study}


def join_parameters(args: Sequence[str]) -> list[str]:
    """papermill's `-p NAME VALUE` as `--p NAME=VALUE`, whichever way it was written."""
    out, rest = [], iter(args)
    for word in rest:
        if word != "-p":
            out.append(word)
            continue
        name = next(rest, "")
        out += ["--p", name if "=" in name else f"{name}={next(rest, '')}"]
    return out


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. The one place where known errors become messages."""
    description = "Image editing learned without image pairs, in miniature."
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] == ["notebook"]:
        args = join_parameters(args)
    try:
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS, args=args, prog="vlmedit", description=description, config=(FlagCreatePairsOff,)
        )
    except (InputError, UnknownInstruction, ImpossibleEdit, ConfigError) as error:
        _say(f"vlmedit: {error}")
        return BAD_INPUT
    except BrokenPipeError:  # the reader of our output left, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        _say(f"vlmedit: {error}")
        return BAD_INPUT
    except ModuleNotFoundError as error:  # of a library that an extra brings
        from vlmedit.extras import missing

        if not (told := missing(error)):
            raise
        _say(f"vlmedit: {told}")
        return BAD_INPUT
    except KeyboardInterrupt:
        _say("vlmedit: interrupted")
        return INTERRUPTED
    except SystemExit as stop:  # tyro: 0 after --help, 2 for options it does not know
        return stop.code if isinstance(stop.code, int) else BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
