"""Records of cells: found by what they say, whatever settings came or were renamed since; the tables of
papers/results are made of them."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from vlmedit import methods
from vlmedit.errors import InputError
from vlmedit.experiments import study
from vlmedit.experiments.study import records, trainings
from vlmedit.methods.npedit import NPEditConfig

RESULTS = Path(__file__).parents[2] / "papers" / "results" / "studies"
MEASURED = sorted(folder.name for folder in RESULTS.iterdir())


@pytest.fixture
def measured(tmp_path):
    """A copy of a study's results with the plan that they are of."""

    def copied(name: str):
        out = tmp_path / name
        if not out.exists():
            shutil.copytree(RESULTS / name, out)
        there = json.loads((RESULTS / name / "table.json").read_text())
        given = {k: there[k] for k in ("tier", "updates", "n", "equal")}
        overrides = {f"{stage}.{k}": v for stage, settings in there["overrides"].items() for k, v in settings.items()}
        return study.plan(name, **given, overrides=overrides, out=out, runs=tmp_path / "runs")

    return copied


def test_there_are_results_of_seven_studies():
    assert len(MEASURED) == 7 and len(list(RESULTS.glob("*/cells/*.json"))) == 26


@pytest.mark.parametrize("name", MEASURED)
def test_every_cell_is_found_again(name, measured):
    """By its arm and seed, in its own file, as finished: nothing would be trained a second time."""
    plan = measured(name)
    files = sorted((Path(plan.out) / "cells").glob("*.json"))
    cells = [json.loads(file.read_text()) for file in files]
    assert [records.cell_file(plan, c["arm"], c["seed"]) for c in cells] == files
    assert all(records.finished(plan, c["arm"], c["seed"]) == c for c in cells) and len(records.cells(plan)) == len(
        cells
    )
    pairs = {(c["arm"], c["seed"]) for c in cells}
    again = dataclasses.replace(plan, arms=tuple(dict.fromkeys(arm for arm, _ in pairs)), seeds=(0,))
    assert all(known for _, known in study.run(again)) and not Path(plan.runs).exists()


@pytest.mark.parametrize("name", MEASURED)
def test_the_tables_are_those_of_the_cells_to_the_byte(name, measured):
    plan = measured(name)
    for file in ("table.json", "table.csv"):
        (Path(plan.out) / file).unlink()
    study.write_tables(plan)
    for file in ("table.json", "table.csv"):
        assert (Path(plan.out) / file).read_bytes() == (RESULTS / name / file).read_bytes(), file


@pytest.mark.parametrize("name", MEASURED)
def test_a_record_says_how_it_was_made(name):
    """Stage, today's settings without folders and machine, starting weights, code; what is saved is what a record
    written now would say."""
    for file in (RESULTS / name / "cells").glob("*.json"):
        cell = json.loads(file.read_text())
        assert cell["code"] == "423b563"
        for trained in cell["trainings"]:
            assert set(trained) == {"stage", "settings", "starts"}
            config_class = methods.find(trained["stage"])[0]
            assert set(trained["settings"]) <= set(config_class.known()) - set(trainings.PATHS) - {"out", "save_every"}
            assert set(trained["starts"]) <= set(trainings.PATHS) & set(config_class.known()) and trained["starts"]


def with_default(monkeypatch, **defaults):
    """NP-Edit as it would be, had it these settings or defaults."""
    changed = dataclasses.make_dataclass(
        "Changed", [(k, type(v), v) for k, v in defaults.items()], bases=(NPEditConfig,), frozen=True
    )
    train = methods.find("npedit")[1]
    monkeypatch.setattr(
        trainings, "find_method", lambda stage: (changed, train) if stage == "npedit" else methods.find(stage)
    )
    return changed


def test_a_new_setting_loses_no_result(measured, monkeypatch):
    """It counts as having had its default; a cell that has another value is another one."""
    changed = with_default(monkeypatch, novelty=3)
    plan = measured("unroll")
    assert len(records.cells(plan)) == 3 and "novelty" in records.identity(plan, "mixed", 0)["trainings"][0]["settings"]
    other = dataclasses.replace(plan, overrides={"npedit": {"novelty": 4}})
    assert records.cells(other) == [] and records.differences(other, records.cells(plan)[0]) == {"novelty": (3, 4)}
    assert changed.make().novelty == 3


def test_a_changed_default_is_said_and_overwrites_nothing(measured, monkeypatch):
    """Results made under another value are those of another plan; they are there afterwards, to the byte."""
    with_default(monkeypatch, judge_weight=0.25)
    said = "unroll holds results of another plan .mixed, seed 0: judge_weight 0.15 there, 0.25 now; "
    with pytest.raises(InputError, match=said + ".*name another folder with --out, or delete it"):
        measured("unroll")


def test_settings_of_the_machine_and_the_name_of_the_file_do_not_count(measured):
    plan = measured("unroll")
    file = records.cell_file(plan, "mixed", 0)
    moved = file.rename(file.with_name("mixed-seed0-0.json"))
    other = dataclasses.replace(plan, overrides={"npedit": dict(trackers=(), strip_every=7, offload=("judge",))})
    assert records.cell_file(other, "mixed", 0) == moved and records.finished(other, "mixed", 0)


CHANGES = {
    "updates": (lambda cell: cell["trainings"][1]["settings"].update(steps=299), {"steps": (299, 300)}),
    "a setting": (lambda cell: cell["trainings"][1]["settings"].update(lr=0.5), {"lr": (0.5, 0.001)}),
    "a setting of the world": (lambda cell: cell["trainings"][1]["settings"].update(side=64), {"side": (64, 32)}),
    "a setting that is gone": (lambda cell: cell["trainings"][1]["settings"].update(gone=1), {"gone": (1, None)}),
    "seed": (lambda cell: cell["trainings"][0]["settings"].update(seed=5), {"seed": (5, 0)}),
    "stage": (lambda cell: cell["trainings"][0].update(stage="teacher"), {"stage": ("teacher", "sft")}),
    "a training less": (lambda cell: cell["trainings"].pop(), {"trainings": (1, 2)}),
    "where it started": (
        lambda cell: cell["trainings"][1]["starts"].update(student="0" * 16),
        {"student": ("0" * 16, "training 1")},
    ),
    "requests": (lambda cell: cell["measured"].update(n=64), {"n": (64, 512)}),
    "use": (lambda cell: cell["measured"].update(ways={}), {"ways": ({}, {"4 steps": {"steps": 4}})}),
    "an earlier version": (lambda cell: cell.pop("measured"), {"version": ("before 0.2", "0.2")}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_decides_the_result_decides_whose_it_is(what, measured):
    """The record is not taken for the plan's, the difference is named, and what is written for the plan gets a file
    of its own."""
    plan = measured("rl")
    file = records.cell_file(plan, "SFT + NP-Edit", 0)
    cell = json.loads(file.read_text())
    change, expected = CHANGES[what]
    change(cell)
    file.write_text(json.dumps(cell))
    assert records.differences(plan, cell) == expected and records.finished(plan, "SFT + NP-Edit", 0) is None
    assert records.cell_file(plan, "SFT + NP-Edit", 0) != file and len(records.cells(plan)) == 3
    with pytest.raises(InputError, match="rl holds results of another plan .SFT . NP-Edit, seed 0: "):
        measured("rl")


def test_another_start_is_another_plan(measured, tmp_path):
    """Folders do not matter, weights do: a copy of the judge finds all cells, another judge none."""
    plan = measured("unroll")
    shutil.copytree(plan.models["judge"], tmp_path / "copy")
    same, other = (
        dataclasses.replace(plan, models={**plan.models, "judge": folder})
        for folder in (str(tmp_path / "copy"), plan.models["held_out"])
    )
    assert len(records.cells(same)) == 3 and records.cells(other) == []
    assert set(records.differences(other, records.cells(plan)[0])) == {"judge"}


def test_of_two_records_the_one_that_went_well_counts(measured):
    plan = measured("unroll")
    file = records.cell_file(plan, "mixed", 0)
    failed = json.loads(file.read_text()) | {"ok": False, "error": "out of luck"}
    file.with_name("mixed-seed0-0.json").write_text(json.dumps(failed))
    assert records.cell_file(plan, "mixed", 0) == file and records.finished(plan, "mixed", 0)["ok"]
    file.unlink()
    assert (
        records.finished(plan, "mixed", 0) is None and records.cell_file(plan, "mixed", 0).name == "mixed-seed0-0.json"
    )


def test_the_code_that_ran_is_named():
    """The commit of this checkout, marked where files differ from it, or the package's version."""
    assert records.code().removesuffix("+").replace(".", "").isalnum()
