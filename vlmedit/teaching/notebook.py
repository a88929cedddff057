"""What a notebook of this package is: where it lies, its title and parameters, the hash of its code, its outputs.

A notebook's parameters are the literals of its cell tagged `parameters`. Committed outputs carry the hash of the code
that they belong to. A wheel brings the notebooks inside the package, a checkout has them beside it.
"""

from __future__ import annotations

import ast
import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import nbformat

from vlmedit.errors import InputError

PACKAGE = Path(str(files("vlmedit"))).resolve()
FOLDER = (
    PACKAGE / "notebooks" if (PACKAGE / "notebooks").is_dir() else PACKAGE.parent / "notebooks"
)  # of a wheel; of a checkout


@dataclass(frozen=True)
class Notebook:
    path: Path
    title: str
    parameters: dict[str, object]  # name -> default

    @property
    def name(self) -> str:
        return self.path.stem


def checkout() -> Path:
    """The repository around the package. Raises `InputError` where the package was installed without it."""
    root = PACKAGE.parent
    if not (root / "pyproject.toml").is_file() or not (root / "notebooks").is_dir():
        raise InputError(
            f"{root} is no checkout of the repository, which this needs; "
            "unpack the source distribution and install it with `pip install -e .`"
        )
    return root


def without_outputs(notebook):
    """The notebook as a participant gets it."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata.pop("vlmedit", None)
    return notebook


def code_hash(notebook) -> str:
    """SHA-256 over all code cells, so that outputs can be told from those of other code."""
    code = "\0".join(
        c.source
        for c in notebook.cells
        if c.cell_type == "code" and "injected-parameters" not in c.metadata.get("tags", ())
    )
    return hashlib.sha256(code.encode()).hexdigest()


def read(path: Path) -> Notebook:
    """A notebook's title and parameters. Raises `InputError` if it is no notebook or they are no literals."""
    try:
        cells = nbformat.read(path, 4).cells
    except Exception as error:  # nbformat raises whatever JSON and its schema do
        raise InputError(f"{path}: not a notebook ({str(error).splitlines()[0]})") from None
    title = next((c.source.splitlines()[0].lstrip("# ") for c in cells if c.cell_type == "markdown"), path.stem)
    tagged = [c.source for c in cells if "parameters" in c.metadata.get("tags", ())]
    if len(tagged) != 1:
        raise InputError(f"{path}: {len(tagged)} cells are tagged 'parameters'; there must be one")
    try:
        statements = [s for s in ast.parse(tagged[0]).body if isinstance(s, ast.Assign)]
        parameters = {s.targets[0].id: ast.literal_eval(s.value) for s in statements}
    except (ValueError, SyntaxError, AttributeError):
        raise InputError(f"{path}: its parameters cell must hold literals alone, NAME = value") from None
    return Notebook(path, title, parameters)


def refreshed(source, executed):
    """The source notebook with the outputs of its execution and the hash of its code; parameters stay as they are."""
    source = nbformat.from_dict(json.loads(json.dumps(source)))
    ran = iter(c for c in executed.cells if "injected-parameters" not in c.metadata.get("tags", ()))
    for cell, done in zip(source.cells, ran, strict=True):
        if cell.cell_type != "code":
            continue
        cell.outputs, cell.execution_count = done.outputs, done.execution_count
        for output in cell.outputs:
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)  # its state is not kept
            output.get("metadata", {}).clear()
    source.metadata["vlmedit"] = {"code": code_hash(source), "tier": "laptop"}
    return source
