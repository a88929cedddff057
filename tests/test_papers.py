"""The papers' figures: the tables of the pages are those of papers/results, and every figure in them is one of a file there."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def script(name: str):
    """A script of papers/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "papers" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = script("tables")


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda p: p.name)
def test_the_tables_are_those_of_the_results(page):
    assert page.read_text(encoding="utf-8") == tables.filled(page, tables.blocks()[page]), "run `python papers/tables.py`"


def test_a_changed_result_changes_the_table(tmp_path, monkeypatch):
    """The success in the table is the mean over the seeds' files, not a typed figure; pages without markers are refused."""
    for path in tables.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    figures = json.loads((tmp_path / "editor.json").read_text())
    for entry, success in zip(figures["editor"], (0.111, 0.222, 0.333)):
        entry["success"] = success
    (tmp_path / "editor.json").write_text(json.dumps(figures))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    row = next(line for line in tables.editor_table().splitlines() if line.startswith("| success"))
    assert "0.222 (" in row
    (tmp_path / "page.md").write_text("no markers")
    with pytest.raises(ValueError, match="needs the markers"):
        tables.filled(tmp_path / "page.md", "x")


def test_what_is_not_measured_is_not_in_the_tables(tmp_path, monkeypatch):
    for path in tables.RESULTS.glob("*.json"):
        if path.stem not in ("rivals", "live", "arms"):
            (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    page = "\n".join(tables.blocks().values())
    assert "paired" not in page and "live run" not in page and not re.search(r"### Arms", page)
