"""Zips for a workshop: one for the participants, one for the teacher.

    python -m vlmedit.teaching.workshop dist

Participants get the package with its checkpoints, the environment files and the notebooks without outputs: once the environment
is installed, nothing needs a network. The teacher's also holds the notebooks solved, the guide, and a table of measured times
when there is one (`vlmedit notebook run all --json timings.json`).
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import nbformat

from vlmedit.errors import InputError
from vlmedit.teaching import checking, exercises
from vlmedit.teaching.notebook import checkout, without_outputs

NAME = "vlmedit-workshop"
FILES = ("README.md", "LICENSE", "Makefile", "environment.yml", "requirements.lock", "pyproject.toml", "setup.py")
GUIDE = "teaching.md"


def solved(notebook):
    """The notebook with every stub followed by the reference in its place, so that the teacher sees both."""
    checks = dict(re.findall(r"^(\w+) = checking\.check\(\1, exercises\.(\w+)\)$", "\n".join(c.source for c in notebook.cells), re.M))
    for cell in notebook.cells:
        if "exercise" in cell.metadata.get("tags", ()):
            name = ast.parse(cell.source).body[-1].name
            exercise: checking.Exercise = getattr(exercises, checks[name])
            module, function = exercise.reference.__module__, exercise.reference.__name__
            cell.source += f"\n\n\n# the solution\nfrom {module} import {function} as {name}"
    return notebook


def timings(path: Path | None) -> str:
    """A Markdown table of the seconds of each notebook. Raises `InputError` when the file holds none."""
    if path is None:
        return ""
    try:
        rows = json.loads(path.read_text())["notebooks"]
        lines = [f"| {r['notebook']} | {r['parameters'].get('TIER', 'smoke')} | {r['seconds'] / 60:.1f} | {'yes' if r['ok'] else 'no'} |" for r in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no timings ({error}); make them with `vlmedit notebook run all --json {path}`") from None
    return "\n".join(["# Measured times", "", "| notebook | tier | minutes | ran through |", "|---|---|---|---|", *lines, ""])


def sources(root: Path) -> list[Path]:
    """What git would hand out of the package and the papers: tracked files and new ones that are not ignored."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "vlmedit", "papers", "kernels"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if listed.returncode == 0:
        return [Path(line) for line in listed.stdout.splitlines() if (root / line).is_file()]
    found = (p for folder in ("vlmedit", "papers", "kernels") for p in (root / folder).rglob("*"))
    return [p.relative_to(root) for p in found if p.is_file() and "__pycache__" not in p.parts]


def write(out: Path, measured: Path | None = None) -> tuple[Path, Path]:
    """Write both zips into `out` and return their paths. Raises `InputError` without the repository around the package."""
    root, table = checkout(), timings(measured)
    out.mkdir(parents=True, exist_ok=True)
    paths = out / f"{NAME}-participants.zip", out / f"{NAME}-teacher.zip"
    for path, teacher in zip(paths, (False, True)):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in (*map(Path, FILES), *sources(root)):
                archive.write(root / file, f"{NAME}/{file}")
            for book in sorted((root / "notebooks").glob("*.ipynb")):
                archive.writestr(f"{NAME}/notebooks/{book.name}", nbformat.writes(without_outputs(nbformat.read(book, 4))))
                if teacher:
                    archive.writestr(f"{NAME}/solved/{book.name}", nbformat.writes(without_outputs(solved(nbformat.read(book, 4)))))
            if teacher:
                archive.write(root / "notebooks" / GUIDE, f"{NAME}/{GUIDE}")
                if table:
                    archive.writestr(f"{NAME}/timings.md", table)
    return paths


def main(arguments: Sequence[str]) -> int:
    """Write the zips into the first argument's folder, with the timings of the second; what is wrong is told in one line."""
    try:
        paths = write(Path(arguments[0] if arguments else "dist"), Path(arguments[1]) if len(arguments) > 1 else None)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    for path in paths:
        print(f"{path}, {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
