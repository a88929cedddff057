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
    assert "### Asking" in page
    (tmp_path / "asking.json").unlink()
    assert "### Asking" not in "\n".join(tables.blocks().values())
    assert "paired" not in page and "live run" not in page and not re.search(r"### Arms", page)


# --- the table of claims


def test_a_difference_has_a_sign_from_two_standard_errors_on():
    """Of 400 edits each: .50 against .40 is 2.9 errors, .50 against .44 is 1.7; nothing against nothing is no sign; PSNR from a tenth of a dB on."""
    row = lambda success, psnr=30.0, **more: {"success": success, "manifold_psnr": psnr, "n": 400, "success_by_type": {"remove": success}} | more
    assert tables.sign(row(0.5), row(0.4), "success") == "yes" and tables.sign(row(0.4), row(0.5), "success") == "no"
    assert tables.sign(row(0.5), row(0.44), "success") == tables.sign(row(0.0), row(0.0), "removals") == tables.CLEAR
    assert tables.sign(row(0.5, success_se=0.01), row(0.44, success_se=0.01), "success") == "yes"  # over seeds, where there are some
    assert tables.sign(row(0.5), row(0.4), "removals") == tables.CLEAR  # fifty removals each
    assert [tables.sign(row(0, a), row(0, b), "manifold_psnr") for a, b in ((30.2, 30.0), (30.0, 30.2), (30.05, 30.0))] == ["yes", "no", tables.CLEAR]


def test_every_claim_is_there_measured_or_with_its_command():
    """Thirteen claims; what nobody has measured names a study that exists; what was measured has a sign per comparison."""
    from vlmedit.study import STUDIES

    found = tables.claims()
    assert len(found) == 13 and len({claim for claim, *_ in found}) == 13
    lines = tables.claims_table().splitlines()[-13:]
    for line, (claim, _, study, (here, short, signs), _) in zip(lines, found):
        assert study in STUDIES and line.startswith(f"| {claim} |")
        assert (f"`vlmedit study {study}`" in line) == (not here)
        assert bool(here) == bool(short) and short.split(",")[0] in here
        assert not here or set(signs.split(" / ")) <= {"yes", "no", tables.CLEAR}


def test_a_study_that_was_run_fills_its_claim(tmp_path, monkeypatch):
    """A table of the RL study written there: figures, errors over its seeds and the sign come from it, and the command is gone."""
    for path in tables.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    row = lambda arm, success: dict(arm=arm, success=success, success_se=0.01, manifold_psnr=30.0, updates=300, n=512, seeds=[0, 1], cpu_seconds=100.0, success_remove=0.1)
    (tmp_path / "studies" / "rl").mkdir(parents=True)
    (tmp_path / "studies" / "rl" / "table.json").write_text(json.dumps({"arms": [row("SFT + NP-Edit", 0.2), row("SFT + Flow-GRPO", 0.3), row("NP-Edit", 0.2)]}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    lines = {line.split(" | ")[0][2:]: line for line in tables.claims_table().splitlines() if line.startswith("| ")}
    line = lines["better than SFT + Flow-GRPO with the same judge"]
    assert "SFT + NP-Edit 0.200 (0.010), SFT + Flow-GRPO 0.300 (0.010) (300 updates, 2 seeds, 100 CPU-s" in line and "| no |" in line
    assert tables.CLEAR in lines["no SFT start is needed"] and "vlmedit study rl" in lines["Flow-GRPO costs image quality (manifold-PSNR)"]


def test_a_wording_s_figures_are_those_of_its_file(tmp_path, monkeypatch):
    """Three shares of answers per wording and two of the teacher's, rounded, in the row that names them."""
    found = {
        "words": {"n": 50, "schooled": {"right": 0.9, "copy": 0.8, "same": 0.7}, "bare": {"right": 0.123, "copy": 0.2, "same": 0.3}},
        "teacher": {"n": 40, "draws": 3, "right": 0.91, "copy": 0.92, "right_by_type": {}},
        "pairs": {"twins": {"n": 30, "kept": 0.25, "by_type": {"move": 0.5}}},
    }
    (tmp_path / "asking.json").write_text(json.dumps(found))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    lines = tables.asking_table().splitlines()
    for words in ("bare questions (50 pairwise ones) | 0.12 / 0.20 / 0.30", "3 noises (40 requests whose captions differ) | 0.91 / 0.92 / not asked", "by twins that the judge says yes to twice (30 requests) | 0.25 (moves 0.50"):
        assert sum(words in line for line in lines) == 1
