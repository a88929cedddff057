"""`vlmedit notebook`: parameters are checked before anything runs, failures are kept and named, sweeps resume, outputs belong to their code."""

import json
from pathlib import Path

import nbformat
import pytest

from vlmedit.cli import main
from vlmedit.cli._main import join_parameters
from vlmedit.teaching import runner as suite

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "notebooks").glob("*.ipynb"))


def make(path: Path, *code: str, parameters: str = 'TIER = "smoke"\nSEED = 0\nWEIGHT = 0.5\nNAME = "a"') -> Path:
    """A notebook of a title, a parameters cell and code cells."""
    tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    cells = [nbformat.v4.new_markdown_cell("# 00 Tiny: does it run?"), tagged, *map(nbformat.v4.new_code_cell, code)]
    book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, path)
    return path


RECORD = "from vlmedit.teaching import checking\nchecking.record(tier=TIER, seed=SEED, score=SEED * WEIGHT, by={'x': SEED + 1})"


def test_list_gives_titles_and_parameters(tmp_path, capsys):
    make(tmp_path / "books/00_tiny.ipynb")
    assert main(["notebook", "list", "--folder", str(tmp_path / "books"), "--json", str(tmp_path / "l.json")]) == 0
    assert "does it run?" in capsys.readouterr().out
    listed = json.loads((tmp_path / "l.json").read_text())["00_tiny"]
    assert listed["parameters"] == {"TIER": "smoke", "SEED": 0, "WEIGHT": 0.5, "NAME": "a"}


def test_the_repository_s_notebooks_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [n.name for n in suite.find()] == [p.stem for p in COMMITTED]
    assert suite.find("00")[0].name == "00_start_here"


def test_copies_are_for_working_in(tmp_path, capsys):
    """All notebooks without outputs; a folder that holds one of them is left as it is."""
    book = make(tmp_path / "books/00_tiny.ipynb", "1 + 1")
    make(tmp_path / "books/01_more.ipynb")
    assert suite.refresh(suite.read(book), tmp_path / "out").ok and nbformat.read(book, 4).cells[-1].outputs
    mine, command = tmp_path / "mine", ["notebook", "copy", str(tmp_path / "mine"), "--folder", str(tmp_path / "books")]
    assert main(command) == 0 and "2 notebooks" in capsys.readouterr().out
    copied = nbformat.read(mine / "00_tiny.ipynb", 4)
    nbformat.validate(copied)
    assert [c.source for c in copied.cells] == [c.source for c in nbformat.read(book, 4).cells] and "vlmedit" not in copied.metadata
    assert not any(c.get("outputs") or c.get("execution_count") for c in copied.cells) and (mine / "01_more.ipynb").is_file()
    (mine / "01_more.ipynb").unlink()
    (mine / "00_tiny.ipynb").write_text("my work")
    assert main(command) == 2 and "00_tiny.ipynb there already" in capsys.readouterr().err
    assert (mine / "00_tiny.ipynb").read_text() == "my work" and not (mine / "01_more.ipynb").exists()
    assert main(["notebook", "copy"]) == 2 and "copy needs a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, said",
    [
        (["-p", "SEEED", "1"], "no parameter 'SEEED' (nearest: SEED)"),
        (["-p", "seed=1"], "no parameter 'seed' (nearest: SEED)"),
        (["-p", "SEED=one"], "SEED is 'one'; it must be a int"),
        (["-p", "SEED=1.5"], "SEED is '1.5'"),
        (["-p", "TIER=huge"], "TIER is 'huge'; it must be one of smoke, laptop, gpu"),
        (["-p", "SEED=x", "-p", "WEIGHT=y"], "2 problems"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(given, said, tmp_path, capsys):
    book = make(tmp_path / "00_tiny.ipynb", "raise RuntimeError('ran')")
    assert main(["notebook", "run", str(book), "--out", str(tmp_path / "out"), *given]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_unknown_notebooks_and_folders_are_told(tmp_path, capsys):
    make(tmp_path / "00_tiny.ipynb")
    assert main(["notebook", "run", "00_tny", "--folder", str(tmp_path)]) == 2
    assert "nearest: 00_tiny" in capsys.readouterr().err
    assert main(["notebook", "list", "--folder", str(tmp_path / "none")]) == 2
    (tmp_path / "bad.ipynb").write_text("{")
    assert main(["notebook", "run", str(tmp_path / "bad.ipynb")]) == 2
    assert "not a notebook" in capsys.readouterr().err
    computed = make(tmp_path / "computed.ipynb", parameters="SEED = 1 + len('a')")
    assert main(["notebook", "run", str(computed)]) == 2
    assert "literals" in capsys.readouterr().err


def test_run_all_goes_on_after_a_failure_and_names_the_cell(tmp_path, capsys):
    """The failing notebook is kept as far as it ran, with its error; the other one's metrics are in the JSON."""
    make(tmp_path / "books/00_bad.ipynb", "x = 1", "raise ValueError('first line\\nthe last line')", "y = 2")
    make(tmp_path / "books/01_good.ipynb", RECORD)
    code = main(["notebook", "run", "all", "--folder", str(tmp_path / "books"), "-p", "SEED", "1", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "r.json")])
    assert code == 1
    bad, good = json.loads((tmp_path / "r.json").read_text())["notebooks"]
    assert not bad["ok"] and bad["error"] == "ValueError: the last line" and "cell" in capsys.readouterr().out
    kept = nbformat.read(tmp_path / "out" / bad["output"], 4)
    assert [c.source for c in kept.cells if c.cell_type == "code" and c.get("execution_count") == bad["failed_cell"]] == ["raise ValueError('first line\\nthe last line')"]
    assert good["ok"] and good["cells"] == 3 and good["seconds"] > 0 and good["metrics"] == {"tier": "smoke", "seed": 1, "score": 0.5, "by": {"x": 2}}


def test_a_cell_that_takes_too_long_is_stopped_and_named(tmp_path):
    """What ran before is kept, and so is the result beside it."""
    book = make(tmp_path / "00_slow.ipynb", "x = 1", "import time\ntime.sleep(600)", "y = 2")
    result = suite.run(suite.read(book), {"SEED": 1}, tmp_path / "out", progress=False, patience=5)
    assert (result.ok, result.failed_cell, result.error) == (False, 4, "not finished after 5 s") and result.seconds < 300
    code = [c for c in nbformat.read(tmp_path / "out/00_slow.ipynb", 4).cells if c.cell_type == "code"]
    assert code[result.failed_cell - 1].source.endswith("time.sleep(600)") and code[2].execution_count and not code[4].execution_count
    assert json.loads((tmp_path / "out/00_slow.json").read_text())["error"] == result.error


def test_a_kernel_that_dies_is_a_result(tmp_path):
    book = make(tmp_path / "00_dies.ipynb", "x = 1", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    result = suite.run(suite.read(book), {}, tmp_path / "out", progress=False)
    assert not result.ok and result.failed_cell == 3 and "the kernel died" in result.error


def test_output_widgets_do_not_hang_the_executor(tmp_path):
    """What papermill's own engine hangs on within a few cells: outputs caught by a widget, and the cell's end right after them."""
    catch = "with caught:\n    for k in range(5):\n        display({'text/plain': str(k)}, raw=True)"
    book = make(tmp_path / "00_widgets.ipynb", "import ipywidgets\nfrom IPython.display import display\ncaught = ipywidgets.Output()", *[catch] * 12)
    result = suite.run(suite.read(book), {}, tmp_path / "out", progress=False, patience=60)
    assert result.ok, result.error


def test_a_relative_folder_for_the_runs(tmp_path, monkeypatch):
    """Papermill works inside the folder of the output; a relative one still means the place where the command was given."""
    make(tmp_path / "00_tiny.ipynb", RECORD)
    monkeypatch.chdir(tmp_path)
    assert suite.run(suite.read(Path("00_tiny.ipynb")), {}, Path("a/b"), progress=False).ok
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == ["00_tiny.ipynb", "a/b/00_tiny.ipynb", "a/b/00_tiny.json"]


def test_a_sweep_resumes_and_isolates_failures(tmp_path, capsys):
    """Seed 1 kills its own process. A second sweep runs that one alone again; a changed notebook runs everything again."""
    book = make(tmp_path / "00_tiny.ipynb", "import os\nif SEED == 1 and not os.path.exists('/nowhere'):\n    raise SystemExit('died')", RECORD)
    command = ["notebook", "sweep", str(book), "-p", "SEED=0,1,2", "--out", str(tmp_path / "out"), "--jobs", "2", "--json", str(tmp_path / "s.json")]
    assert main(command) == 1
    first = json.loads((tmp_path / "s.json").read_text())["notebooks"]
    assert [r["ok"] for r in first] == [True, False, True]
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.ipynb")}
    capsys.readouterr()
    assert main(command) == 1
    assert capsys.readouterr().out.count("there already") == 2
    assert {p for p, t in stamps.items() if p.stat().st_mtime_ns == t} == {p for p in stamps if "SEED=1" not in str(p)}
    table = suite.results(tmp_path / "out")
    assert sorted(table[table.ok]["score"]) == [0, 1] and set(table["by.x"].dropna()) == {1, 3}
    assert main(["notebook", "results", str(tmp_path / "out"), "--csv", str(tmp_path / "t.csv"), "--plot", str(tmp_path / "t.png"), "--metric", "score"]) == 0
    assert (tmp_path / "t.csv").read_text().count("\n") == 4 and (tmp_path / "t.png").stat().st_size > 3000
    assert main(["notebook", "results", str(tmp_path / "out"), "--plot", str(tmp_path / "t.png"), "--metric", "scor"]) == 2
    assert "nearest: score" in capsys.readouterr().err


def test_results_of_an_empty_folder_are_refused(tmp_path, capsys):
    assert main(["notebook", "results", str(tmp_path)]) == 2
    assert "no runs" in capsys.readouterr().err


def test_finished_runs_are_told_by_code_and_parameters(tmp_path):
    book = make(tmp_path / "00_tiny.ipynb", RECORD)
    values = {"SEED": 3}
    assert suite.run(suite.read(book), values, tmp_path / "out", progress=False).ok
    assert suite.finished(tmp_path / "out", suite.read(book), values)
    assert not suite.finished(tmp_path / "out", suite.read(book), {"SEED": 4})
    make(book, RECORD + "\n# changed")
    assert not suite.finished(tmp_path / "out", suite.read(book), values)


def test_refresh_writes_laptop_outputs_and_leaves_the_source(tmp_path):
    book = make(tmp_path / "00_tiny.ipynb", RECORD, "print(TIER)")
    before = [c.source for c in nbformat.read(book, 4).cells]
    assert suite.refresh(suite.read(book), tmp_path / "out").ok
    after = nbformat.read(book, 4)
    assert [c.source for c in after.cells] == before
    assert after.cells[-1].outputs[0].text == "laptop\n" and "papermill" not in after.metadata
    assert after.metadata.vlmedit.code == suite.code_hash(after)
    once = book.read_text()
    assert suite.refresh(suite.read(book), tmp_path / "out").ok and book.read_text() == once  # nothing dated in it


def test_deleting_any_one_output_changes_nothing(tmp_path):
    """Refreshed again after the outputs of a single cell are gone, the notebook is what it was, byte by byte."""
    book = make(tmp_path / "00_tiny.ipynb", RECORD, "print(TIER)", "SEED + 1")
    assert suite.refresh(suite.read(book), tmp_path / "out").ok
    once = book.read_text()
    having = [i for i, c in enumerate(nbformat.read(book, 4).cells) if c.get("outputs")]
    assert len(having) == 3
    for i in having:
        damaged = nbformat.read(book, 4)
        damaged.cells[i].outputs, damaged.cells[i].execution_count = [], None
        nbformat.write(damaged, book)
        assert book.read_text() != once
        assert suite.refresh(suite.read(book), tmp_path / "out").ok and book.read_text() == once


def test_a_notebook_that_would_be_too_large_is_left_as_it_is(tmp_path):
    book = make(tmp_path / "00_tiny.ipynb", "print('x' * 1_100_000)")
    before = book.read_text()
    with pytest.raises(suite.InputError, match="cell 2 alone"):
        suite.refresh(suite.read(book), tmp_path / "out")
    assert book.read_text() == before


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.stem)
def test_committed_outputs_belong_to_the_code(path):
    """A notebook that carries outputs carries the hash of the code that made them; run `make notebooks` after a change."""
    book = nbformat.read(path, 4)
    if not any(c.get("outputs") for c in book.cells):
        assert "vlmedit" not in book.metadata
        return
    assert book.metadata.vlmedit.code == suite.code_hash(book), "run `make notebooks`"
    assert path.stat().st_size <= suite.LARGEST
    assert not [o for c in book.cells for o in c.get("outputs", ()) if o.output_type == "error"]


def test_parameters_are_joined_in_either_form():
    assert join_parameters(["notebook", "run", "-p", "A", "1", "--out", "x", "-p", "B=2"]) == ["notebook", "run", "--p", "A=1", "--out", "x", "--p", "B=2"]
