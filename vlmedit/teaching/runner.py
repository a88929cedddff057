"""Running the notebooks: found by name, with checked parameters, over grids, and with their outputs brought up to date.

* `run` executes one notebook by papermill and never raises for a failing cell: the executed notebook is kept, the `Result` says which.
* `sweep` runs a grid of parameters, each combination in a process of its own; what is finished already is not run again.
* `results` reads the recorded metrics of a folder of runs into one table.
* `copy` gives a student notebooks of their own, without outputs.
* `refresh` puts laptop-tier outputs into the committed notebooks, with a hash of the code they belong to.

A notebook's parameters are the literals of its cell tagged `parameters`; a name or type it does not have is refused before anything runs.
"""

from __future__ import annotations

import ast
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path

import nbformat

from vlmedit.errors import InputError
from vlmedit.extras import need
from vlmedit.io import check_writable, save_json
from vlmedit.teaching.checking import recorded
from vlmedit.teaching.notebook import FOLDER, Notebook, code_hash, read, refreshed, without_outputs

LARGEST = 1_000_000  # bytes of a committed notebook, so that code hosts show it
TIERS = ("smoke", "laptop", "gpu")
PATIENCE = {"smoke": 600, "laptop": 3600, "gpu": 12 * 3600}  # seconds that one cell may take, many times what it needs


@dataclass(frozen=True)
class Result:
    """One execution. `failed_cell` counts code cells from 1; `error` is the error's last line."""

    notebook: str
    ok: bool
    seconds: float
    cells: int
    parameters: dict
    code: str
    output: str
    metrics: dict = field(default_factory=dict)
    failed_cell: int | None = None
    error: str = ""


def find(name: str = "all", folder: Path | None = None) -> list[Notebook]:
    """The notebooks that `name` means: "all", a number, a name or its beginning, or a path. Raises `InputError` with the known ones."""
    if name.endswith(".ipynb") and Path(name).is_file():
        return [read(Path(name))]
    folder = folder or FOLDER
    paths = sorted(folder.glob("*.ipynb"))
    if not paths:
        raise InputError(f"{folder}: no notebooks there; name their folder with --folder")
    chosen = paths if name in ("all", "") else [p for p in paths if p.stem == name] or [p for p in paths if p.stem.startswith(name)]
    if not chosen:
        stems = [p.stem for p in paths]
        near = get_close_matches(name, stems, 1, 0.3)
        raise InputError(f"no notebook {name!r}{f' (nearest: {near[0]})' if near else ''}; known: all, {', '.join(stems)}")
    return [read(p) for p in chosen]


def copy(notebooks: Sequence[Notebook], folder: Path) -> list[Path]:
    """Notebooks for a student to work in, without outputs. Raises `InputError` before anything is written where one is there already."""
    check_writable(folder, "folder")
    targets = [folder / n.path.name for n in notebooks]
    if there := [t.name for t in targets if t.exists()]:
        raise InputError(f"{folder}: {', '.join(there)} there already, perhaps with somebody's work; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for notebook, target in zip(notebooks, targets):
        nbformat.write(without_outputs(nbformat.read(notebook.path, 4)), target)
    return targets


def _value(notebook: Notebook, name: str, text: str):
    """A parameter's text as the type of its default."""
    default = notebook.parameters[name]
    if name == "TIER" and text not in TIERS:
        raise ValueError(f"one of {', '.join(TIERS)}")
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        value = text
    if default is None or type(value) is type(default):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    raise ValueError(f"a {type(default).__name__}, as its default {default!r}")


def check_parameters(notebook: Notebook, given: Mapping[str, str]) -> tuple[dict, list[str]]:
    """The given texts as values, and what is wrong with them."""
    values, problems = {}, []
    for name, text in given.items():
        if name not in notebook.parameters:
            near = get_close_matches(name, list(notebook.parameters), 1, 0.4) or get_close_matches(name.upper(), list(notebook.parameters), 1, 0.4)
            hint = f" (nearest: {near[0]})" if near else ""
            problems.append(f"{notebook.name} has no parameter {name!r}{hint}; it has {', '.join(notebook.parameters)}")
            continue
        try:
            values[name] = _value(notebook, name, text)
        except ValueError as error:
            problems.append(f"{notebook.name}: {name} is {text!r}; it must be {error}")
    return values, problems


def checked(notebooks: Sequence[Notebook], given: Mapping[str, str]) -> list[tuple[Notebook, dict]]:
    """Each notebook with its values. Raises `InputError` with all problems of all of them."""
    pairs = [(n, *check_parameters(n, given)) for n in notebooks]
    if problems := [p for *_, found in pairs for p in found]:
        raise InputError(problems)
    return [(n, values) for n, values, _ in pairs]


def started(executed) -> int:
    """How many code cells of a notebook kept by papermill were begun."""
    return sum(c.cell_type == "code" and bool(c.metadata.get("papermill", {}).get("start_time")) for c in executed.cells)


def run(notebook: Notebook, values: Mapping, out: Path, progress: bool = True, patience: float | None = None) -> Result:
    """Execute into `out/NAME.ipynb`, with the `Result` beside it as JSON. A failing cell, one that takes longer than `patience`
    seconds (by default the tier's) and a kernel that dies are results, not exceptions."""
    need("papermill")
    import papermill

    from vlmedit.teaching.engine import ENGINE, STOPPED

    out = out.resolve()  # papermill changes into it
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{notebook.name}.ipynb"
    patience = patience or PATIENCE.get(values.get("TIER", notebook.parameters.get("TIER")))
    began, failed, error = time.perf_counter(), None, ""
    try:
        papermill.execute_notebook(
            str(notebook.path.resolve()), str(target), dict(values), kernel_name="python3", progress_bar=progress, cwd=str(out),
            engine_name=ENGINE, start_timeout=300, execution_timeout=patience,
        )  # fmt: skip
    except papermill.PapermillExecutionError as stop:
        failed, error = stop.exec_count, f"{stop.ename}: {str(stop.evalue).strip().splitlines()[-1] if str(stop.evalue).strip() else ''}"
    except STOPPED as stop:
        failed = started(nbformat.read(target, 4))
        error = f"not finished after {patience:g} s" if isinstance(stop, TimeoutError) else "the kernel died; out of memory?"
    executed = nbformat.read(target, 4)
    ran = sum(c.cell_type == "code" and bool(c.execution_count) for c in executed.cells)
    result = Result(
        notebook.name, failed is None, round(time.perf_counter() - began, 1), ran, dict(values),
        code_hash(nbformat.read(notebook.path, 4)), target.name, recorded(target), failed, error,
    )  # fmt: skip
    save_json(asdict(result), out / f"{notebook.name}.json")
    return result


def grid(given: Mapping[str, str]) -> list[dict[str, str]]:
    """{"SEED": "0,1", "W": "0.1"} -> every combination of the comma-separated values."""
    return [dict(zip(given, combination)) for combination in itertools.product(*(text.split(",") for text in given.values()))]


def finished(folder: Path, notebook: Notebook, values: Mapping) -> Result | None:
    """The result of the same code with the same parameters, if `folder` holds one that went well."""
    try:
        result = Result(**json.loads((folder / f"{notebook.name}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    same = result.ok and result.code == code_hash(nbformat.read(notebook.path, 4)) and result.parameters == json.loads(json.dumps(dict(values)))
    return result if same and (folder / result.output).is_file() else None


def sweep(notebook: Notebook, given: Mapping[str, str], out: Path, jobs: int = 1) -> Iterator[tuple[dict, Result, bool]]:
    """Run every combination in a process of its own; yields (texts, result, whether it was there already) as they end.
    A combination that fails, or whose process dies, is a result like any other. Raises `InputError` before any of them runs."""
    combinations = grid(given)
    pairs = [(texts, values) for texts in combinations for _, values in checked([notebook], texts)]

    def one(pair) -> tuple[dict, Result, bool]:
        texts, values = pair
        folder = out / (",".join(f"{k}={v}" for k, v in texts.items()).replace("/", "_") or "defaults")
        if known := finished(folder, notebook, values):
            return texts, known, True
        (folder / f"{notebook.name}.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "vlmedit.cli", "notebook", "run", str(notebook.path.resolve()), "--out", str(folder)]
        ended = subprocess.run([*command, *itertools.chain(*(("-p", f"{k}={v}") for k, v in texts.items()))], capture_output=True, text=True)
        try:
            return texts, Result(**json.loads((folder / f"{notebook.name}.json").read_text())), False
        except (OSError, ValueError, TypeError):
            last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
            return texts, Result(notebook.name, False, 0.0, 0, dict(values), "", "", {}, None, f"the process died: {last}"), False

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, pairs)


def _flat(nested: Mapping, before: str = "") -> dict:
    out = {}
    for key, value in nested.items():
        out |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return out


def results(folder: Path):
    """One row per finished run below `folder`: notebook, parameters, recorded metrics (nested names joined by dots), as a DataFrame.
    Raises `InputError` when there is none."""
    need("pandas")
    import pandas

    rows = []
    for path in sorted(folder.rglob("*.json")):
        try:
            result = Result(**json.loads(path.read_text()))
        except (ValueError, TypeError):
            continue
        rows.append({"notebook": result.notebook, "ok": result.ok, "run_seconds": result.seconds, **result.parameters, **_flat(result.metrics)})
    if not rows:
        raise InputError(f"{folder}: no runs below it; make some with `vlmedit notebook run` or `sweep`")
    return pandas.DataFrame(rows)


def swept(table) -> str:
    """The parameter that takes most values in a table of results. Raises `InputError` when none varies."""
    names = [c for c in table.columns if c.isupper() and table[c].nunique() > 1]
    if not names:
        raise InputError("no parameter takes two values in these runs; there is nothing to plot against")
    return max(names, key=lambda c: (table[c].nunique(), c != "SEED"))


def plot(table, metric: str, against: str, path: Path) -> Path:
    """Mean and standard error of a metric over the runs that share a value of `against`. Raises `InputError` for unknown columns."""
    from matplotlib.figure import Figure

    from vlmedit.figures import GOOD, save

    for name in (metric, against):
        if name not in table.columns:
            near = get_close_matches(name, list(table.columns), 3, 0.3)
            hint = f" (nearest: {', '.join(near)})" if near else ""
            raise InputError(f"no column {name!r}{hint}; known: {', '.join(table.columns)}")
    groups = table.dropna(subset=[metric]).groupby(against)[metric]
    mean, error = groups.mean(), groups.sem().fillna(0.0)
    figure = Figure(figsize=(6, 3.6))
    axis = figure.subplots()
    axis.errorbar([str(v) for v in mean.index], mean.to_numpy(), error.to_numpy(), fmt="o-", color=GOOD, capsize=3)
    axis.set(xlabel=against, ylabel=metric, title=f"{metric}: best {mean.max():.3g} at {against} {mean.idxmax()} ({len(table)} runs)")
    axis.grid(alpha=0.3)
    return save(figure, path)


def refresh(notebook: Notebook, out: Path, tier: str = "laptop") -> Result:
    """Execute at `tier` and write the outputs into the notebook itself, unless a cell failed or the file would be too large."""
    result = run(notebook, {"TIER": tier}, out)
    if result.ok:
        source = refreshed(nbformat.read(notebook.path, 4), nbformat.read(out / result.output, 4))
        text = nbformat.writes(source) + "\n"
        if len(text.encode()) > LARGEST:
            sizes = {i: len(json.dumps(c.get("outputs", []))) for i, c in enumerate(source.cells)}
            worst = max(sizes, key=sizes.get)
            raise InputError(f"{notebook.name}: {len(text.encode())} bytes with its outputs, over {LARGEST}; cell {worst} alone has {sizes[worst]}: make its figure smaller")
        notebook.path.write_text(text, encoding="utf-8")
    return result
