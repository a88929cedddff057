"""Golden digests: what every training stage, the shipped models and the command line do today, to the bit.

    python tests/golden.py record [GROUP ...]     write tests/golden.json, or these groups of it anew
    python tests/golden.py compare [GROUP ...]    run again, print a table of what differs, exit 1 if anything does

Groups: `starts` (the random models that runs begin from; if these differ, so does all else), `stages` (three updates
of each stage in fp32), `bf16` (five of them), `variants` (switches of NP-Edit and its rivals), `real` (the trainer of
real models), `shipped` (edits, margins and figures of the shipped checkpoints), `help` (texts of the command line),
`reports` (messages that tests assert and how many tests there are; shown, never a difference).

A run is judged by the files it leaves: every `checkpoint/*.safetensors` and the tensors of every optimizer, by the
registered name; every .safetensors of its results; and every metric but times. Floating point differs between machines,
so digests and bf16 are compared where they were recorded (`machine`), other metrics anywhere, to a relative 1e-3.

What is run, and every name of the package, is in golden_runs.py.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from golden_messages import reports
from golden_runs import (
    BF16,
    REAL,
    SMALL,
    STAGES,
    UPDATES,
    VARIANTS,
    help_texts,
    recorded,
    shipped_answers,
    start_real,
    start_stage,
    starting_models,
)
from safetensors.torch import load_file

TESTS = Path(__file__).resolve().parent
GOLDEN = TESTS / "golden.json"
TOLERANCE = 1e-3
ROUNDING = {"loss": ("grpo",)}  # metric: stages where its terms cancel to mere rounding; compared absolutely elsewhere
NOTES = {
    "real": "Noise of these runs is drawn per phase; recorded anew, once, when their streams become the miniature's.",
    "reports": "A list to look things up in, not a condition. test_golden.py itself is not counted.",
}
# --- digests


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """Of type, shape and bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return sha(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + flat.view(torch.uint8).numpy().tobytes())


def weights_digest(file: Path) -> str:
    """Of names and tensors, whatever their order in the file."""
    return sha(json.dumps(sorted((name, tensor_digest(t)) for name, t in load_file(file).items())).encode())


def tensors_of(state) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for part in state.values() if isinstance(state, dict) else state:
            yield from tensors_of(part)


def state_digest(state) -> str:
    """Of an optimizer's tensors as a bag, so that nesting does not count; of a state without tensors as it is."""
    tensors = sorted(map(tensor_digest, tensors_of(state)))
    return sha(json.dumps(tensors if tensors else state, sort_keys=True).encode())


def timeless(metrics: dict) -> dict:
    return {k: v for k, v in metrics.items() if not k.startswith(("cpu", "seconds", "peak"))}


def left_in(out: Path, metrics: list[dict]) -> dict:
    """What a finished run left: checkpoint, results and metrics."""
    optimizers = torch.load(out / "checkpoint/optimizers.pt", weights_only=True)
    results = [*sorted((out / "model").rglob("*.safetensors")), *sorted(out.glob("*.safetensors"))]
    assert results and len(metrics) == UPDATES
    return {
        "checkpoint": {recorded(f.name): weights_digest(f) for f in sorted((out / "checkpoint").glob("*.safetensors"))},
        "optimizers": {recorded(name).rstrip("."): state_digest(state) for name, state in sorted(optimizers.items())},
        "results": {str(f.relative_to(out)): weights_digest(f) for f in results},
        "metrics": [timeless(m) for m in metrics],
    }


def resolved(value, models: Path):
    """A setting with every "models/..." as a path."""
    if isinstance(value, list | tuple):
        return type(value)(resolved(v, models) for v in value)
    inside = isinstance(value, str) and value.startswith("models/")
    return str(models / value.removeprefix("models/")) if inside else value


def run(row: dict, models: Path, precision: str = "no") -> dict:
    """Carry out one row of a table in a folder of its own and digest what it leaves."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = {k: resolved(v, models) for k, v in row.items() if k not in ("stage", "part", "file")}
    with tempfile.TemporaryDirectory() as out:
        if "stage" in row:
            steps = start_stage(row["stage"], {**SMALL, **settings, "precision": precision}, Path(out))
        else:
            steps = start_real(row["part"], row["file"], settings, Path(out))
        return left_in(Path(out), [step.metrics for step in steps])


def shipped() -> dict:
    pixels, margins, figures = shipped_answers()
    edits = {"pixels": sha(pixels.tobytes()), "means": pixels.mean((1, 2, 3)).tolist()}
    return {"edits": edits, "margins": margins, "evaluate": timeless(figures)}


# --- record and compare


def machine() -> dict:
    """What floating point depends on."""
    torch.set_num_threads(1)
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    found = {k: m.group(1).strip() for k in ("model name", "flags") if (m := re.search(rf"^{k}\s*:(.*)$", cpu, re.M))}
    return {
        "cpu": found.get("model name", platform.processor()),
        "flags": sha(" ".join(sorted(found.get("flags", "").split())).encode())[:16],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def starts(models: Path) -> dict:
    files = (f for f in sorted(models.rglob("*.safetensors")) if "text" not in f.parts)
    return {str(f.relative_to(models)): weights_digest(f) for f in files}


GROUPS = {  # each from the folder of starting models
    "starts": starts,
    "stages": lambda models: {label: run(row, models) for label, row in STAGES.items()},
    "bf16": lambda models: {label: run(STAGES[label], models, "bf16") for label in BF16},
    "variants": lambda models: {label: run(row, models) for label, row in VARIANTS.items()},
    "real": lambda models: {label: run(row, models) for label, row in REAL.items()},
    "shipped": lambda _: shipped(),
    "help": lambda _: help_texts(),
    "reports": lambda _: reports(),
}


def complete(stages: dict) -> None:
    """Raise AssertionError where a stage's runs do not contain what they should."""
    reading, *copying = stages["warmup"]["metrics"]
    assert "reading_loss" in reading and all("loss" in m for m in copying)
    assert stages["synthetic"]["metrics"][-1]["pairs"] > 0 and "pairs.safetensors" in stages["synthetic"]["results"]
    for label, metric in (("npedit", "gradient_nothing"), ("cyclegan", "nothing"), ("bootstrap", "nothing")):
        assert all(m[metric] > 0 for m in stages[label]["metrics"])
    assert not any(m.get("skipped") for stage in stages.values() for m in stage["metrics"])


def made(groups: Iterable[str]) -> dict:
    """These groups, run now; the CPU-seconds of each are told on the way."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        starting_models(Path(folder), real=True)
        for group in groups:
            began, others = time.process_time(), os.times().children_user
            with contextlib.redirect_stdout(sys.stderr):
                found[group] = GROUPS[group](Path(folder))
            seconds = time.process_time() - began + os.times().children_user - others
            print(f"{group}: {seconds:.1f} CPU-seconds", file=sys.stderr, flush=True)
    if "stages" in found:
        complete(found["stages"])
    return found


def leaves(tree, path: tuple = ()) -> Iterator[tuple[tuple, object]]:
    if isinstance(tree, dict | list) and tree:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, (*path, str(key)))
    else:
        yield path, tree


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def same(place: tuple, old, new, exact: bool) -> bool:
    """Equal; where not `exact`, numbers to the tolerance, and digests count as equal."""
    if exact:
        return repr(old) == repr(new)
    if is_number(old) and is_number(new):
        cancels = any(stage in " ".join(place) for stage in ROUNDING.get(place[-1], ()))
        return math.isclose(old, new, rel_tol=TOLERANCE, abs_tol=TOLERANCE if cancels else 1e-6)
    digest = all(isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) for v in (old, new))
    return digest or old == new


def differences(name: str, old, new, exact: bool) -> list[tuple[str, str, str]]:
    """Where two records of what is called `name` differ: place, old, new; "-" is missing."""
    before, now = (dict(leaves(tree, (name,))) for tree in (old, new))
    places = dict.fromkeys((*before, *now))
    told = {p: [repr(d[p]) if p in d else "-" for d in (before, now)] for p in places}
    wrong = (p for p in places if (p in before) != (p in now) or not same(p, before[p], now[p], exact))
    return [(" / ".join(p), *told[p]) for p in wrong]


def print_table(rows: list[tuple[str, str, str]]) -> None:
    short = [
        [cell if len(cell) <= most else cell[: most - 1] + "…" for cell, most in zip(row, (110, 24, 24), strict=True)]
        for row in rows
    ]
    widths = [max(len(row[i]) for row in short) for i in range(3)]
    for row in short:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def record(groups: list[str]) -> int:
    """Write `groups`, or all, into the json. Exit code 2 where the rest was recorded on another machine."""
    known, here = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}, machine()
    if groups and known and known["machine"] != here:
        print(
            f"the other groups were recorded elsewhere ({known['machine']}, here {here}); record all", file=sys.stderr
        )
        return 2
    fresh = made(groups or GROUPS)
    kept = {**known, **fresh}
    written = {"machine": here, "notes": NOTES, **{g: kept[g] for g in GROUPS if g in kept}}
    GOLDEN.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    return 0


def compare(groups: list[str]) -> int:
    """Print what differs from the json; 1 where something does, reports aside."""
    known, here = json.loads(GOLDEN.read_text()), machine()
    exact = known["machine"] == here
    if not exact:
        print(f"recorded on {known['machine']}, this is {here}:")
        print(f"figures are compared to {TOLERANCE:g}, digests and bf16 are not")
    asked = [g for g in groups or GROUPS if exact or g != "bf16"]
    fresh = json.loads(json.dumps(made(asked)))
    bad = [row for g in asked if g != "reports" for row in differences(g, known.get(g, {}), fresh[g], exact)]
    if "reports" in fresh:
        old, new = known["reports"], fresh["reports"]
        print(
            f"report: {old['tests']} tests and {old['asserts']} asserts then, {new['tests']} and {new['asserts']} now"
        )
        for message in sorted({*old["messages"]} - {*new["messages"]}):
            print(f"report: no test asserts any more: {message!r}")
    print_table([("place", "recorded", "now"), *bad] if bad else [(f"no difference in {', '.join(fresh)}", "", "")])
    return 1 if bad else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; all by default")
    arguments = parser.parse_args()
    if unknown := [g for g in arguments.groups if g not in GROUPS]:
        parser.error(f"unknown group {', '.join(unknown)}; known: {', '.join(GROUPS)}")
    sys.exit({"record": record, "compare": compare}[arguments.command](arguments.groups))
