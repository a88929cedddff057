"""`vlmedit study`: the arms of a study trained and measured, seed by seed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from vlmedit.cli._settings import parse_pairs, typed
from vlmedit.cli._shared import JsonFile, Tier, at_least, check_json, progress_bar, refuse, say, words_of

ORDER = 9


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

    The same command goes on where it was stopped. Writes table.csv, table.json and plot.png. Exit code 1 when an arm
    failed.

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
    """  # noqa: E501
    from vlmedit.experiments import study as suite

    if name == "list":
        return list_all(json)
    suite.find(name)
    refuse(at_least(jobs=(jobs, 1)) + check_json(json))
    numbers = [int(s) if s.isdecimal() else s for s in words_of(seeds)]
    chosen = words_of(arms)
    plan = suite.plan(name, tier, numbers, chosen, updates, n, overrides(name, set, chosen), out, runs, equal)
    plan = suite.balance(plan, say)
    failed = train_cells(name, plan, jobs)
    tell(plan, json)
    return 1 if failed else 0


def list_all(json: Path | None) -> int:
    """Question and arms of each study."""
    from vlmedit.experiments import study as suite
    from vlmedit.io import save_json

    refuse(check_json(json))
    listed = {k: {"question": s.question, "arms": list(s.arms)} for k, s in suite.STUDIES.items()}
    for key, value in listed.items():
        print(f"{key}: {value['question']}\n    {', '.join(value['arms'])}")
    if json:
        save_json(listed, json)
    return 0


def overrides(name: str, pairs: tuple[str, ...], arms: list[str]) -> dict:
    """Settings by stage, with their fields' types, and other models."""
    from vlmedit.experiments import study as suite
    from vlmedit.methods import find

    texts, models = suite.sort_overrides(name, parse_pairs(pairs), arms)
    settings = {stage: typed(find(stage)[0], given) for stage, given in texts.items()}
    return {f"{stage}.{k}": v for stage, given in settings.items() for k, v in given.items()} | models


def train_cells(name: str, plan, jobs: int) -> int:
    """Train and measure every cell, keeping the tables up to date; returns how many failed."""
    from vlmedit.experiments import study as suite
    from vlmedit.io import disk_errors

    failed = 0
    with progress_bar() as progress, disk_errors(Path(plan.runs)):
        whole = progress.add_task(f"study {name}", total=len(plan.arms) * len(plan.seeds), note="")
        part = progress.add_task("", total=None, note="", visible=jobs == 1)

        def watch(what: str, step) -> None:
            progress.update(part, description=what, completed=step.index, total=step.total)

        for cell, known in suite.run(plan, jobs, watch):
            failed += not cell["ok"]
            progress.update(whole, advance=1, note=cell["arm"])
            say(f"{cell['arm']}, seed {cell['seed']}: {outcome(cell)}{' (there already)' if known else ''}")
            suite.write_tables(plan)
    return failed


def tell(plan, json: Path | None) -> None:
    """Write the tables and name every arm's result."""
    from vlmedit.experiments import study as suite
    from vlmedit.io import save_json

    result = suite.write_tables(plan)
    for row in result["arms"]:
        error = f" ({row['success_se']:.3f})" if "success_se" in row else ""
        made = f"success {row['success']:.3f}{error}  done {row['done']:.2f}  kept {row['kept']:.2f}"
        rest = f"manifold {row['manifold_psnr']:.1f} dB  gap {row['hacking_gap']:.2f}"
        spent = f"{len(row['seeds'])} seeds, {row['calls']:.0f} calls, {row['cpu_seconds']:.0f} CPU-s"
        print(f"{row['arm']}: {made}  {rest}  {spent}")
    print(f"table and plot are in {plan.out}")
    if json:
        save_json(result, json)


def outcome(cell: dict) -> str:
    """How a cell ended, in words."""
    if not cell["ok"]:
        return f"failed: {cell['error']}"
    return ", ".join(f"{way} {m['success']:.3f}" for way, m in cell["ways"].items())
