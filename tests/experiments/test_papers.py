"""The papers' figures: the tables of the pages are those of papers/results, and every figure in them is one of a file there."""

import json
import re
from pathlib import Path

import pytest
from helpers.scripts import script

from vlmedit import methods
from vlmedit.pipelines.shapes import checkpoint

ROOT = Path(__file__).parents[2]


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
    """Of 400 edits each: .50 against .40 is 2.9 errors, .50 against .44 is 1.7; nothing against nothing is no sign; of PSNRs by their own errors alone."""
    row = lambda success, psnr=30.0, **more: {"success": success, "manifold_psnr": psnr, "n": 400, "success_remove": success} | more
    assert tables.sign(row(0.5), row(0.4), "success") == "yes" and tables.sign(row(0.4), row(0.5), "success") == "no"
    assert tables.sign(row(0.5), row(0.44), "success") == tables.sign(row(0.0), row(0.0), "success_remove") == tables.CLEAR
    assert tables.sign(row(0.5, success_se=0.01), row(0.44, success_se=0.01), "success") == "yes"  # the study's own
    assert tables.sign(row(0.5), row(0.4), "success_remove") == tables.CLEAR  # fifty removals each
    psnr = lambda a, b, error=0.1: tables.sign(row(0, a, manifold_psnr_se=error), row(0, b, manifold_psnr_se=error), "manifold_psnr")
    assert [psnr(30.5, 30.0), psnr(30.0, 30.5), psnr(30.2, 30.0)] == ["yes", "no", tables.CLEAR] and psnr(30.5, 30.0, 1.0) == tables.CLEAR
    assert tables.sign(row(0), row(0), "manifold_psnr") == "error unknown"


def test_as_good_means_no_more_than_the_margin_below():
    """Errors of .01 each, two of their difference .028: .50 against .51 is surely above -.05, against .60 surely below, against .54 neither."""
    row = lambda success: {"success": success, "success_se": 0.01, "n": 1}
    assert [tables.sign(row(0.5), row(other), "success", better=False) for other in (0.4, 0.51, 0.54, 0.6)] == ["yes", "yes", tables.CLEAR, "no"]


def test_every_claim_is_there_measured_or_with_its_command():
    """Each names a study and arms that exist; what nobody has measured its command; what was measured has a sign per comparison."""
    from vlmedit.experiments.study import STUDIES

    assert len({claim.text for claim in tables.CLAIMS}) == len(tables.CLAIMS) == 14
    lines = tables.claims_table().splitlines()[-14:]
    for line, claim in zip(lines, tables.CLAIMS):
        assert line.startswith(f"| {claim.text} |")
        assert {name.split(", ")[0] for name in (claim.first, claim.second)} <= set(STUDIES[claim.study].arms)
        assert (f"`vlmedit study {claim.study}`" in line) == (not claim.found()) and len(claim.found()) == len(claim.signs())
        assert set(claim.signs()) <= {"yes", "no", tables.CLEAR} and set(claim.why) <= {"yes", "no", tables.CLEAR}
        assert not claim.signs() or claim.signs()[-1] in claim.why, claim.text


def test_a_study_that_was_run_fills_its_claim(tmp_path, monkeypatch):
    """A table of the RL study written there: figures, errors over its seeds and the sign come from it, and the command is gone."""
    for path in tables.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    row = lambda arm, success: dict(arm=arm, success=success, success_se=0.01, manifold_psnr=30.0, updates=300, n=512, seeds=[0, 1], cpu_seconds=100.0, success_remove=0.1)
    (tmp_path / "studies" / "rl").mkdir(parents=True)
    (tmp_path / "studies" / "rl" / "table.json").write_text(json.dumps({"arms": [row("SFT + NP-Edit, 4 steps", 0.2), row("SFT + Flow-GRPO, 4 steps", 0.3), row("NP-Edit", 0.2)]}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    lines = {line.split(" | ")[0][2:]: line for line in tables.claims_table().splitlines() if line.startswith("| ")}
    line = lines["better than SFT + Flow-GRPO with the same judge"]
    assert "SFT + NP-Edit 0.200 (0.010), SFT + Flow-GRPO 0.300 (0.010) (300 updates, 2 seeds, 100 CPU-s" in line and "| no |" in line
    assert "| yes |" in lines["no SFT start is needed"] and "vlmedit study rl" in lines["Flow-GRPO costs image quality (manifold-PSNR before and after it)"]


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


# --- the model cards


cards = script("cards")
CARDS = ("teacher", "judge", "second_judge", "warm", "editor")


@pytest.mark.parametrize("role", CARDS)
def test_the_cards_are_those_of_the_results(role, tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "checkpoint", lambda family, name: tmp_path)
    getattr(cards, role)()
    shipped = checkpoint("shapes", role) / "README.md"
    assert (tmp_path / "README.md").read_bytes() == shipped.read_bytes(), "run `python papers/cards.py`"


@pytest.mark.parametrize("role", CARDS)
def test_a_card_s_commands_can_be_run_today(role):
    """Stages that exist, with settings that they have."""
    text = (checkpoint("shapes", role) / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^vlmedit train (\w+)(?: --set (.*))?$", text, re.M)
    assert commands
    for stage, pairs in commands:
        assert {pair.partition("=")[0] for pair in pairs.split()} <= set(methods.find(stage)[0].known()), stage
