"""The workshop's zips: participants get no outputs and no solutions, the teacher gets both solutions and the guide, nothing is missing."""

import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

from vlmedit.errors import InputError
from vlmedit.teaching import workshop

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def zips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    measured = folder / "timings.json"
    measured.write_text(json.dumps({"notebooks": [{"notebook": "00_start_here", "parameters": {"TIER": "smoke"}, "seconds": 90.0, "ok": True}]}))
    return [zipfile.ZipFile(p) for p in workshop.write(folder, measured)]


def books(archive, folder):
    return {n: nbformat.read(io.StringIO(archive.read(n).decode()), 4) for n in archive.namelist() if f"/{folder}/" in n and n.endswith(".ipynb")}


def test_participants_get_everything_but_answers(zips):
    names = {n.removeprefix("vlmedit-workshop/") for n in zips[0].namelist()}
    assert {"environment.yml", "requirements.lock", "pyproject.toml", "vlmedit/cli/__init__.py", "vlmedit/checkpoints/shapes/editor/config.json"} <= names
    assert not [n for n in names if n.startswith("solved/") or "__pycache__" in n or n == "teaching.md"]
    found = books(zips[0], "notebooks")
    assert len(found) == len(list((ROOT / "notebooks").glob("*.ipynb")))
    for book in found.values():
        assert not any(c.get("outputs") or c.get("execution_count") for c in book.cells)


def test_the_teacher_gets_solutions_guide_and_times(zips):
    names = set(zips[1].namelist())
    assert set(zips[0].namelist()) < names and "vlmedit-workshop/teaching.md" in names
    assert "| 00_start_here | smoke | 1.5 | yes |" in zips[1].read("vlmedit-workshop/timings.md").decode()
    for name, book in books(zips[1], "solved").items():
        stubs = [c.source for c in book.cells if "exercise" in c.metadata.get("tags", ())]
        assert stubs and all("# the solution" in s for s in stubs), name


def test_solutions_run_in_place_of_the_stubs(zips):
    """After a solved cell the name is the reference itself."""
    for book in books(zips[1], "solved").values():
        for cell in book.cells:
            if "exercise" in cell.metadata.get("tags", ()):
                source = cell.source[cell.source.index("# the solution") :]
                space: dict = {}
                exec(source, space)
                (function,) = [v for k, v in space.items() if k != "__builtins__"]
                assert callable(function) and function.__module__.startswith("vlmedit")


def test_wrong_timings_are_refused_and_the_module_runs(tmp_path):
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(InputError, match="no timings"):
        workshop.write(tmp_path / "dist", tmp_path / "t.json")
    assert not (tmp_path / "dist").exists()
    done = subprocess.run([sys.executable, "-m", "vlmedit.teaching.workshop", str(tmp_path / "dist")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count(".zip") == 2, done.stderr[-500:]


@pytest.mark.parametrize("module", ["workshop", "badges"])
def test_without_a_checkout_one_line_says_so(module, tmp_path):
    """The package alone, as a wheel brings it: exit code 2, one line, nothing written."""
    shutil.copytree(ROOT / "vlmedit", tmp_path / "lib/vlmedit", ignore=shutil.ignore_patterns("checkpoints", "__pycache__"))
    (tmp_path / "here").mkdir()
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'lib')!r}); from vlmedit.teaching import {module}; sys.exit({module}.main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path / "here")
    assert done.returncode == 2 and not done.stdout and not list((tmp_path / "here").iterdir())
    assert done.stderr.count("\n") == 1 and "is no checkout of the repository" in done.stderr
