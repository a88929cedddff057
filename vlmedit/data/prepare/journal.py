"""The journals of `vlmedit data prepare`: one line per picture, flushed to the disk, so that a killed run goes on with
the next.

Several processes share the pictures by their names, each with a journal of its own; they read one another's and never
talk.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlmedit.errors import InputError
from vlmedit.io import disk_errors

# seconds between looks at the others' journals, and without a new line in them before the main process gives up
POLL, PATIENCE = 2.0, 3600.0


class Journal:
    """One line per picture behind a line that says whose run it is; a line that a kill tore is dropped."""

    def __init__(self, path: Path, head: dict):
        self.path, self.lines = path, []
        self.head = head = json.loads(json.dumps(head))
        if path.exists():
            raw = path.read_bytes()
            lines, whole = whole_lines(path, raw, "delete it to start again, or name a new folder")
            if lines:
                check_head(path, lines[0], head)
            self.lines = lines[1:]
            if whole < len(raw):
                os.truncate(path, whole)
            self.file = open(path, "a", encoding="utf-8")
            if lines:
                return
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a", encoding="utf-8")
        self._write([head])

    def _write(self, lines: list[dict]) -> None:
        with disk_errors(self.path):
            self.file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            self.file.flush()
            os.fsync(self.file.fileno())

    def add(self, lines: list[dict]) -> None:
        self._write(lines)
        self.lines += lines


def whole_lines(path: Path, raw: bytes, remedy: str) -> tuple[list[dict], int]:
    """The lines of a journal that were written to their end, and how many bytes they take. Raises InputError for one
    that is no JSON."""
    whole = raw[: raw.rfind(b"\n") + 1]
    try:
        return [json.loads(line) for line in whole.splitlines()], len(whole)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: damaged ({error}); {remedy}") from None


def check_head(path: Path, old: dict, head: dict) -> None:
    """Raise InputError when a journal is of another run."""
    if old != head:
        before = old.get("settings", {})
        other = [k for k in head["settings"] if before.get(k) != head["settings"][k]]
        other = ", ".join(other or [k for k in head if old.get(k) != head[k]])
        raise InputError(
            f"{path.parent}: holds a run of other settings ({other}); name a new folder, or give the settings of before"
        )


class PeerJournals:
    """The journals of other processes as they grow; they are read and never written."""

    def __init__(self, journal: Journal, processes: int):
        folder, self.head = journal.path.parent, journal.head
        expected = {folder / journal_name(i) for i in range(processes)}
        self.read = dict.fromkeys(sorted({*folder.glob("journal*.jsonl"), *expected} - {journal.path}), 0)
        self.lines: list[dict] = []
        self.look()

    def look(self) -> int:
        """Read what came since; a line that is being written waits. Returns how many pictures came."""
        before = len(self.lines)
        for path, at in self.read.items():
            if not path.exists():
                continue
            with open(path, "rb") as file:
                file.seek(at)
                raw = file.read()
            lines, whole = whole_lines(path, raw, "delete it, and its pictures are asked about again")
            if lines and at == 0:
                check_head(path, lines.pop(0), self.head)
            self.lines += lines
            self.read[path] = at + whole
        return len(self.lines) - before


def journal_name(process: int) -> str:
    return f"journal-{process}.jsonl" if process else "journal.jsonl"


def part_of(key: str, processes: int) -> int:
    """The process whose a row is; a function of its name alone, so that nobody has to be told."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % processes


@dataclass(frozen=True)
class Progress:
    """After a batch of pictures."""

    pictures: int
    kept: int
    refused: int


def tally(lines: list[dict]) -> tuple[int, int]:
    """Edits kept and refused so far; a picture without a caption counts as one refusal."""
    drafts = [d for line in lines for d in line["drafts"]]
    kept = sum(not d["reason"] for d in drafts)
    return kept, len(drafts) - kept + sum(bool(line["reason"]) for line in lines)


def progress_of(journal: Journal, others: PeerJournals) -> Progress:
    lines = journal.lines + others.lines
    return Progress(len(lines), *tally(lines))


def wait_for(journal: Journal, others: PeerJournals, order: dict, processes: int) -> Iterator[Progress]:
    """Until every picture of the data set is in a journal."""
    lacking, since = order.keys() - {line["name"] for line in journal.lines + others.lines}, time.monotonic()
    while lacking:
        time.sleep(POLL)
        if came := others.look():
            lacking -= {line["name"] for line in others.lines[-came:]}
            since = time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            left = Counter(part_of(key, processes) for key in lacking)
            told = ", ".join(f"process {p} has {n} pictures left" for p, n in sorted(left.items()))
            raise InputError(
                f"{journal.path.parent}: nothing came from the other processes for {PATIENCE / 60:.0f} minutes ({told}); "
                "the same command goes on"
            )
        yield progress_of(journal, others)
