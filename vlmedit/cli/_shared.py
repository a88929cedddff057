"""What the commands share: option types, checks of options, tables, progress bars, and models by folder or id."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tyro.conf import arg

from vlmedit.errors import InputError

RUN_BYTES = 200 * 2**20  # disk space of a training run
JsonFile = Annotated[Path | None, arg(name="json", metavar="FILE", help="Also write the result as JSON.")]
Tier = Literal["smoke", "laptop", "gpu"]


def say(text: str) -> None:
    """A message to whoever watches, apart from the results."""
    print(text, file=sys.stderr)


def leads() -> bool:
    """Whether this is the first of the processes that a launcher started: the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def show_table(title: str, rows: dict[str, Any]) -> None:
    """Names and values; floats to four digits."""
    if not leads():
        return
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


def progress_bar() -> Progress:
    """A bar on the error stream; every task needs the field `note`."""
    times = (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *times, TextColumn("{task.fields[note]}"))
    return Progress(*columns, console=Console(stderr=True), disable=not leads())


def at_least(**values: tuple[int, int]) -> list[str]:
    """Problems of options that lie below their least value."""
    below = [(name.replace("_", "-"), value, least) for name, (value, least) in values.items() if value < least]
    return [f"--{name} is {value}; it must be at least {least}" for name, value, least in below]


def check_json(json: Path | None) -> list[str]:
    """Problems of a result's file, if one was asked for."""
    from vlmedit.io import check_writable

    try:
        if json:
            check_writable(json)
    except InputError as error:
        return list(error.problems)
    return []


def refuse(problems: list[str]) -> None:
    """Raise `InputError` if there are problems."""
    if problems:
        raise InputError(problems)


def words_of(given: tuple[str, ...]) -> list[str]:
    """Words that were written with spaces or with commas between them."""
    return [word.strip() for text in given for word in text.split(",") if word.strip()]


def read_json(path: Path) -> dict:
    """A file that this package wrote."""
    import json

    return json.loads(path.read_text())


def load_model(load, option: str, folder: str, half: bool = True):
    """A model by folder or id, on this process's GPU where there is one (in bf16 if `half`).

    What is wrong with it is an `InputError`.
    """
    import torch

    here, count = max(0, int(os.environ.get("LOCAL_RANK", 0))), torch.cuda.device_count()
    if count and here >= count:
        there = f"there {'is' if count == 1 else 'are'} {count}"
        raise InputError(f"process {here} of this machine has no GPU, {there}; start at most one process per GPU")
    try:
        if not count:
            return load(folder)
        return load(folder, **({"dtype": torch.bfloat16} if half else {})).to(f"cuda:{here}")
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"{option} {folder}: {error}") from error
