"""`vlmedit notebook`: the notebooks listed, run, swept over a grid, and brought up to date."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from tyro.conf import Positional, UseAppendAction

from vlmedit.cli._settings import parse_pairs
from vlmedit.cli._shared import RUN_BYTES, JsonFile, at_least, check_json, refuse
from vlmedit.errors import InputError

ORDER = 8


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
    """  # noqa: E501
    from vlmedit.io import check_space, check_writable
    from vlmedit.teaching import runner as suite

    refuse(at_least(jobs=(jobs, 1)) + check_json(json))
    given = parse_pairs(p, "-p")
    if action == "results":
        return gather(Path(name if name != "all" else out), csv, parquet, plot, metric, against)
    if action == "copy":
        return copy(name, folder, json)
    chosen = suite.find(name, folder)
    if action == "list":
        return list_all(chosen, json)
    check_writable(out, "folder")
    check_space(out, RUN_BYTES)
    if action == "sweep" and len(chosen) != 1:
        raise InputError(f"{name}: a sweep takes one notebook, this names {len(chosen)}")
    if action == "refresh" and given:
        raise InputError("-p: refresh runs the notebooks as they are, at the laptop tier")
    return tell(carry_out(action, chosen, given, out, jobs), json)


def copy(name: str, folder: Path | None, json: Path | None) -> int:
    """The notebooks without their outputs, into a new folder."""
    from vlmedit.io import save_json
    from vlmedit.teaching import runner as suite

    if name == "all":
        raise InputError("copy needs a folder: vlmedit notebook copy FOLDER")
    copied = suite.copy(suite.find("all", folder), Path(name))
    print(f"{len(copied)} notebooks in {name}; open them with: jupyter lab {name}")
    if json:
        save_json({"copied": [str(path) for path in copied]}, json)
    return 0


def list_all(chosen: list, json: Path | None) -> int:
    """Title and parameters of each notebook."""
    from vlmedit.io import save_json

    listed = {n.name: {"title": n.title, "parameters": n.parameters} for n in chosen}
    for key, value in listed.items():
        parameters = ", ".join(f"{k}={v!r}" for k, v in value["parameters"].items())
        print(f"{key}\n    {value['title']}\n    {parameters}")
    if json:
        save_json(listed, json)
    return 0


def carry_out(action: str, chosen: list, given: dict, out: Path, jobs: int) -> Iterator[tuple[str, object]]:
    """What was run, in words, and its result, one after the other."""
    from vlmedit.teaching import runner as suite

    if action == "sweep":
        for texts, result, known in suite.sweep(chosen[0], given, out, jobs):
            values = ", ".join(f"{k}={v}" for k, v in texts.items())
            yield f"{values}: {outcome(result)}{' (there already)' if known else ''}", result
    elif action == "refresh":
        for n in chosen:
            result = suite.refresh(n, out)
            yield f"{n.name}: {outcome(result)}", result
    else:
        for n, values in suite.checked(chosen, given):
            result = suite.run(n, values, out)
            yield f"{n.name}: {outcome(result)}", result


def tell(results: Iterator[tuple[str, object]], json: Path | None) -> int:
    """Print every result as it comes; 0 when all are good, otherwise 1."""
    from vlmedit.io import save_json

    found = []
    for line, result in results:
        print(line, flush=True)
        found.append(result)
    ok = all(r.ok for r in found)
    if json:
        seconds = round(sum(r.seconds for r in found), 1)
        save_json({"ok": ok, "seconds": seconds, "notebooks": [dataclasses.asdict(r) for r in found]}, json)
    return 0 if ok else 1


def outcome(result) -> str:
    """How a run ended, in words."""
    if result.ok:
        return f"ok, {result.cells} cells in {result.seconds:.0f} s"
    where = f"cell {result.failed_cell} fails" if result.failed_cell else "failed"
    return f"{where} after {result.seconds:.0f} s: {result.error} (kept: {result.output or 'nothing'})"


def gather(runs: Path, csv: Path | None, parquet: Path | None, plot: Path | None, metric: str, against: str) -> int:
    """Gather the recorded metrics below a folder."""
    from vlmedit.io import check_writable
    from vlmedit.teaching import runner as suite

    if not runs.is_dir():
        raise InputError(f"{runs}: no such folder; name a folder of runs")
    for path in filter(None, (csv, parquet, plot)):
        check_writable(path)
    table = suite.results(runs)
    if parquet:
        try:
            table.to_parquet(parquet)
        except ImportError:
            lacking = "needs pyarrow, which is not installed (pip install pyarrow); --csv does without"
            raise InputError(f"--parquet {parquet}: {lacking}") from None
    if csv:
        table.to_csv(csv, index=False)
    if plot:
        suite.plot(table, metric, against or suite.swept(table), plot)
    print(table.to_string(index=False, max_cols=12))
    return 0
