"""Studies: equal updates (or calls, or seconds) for every arm, what is shared and what is repeated, tables that are means, failures that stop nothing."""

import json
import os
import shutil
from pathlib import Path

import pandas
import pytest
import torch
from helpers.tiny_models import SIDE, tiny_dit, tiny_judge
from PIL import Image
from safetensors.torch import load_file

from vlmedit.cli import main
from vlmedit.data.world import held_out
from vlmedit.errors import ConfigError, InputError
from vlmedit.evaluation.editing import edit_examples
from vlmedit.evaluation.judge import ask_judge
from vlmedit.experiments import study
from vlmedit.experiments.study import cells, costs, tables
from vlmedit.methods.npedit import NPEditConfig, train_npedit
from vlmedit.world.edits import EDIT_TYPES


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("teacher", "student")):
        tiny_dit(seed).save_pretrained(folder / name)
    for seed, name in ((3, "judge"), (4, "held_out")):
        tiny_judge(seed).save_pretrained(folder / name)
    return {name: str(folder / name) for name in study.ROLES}


@pytest.fixture
def make(models, tmp_path):
    """A smoke plan on tiny models."""

    def made(name, arms=(), seeds=(0,), out="out", runs="runs", **overrides):
        return study.plan(name, "smoke", seeds, arms, overrides=models | {"side": SIDE, "precision": "no"} | overrides, out=tmp_path / out, runs=tmp_path / runs)

    return made


def done(plan, **options) -> list[tuple[dict, bool]]:
    return list(study.run(plan, **options))


# --- what is planned


@pytest.mark.parametrize("name", study.STUDIES)
def test_every_arm_makes_the_same_number_of_student_updates(name, make):
    """Over all its trainings of a student, at a number that halves: 7 and 8 updates would not be equal. Judges are counted apart."""
    plan = study.plan(name, "laptop", (0,), updates=40, overrides={k: v for k, v in make(name).models.items()} | ({"side": SIDE}), out="x", runs="y")
    for arm in plan.arms:
        tasks = study.prepare(plan, arm, 0)
        assert sum(t.config.steps for t in tasks if t.stage != "judge") == (40 if tasks else 0), arm
        assert {t.config.batch for t in tasks if t.stage != "judge"} <= {32}
    assert not Path("x").exists() and not Path("y").exists()


def test_each_training_starts_from_the_one_before(make):
    plan = make("rl")
    first, second = study.prepare(plan, "SFT + Flow-GRPO", 0)
    assert first.config.student == plan.models["student"] and second.config.student == str(Path(first.config.out) / "model")
    assert study.prepare(plan, "SFT + NP-Edit", 0)[0] == first  # trained once for both arms
    schooled, taught = study.prepare(make("judge_size"), "small", 0)
    assert (schooled.stage, schooled.config.size, taught.config.judge) == ("judge", "small", (str(Path(schooled.config.out) / "model"),))
    assert study.prepare(make("judge_size"), "shipped", 0)[0].config.judge == (plan.models["judge"],)


def test_a_second_judge_joins_the_first(make):
    """Both judges: the schooled one is the second, the plan's stays the first; the editor's name depends on who was schooled, not where."""
    plan = make("asking")
    school, taught = study.prepare(plan, "both judges", 0)
    assert taught.config.judge == (plan.models["judge"], str(Path(school.config.out) / "model"))
    other_school, other = study.prepare(plan, "another judge", 0)
    assert other_school == school and other.config.judge == taught.config.judge[1:]
    elsewhere = study.prepare(make("asking", runs="elsewhere"), "both judges", 0)[1]
    assert elsewhere.key == taught.key != study.prepare(plan, "as schooled", 0)[0].key and elsewhere.config.judge[1] != taught.config.judge[1]


def test_the_unpaired_rivals_start_alike_and_see_no_pair(make):
    """One student for all, the plan's teacher and judge where a rival asks them; the only stage with targets is the paired rival's."""
    plan = make("unpaired")
    for arm in plan.arms:
        first = study.prepare(plan, arm, 0)[0]
        assert first.config.student == plan.models["student"] and getattr(first.config, "teacher", plan.models["teacher"]) == plan.models["teacher"]
        assert (first.stage == "sft") == (arm == "paired SFT")


def test_shares_of_the_requests_are_counted(make):
    plan = study.plan("data", "laptop", updates=50, overrides=make("data").models | {"side": SIDE}, out="x", runs="y")
    assert [study.prepare(plan, arm, 0)[0].config.data.request_limit for arm in ("1 %", "50 %", "100 %")] == [16, 800, 1600]


def test_overrides_reach_their_stages_and_no_further(make, models):
    """A bare name goes to every stage that has it, STAGE.NAME to one, and what the arm itself says stays."""
    plan = make("rl", lr=0.5, **{"sft.lr": 0.25, "judge_weight": 0.3})
    sft, grpo = study.prepare(plan, "SFT + Flow-GRPO", 0)
    (edit,) = study.prepare(plan, "NP-Edit", 0)
    assert (sft.config.lr, grpo.config.lr, edit.config.lr, edit.config.judge_weight) == (0.25, 0.5, 0.5, 0.3)
    (silent,) = study.prepare(make("objective", judge_weight=0.3), "DMD only", 0)
    assert silent.config.judge_weight == 0
    other = make("rl", student=models["teacher"])
    assert [t.config.student for t in study.prepare(other, "SFT + NP-Edit", 0)][0] == models["teacher"]


def test_a_training_s_name_is_what_makes_it(make, models, tmp_path):
    """Seed, settings and starting weights change it; where it is written, and other arms and studies, do not."""
    key = lambda plan, arm="full", seed=0: study.prepare(plan, arm, seed)[0].key
    same = key(make("objective"))
    assert key(make("objective", runs="elsewhere")) == same == key(make("steps"), "NP-Edit") == key(make("unroll"), "mixed")
    other = tmp_path / "other"
    shutil.copytree(models["student"], other)
    assert key(make("objective", student=str(other))) == same
    tiny_dit(9).save_pretrained(other)
    keys = {same, key(make("objective"), seed=1), key(make("objective", lr=0.5)), key(make("objective"), "judge only"), key(make("objective", student=str(other)))}
    assert len(keys) == 5


BAD = {
    "study": (dict(name="objectiv"), "unknown study 'objectiv' .nearest: objective.; known: objective, matching"),
    "arm": (dict(arms=("ful",)), "unknown arm 'ful' of study 'objective' .nearest: full.; known: full, DMD only"),
    "override": (dict(overrides={"judge_wieght": 1}), "unknown override 'judge_wieght' of study 'objective' .nearest: judge_weight.(.|\n)*known: .*answer_loss"),
    "of another stage": (dict(overrides={"flow_grpo.lr": 1}), "unknown override 'flow_grpo.lr'"),
    "other data": (dict(overrides={"data": "manifest.jsonl"}), "unknown override 'data'"),
    "the seed as a setting": (dict(overrides={"seed": 1}), "unknown override 'seed'"),
    "seed": (dict(seeds=("x",)), "seed is 'x'; it must be a whole number"),
    "no seeds": (dict(seeds=()), "no seeds given"),
    "updates": (dict(updates=0), "updates is 0; it must be at least 1"),
    "what every arm sets": (dict(name="fake_updates", overrides={"fake_updates": 3}), "unknown override 'fake_updates' of study 'fake_updates'"),
    "another model": (dict(overrides={"side": SIDE, "npedit.judge": ("here", "nowhere")}), "judge is 'here', no folder with a model.(.|\n)*judge is 'nowhere', no folder with a model"),
    "measure": (dict(equal="cost"), "equal is 'cost'; known: updates, calls, cpu"),
    "tier": (dict(tier="laptpo"), "unknown tier 'laptpo'; known: smoke, laptop, gpu"),
    "model": (dict(overrides={"student": "nowhere"}), "student is 'nowhere', no folder with a model\ntrain one"),
    "side": (dict(overrides={"side": 32}), "side is 32, and the student in .* is made for 16; pass --set side=16"),
    "value": (dict(overrides={"side": SIDE, "lr": -1.0}), "lr is -1.0; it must be positive"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_named_before_any_work(name, models, tmp_path):
    given, message = BAD[name]
    overrides = models | {"side": SIDE} | given.get("overrides", {})
    settings = dict(name="objective", tier="smoke", out=tmp_path / "out", runs=tmp_path / "runs") | given | {"overrides": overrides}
    with pytest.raises((InputError, ConfigError), match=message):
        study.plan(**settings)
    assert not list(tmp_path.iterdir())


# --- what is run


def test_a_study_trains_measures_and_writes_its_table(make, tmp_path):
    """Two arms and seeds: means and standard errors recomputed from the CSV, calls counted by hand, a plot; asked again, all is there
    already; a third seed adds its cells alone."""
    plan = make("objective", ("full", "judge only"), (0, 1))
    records = done(plan)
    assert [(c["arm"], c["seed"], c["ok"], known) for c, known in records] == [(a, s, True, False) for s in (0, 1) for a in ("full", "judge only")]
    result = study.write_tables(plan)
    table = pandas.read_csv(tmp_path / "out" / "table.csv")
    assert len(table) == 4 and set(table["arm"]) == {"full", "judge only"} and (table["n"] == 8).all()
    for row in result["arms"]:
        mine = table[table["arm"] == row["arm"]]
        assert row["seeds"] == [0, 1] and row["updates"] == 2
        for key in ("success", "kept", "keep_psnr", "manifold_psnr", "hacking_gap"):
            least = (mine[key].mean() * (1 - mine[key].mean()) / 8) ** 0.5 if key in tables.SHARES else mine[f"{key}_se"].mean() if key.endswith("psnr") else 0
            assert row[key] == pytest.approx(mine[key].mean()) and row[f"{key}_se"] == pytest.approx(max(mine[key].std() / 2**0.5, least))
    for cell, _ in records:
        models = {k: plan.models[k] for k in ("teacher", "judge", "student")}
        straight = list(train_npedit(NPEditConfig.make(**cell["trainings"][0]["settings"], **models, out=str(tmp_path / f"check-{cell['arm']}-{cell['seed']}"))))
        assert cell["calls"] == sum(s.metrics["calls"] for s in straight) > 0 and cell["cpu_seconds"] > 0
    assert result["failed"] == [] and json.loads((tmp_path / "out" / "table.json").read_text()) == result
    with Image.open(tmp_path / "out" / "plot.png") as plot:
        assert plot.width > 600
    assert not list((tmp_path / "runs").rglob("checkpoint")) and len(list((tmp_path / "runs").iterdir())) == 4
    assert study.read("objective", tmp_path / "out") == result
    more = done(make("objective", ("full", "judge only"), (0, 1, 2)))
    assert [known for _, known in more].count(True) == 4 and {c["seed"] for c, known in more if not known} == {2}


def test_arms_may_spend_equal_calls(make, models, tmp_path, monkeypatch):
    """One call per update against four: four times the updates, as many calls in the end, within an update; asked again, no pilot runs."""
    arms = ("one call", "all calls")
    ask = lambda: study.plan("unroll", "smoke", (0,), arms, 12, overrides=models | {"side": SIDE, "precision": "no"}, out=tmp_path / "out", runs=tmp_path / "runs", equal="calls")
    plan = study.balance(ask())
    assert plan.factors["one call"] == pytest.approx(4 * plan.factors["all calls"]) and not (tmp_path / "runs" / "pilots").exists()
    one, every = [c for c, _ in done(plan)]
    assert one["ok"] and every["ok"] and abs(one["calls"] - every["calls"]) <= 4 * 4
    assert one["updates"] == round(12 * plan.factors["one call"]) and one["updates"] >= 4 * every["updates"] - 4
    result = study.write_tables(plan)
    assert result["equal"] == "calls" and [r["updates"] for r in result["arms"]] == [one["updates"], every["updates"]]
    monkeypatch.setattr(costs, "pilot_cost", None)  # calling it would raise
    assert study.balance(ask()) == plan


def test_arms_may_spend_equal_seconds(make, models, tmp_path, monkeypatch):
    """Half as dear, twice the updates; over both trainings of an arm; and a pilot's seconds are those of the process."""
    ask = lambda equal="cpu": study.plan("rl", "laptop", (0,), updates=40, overrides=models | {"side": SIDE}, out=tmp_path / "o", runs=tmp_path / "r", equal=equal)
    prices = {"SFT": 1.0, "SFT + Flow-GRPO": 2.0, "SFT + NP-Edit": 0.5, "Flow-GRPO": 4.0, "NP-Edit": 1.0}
    monkeypatch.setattr(costs, "pilot_cost", lambda plan, arm: prices[arm])
    plan = study.balance(ask())
    updates = {arm: [t.config.steps for t in study.prepare(plan, arm, 0)] for arm in plan.arms}
    assert updates == {"SFT": [40], "SFT + Flow-GRPO": [10, 10], "SFT + NP-Edit": [40, 40], "Flow-GRPO": [10], "NP-Edit": [40]}
    assert study.balance(ask("updates")).factors == {}
    monkeypatch.undo()
    cheap, dear = (costs.pilot_cost(study.plan("fake_updates", "smoke", arms=(k,), overrides=models | {"side": SIDE, "precision": "no"}, out=tmp_path / "o", runs=tmp_path / "p", equal="cpu"), k) for k in ("1", "10"))
    assert 0 < 1.5 * cheap < dear


def test_a_watched_student_is_measured_on_its_way(make, tmp_path):
    """Four times in four updates: other weights each time, the last those of a training that nobody watched; one that nobody watched is made
    again when it is to be watched; stopped in between, what was kept is kept."""
    watched = lambda out, runs: study.plan("hacking", "smoke", (0,), ("NP-Edit",), 4, overrides=make("hacking").models | {"side": SIDE, "precision": "no"}, out=tmp_path / out, runs=tmp_path / runs)
    plain = study.plan("objective", "smoke", (0,), ("full",), 4, overrides=make("objective").models | {"side": SIDE, "precision": "no"}, out=tmp_path / "plain", runs=tmp_path / "a")
    done(plain)
    (before,) = (load_file(f) for f in (tmp_path / "a").rglob("*.safetensors"))
    plan = watched("out", "a")
    ((cell, known),) = done(plan)
    assert cell["ok"] and not known and list(cell["ways"]) == [*(f"4 steps after {k}" for k in (1, 2, 3, 4)), "4 steps where the held-out judge stops it"]
    (run,) = (tmp_path / "a").iterdir()
    on_the_way = [load_file(run / f"after-{k}.safetensors") for k in (1, 2, 3)] + [load_file(next((run / "model").glob("*.safetensors")))]
    apart = lambda one, other: max((one[k] - other[k]).abs().max().item() for k in one)
    assert all(apart(a, b) > 0 for a, b in zip(on_the_way, on_the_way[1:])) and apart(on_the_way[-1], before) == 0
    *ways, chosen = cell["ways"].values()
    assert chosen == max(ways, key=lambda m: m["success"] + m["held_out_gap"]) and len({m["manifold_psnr"] for m in ways}) == 4 and [r["arm"] for r in study.rows_of(cell)][0] == "NP-Edit, 4 steps after 1"
    for m in cell["ways"].values():
        assert 0 <= m["calibration_error"]["edit"] <= 1 and -1 <= m["held_out_gap"] <= 1 and m["held_out_gap"] != m["hacking_gap"]

    def stop(what, step):
        if step.index == 3:
            raise KeyboardInterrupt

    again = watched("again", "b")
    with pytest.raises(KeyboardInterrupt):
        done(again, watch=stop)
    done(again)
    (run,) = (tmp_path / "b").iterdir()
    assert all(apart(load_file(run / f"after-{k}.safetensors"), on_the_way[k - 1]) == 0 for k in (1, 2, 3))

    unseen = study.plan("objective", "smoke", (0,), ("full",), 4, overrides=plan.overrides["npedit"] | dict(plan.models), out=tmp_path / "unseen", runs=tmp_path / "c")
    with pytest.raises(KeyboardInterrupt):
        done(unseen, watch=stop)
    ((cell, _),) = done(watched("seen", "c"))
    assert cell["ok"] and len(cell["ways"]) == 5


def test_a_judge_may_relearn_from_the_student_that_it_taught(make):
    """Halfway the judge goes to school on the student so far, and teaches it on."""
    plan = study.plan("hacking", "laptop", (0,), ("judge relearns halfway",), 40, overrides=make("hacking").models | {"side": SIDE}, out="x", runs="y")
    first, school, second = study.prepare(plan, "judge relearns halfway", 0)
    assert school.config.students == (first.config.out + "/model",) and (school.config.start,) == first.config.judge == (plan.models["judge"],)
    assert second.config.student == first.config.out + "/model" and second.config.judge == (school.config.out + "/model",)
    assert cells.times(second, 2) == [10] and first.config.steps == second.config.steps == 20


def test_a_student_s_own_judges_are_asked_about_it(make, models):
    """The judge that an arm schooled, or both that taught it; the shared one where no judge taught."""
    plan = make("hacking")
    asked = lambda arm, plan=plan: cells.judges_of(plan, study.prepare(plan, arm, 0))
    made = lambda arm, at: study.prepare(plan, arm, 0)[at].config.out + "/model"
    assert asked("NP-Edit") == [models["judge"]] and asked("small judge") == [made("small judge", 0)] and asked("judge relearns halfway") == [made("judge relearns halfway", 1)]
    assert asked("both judges") == [models["judge"], made("both judges", 0)] and asked("SFT", make("rl")) == [models["judge"]] == cells.judges_of(plan, [])


def test_results_of_another_plan_are_not_overwritten(make, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # default folders are those of the working directory
    plan = make("objective", ("full",))
    done(plan)
    study.write_tables(plan)
    make("objective", ("judge only",), (3,))  # other arms and seeds join the table
    with pytest.raises(InputError, match="holds results of another plan .updates 2 there, 5 now.; name another folder with --out, or delete it"):
        study.plan("objective", "smoke", (0,), ("full",), 5, overrides=models | {"side": SIDE, "precision": "no"}, out=plan.out, runs=plan.runs)
    default = lambda **given: study.plan("objective", **given, overrides=models | {"side": SIDE}).out
    assert default(tier="smoke") == "runs/smoke/objective" and default() == "runs/studies/objective"
    (tmp_path / "papers/results").mkdir(parents=True)  # as in a checkout
    assert default() == "papers/results/studies/objective" and default(equal="cpu").endswith("objective-equal-cpu")


def test_a_training_is_made_once_for_all_studies(make, monkeypatch):
    """"steps" uses the student of "objective", four ways, without another update; its rows differ by steps alone."""
    done(make("objective", ("full",)))
    monkeypatch.setattr(cells, "find_method", None)  # calling it would raise
    plan = make("steps", ("NP-Edit",), out="steps")
    ((cell, known),) = done(plan)
    assert cell["ok"] and not known and list(cell["ways"]) == ["1 step", "2 steps", "4 steps", "8 steps"]
    rows = study.rows_of(cell)
    assert [r["arm"] for r in rows] == [f"NP-Edit, {way}" for way in cell["ways"]] and [r["calls_per_edit"] for r in rows] == [1, 2, 4, 8]
    assert len({r["manifold_psnr"] for r in rows}) == 4


def test_an_interrupted_study_goes_on_where_it_was(make, tmp_path):
    """Stopped after its first update, it ends in the straight run's weights, and what was spent before is counted."""

    def stop(what, step):
        assert what == "npedit, seed 0" and step.index == 1
        raise KeyboardInterrupt

    straight = make("objective", ("full",), runs="straight", out="a")
    done(straight)
    plan = make("objective", ("full",), runs="stopped", out="b")
    with pytest.raises(KeyboardInterrupt):
        done(plan, watch=stop)
    (folder,) = (tmp_path / "stopped").iterdir()
    before = json.loads((folder / "cost.json").read_text())
    assert (folder / "checkpoint").is_dir() and not before["done"] and before["calls"] > 0
    ((cell, known),) = done(plan)
    assert cell["ok"] and not known and cell["calls"] > before["calls"] and cell["cpu_seconds"] > before["cpu_seconds"]
    a, b = (load_file(tmp_path / runs / folder.name / "model" / "diffusion_pytorch_model.safetensors") for runs in ("straight", "stopped"))
    assert all((a[k] == b[k]).all() for k in a)


def test_a_failed_arm_stops_nothing_and_is_tried_again(make, models, monkeypatch, tmp_path, capsys):
    """By the command line: exit code 1, the others in the table, the error in the report; once mended, only it is run, exit code 0."""

    def fails(config):
        if config.dmd_weight == 0:
            raise RuntimeError("out of luck")
        yield from train_npedit(config)

    pairs = [f"{k}={v}" for k, v in (models | {"side": SIDE, "precision": "no"}).items()]
    command = ["study", "objective", "--tier", "smoke", "--arms", "judge only,full", "--seeds", "0", "--set", *pairs]
    command += ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"), "--json", str(tmp_path / "all.json")]
    monkeypatch.setattr(cells, "find_method", lambda stage: (NPEditConfig, fails))
    assert main(command) == 1
    said = capsys.readouterr()
    assert "judge only, seed 0: failed: RuntimeError: out of luck" in said.err and "full: success" in said.out
    result = json.loads((tmp_path / "all.json").read_text())
    assert result["failed"] == [{"arm": "judge only", "seed": 0, "error": "RuntimeError: out of luck"}] and [a["arm"] for a in result["arms"]] == ["full"]
    monkeypatch.setattr(cells, "find_method", lambda stage: (NPEditConfig, train_npedit))
    assert main(command) == 0
    assert "full, seed 0: 4 steps" in (err := capsys.readouterr().err) and "(there already)" in err
    result = json.loads((tmp_path / "all.json").read_text())
    assert result["failed"] == [] and [a["arm"] for a in result["arms"]] == ["full", "judge only"]


def test_processes_agree_with_one(make):
    """Two jobs, two cells that share their first training: the same figures as in this process."""
    arms = ("SFT + NP-Edit", "SFT + Flow-GRPO")
    alone = {c["arm"]: c for c, _ in done(make("rl", arms, out="a", runs="a-runs"))}
    for cell, known in done(make("rl", arms, out="b", runs="b-runs"), jobs=2):
        other = alone[cell["arm"]]
        assert cell["ok"] and other["ok"] and not known and cell["calls"] == other["calls"], cell.get("error")
        figures = lambda c: {(way, k): v for way, m in c["ways"].items() for k, v in m.items() if isinstance(v, float) and "seconds" not in k}
        assert figures(cell) == pytest.approx(figures(other), abs=1e-5) and list(cell["ways"]) == ["4 steps before the last stage", "4 steps"]
        assert cell["ways"]["4 steps before the last stage"]["manifold_psnr"] != cell["ways"]["4 steps"]["manifold_psnr"]


def die(plan, arm, seed, threads):
    os._exit(9)


def test_a_process_that_dies_is_a_failed_cell(make, monkeypatch):
    monkeypatch.setattr(cells, "_process", die)
    ((cell, _),) = done(make("objective", ("full",)), jobs=2)
    assert not cell["ok"] and cell["error"] == "its process died with exit code 9"


def test_the_teacher_alone_needs_no_training(models, tmp_path):
    """An arm without trainings uses the teacher; its seeds differ by noise, its calls are counted."""
    plan = study.plan("training_free", "smoke", (0, 1), ("SDEdit", "inversion"), overrides=models, out=tmp_path / "out", runs=tmp_path / "runs")
    records = [c for c, _ in done(plan)]
    assert all(c["ok"] and c["calls"] == 0 and c["cpu_seconds"] == 0 for c in records), records
    assert not (tmp_path / "runs").exists()
    way = lambda arm, seed, name: next(c for c in records if (c["arm"], c["seed"]) == (arm, seed))["ways"][name]
    assert way("SDEdit", 0, "from 0.6")["keep_psnr"] != way("SDEdit", 1, "from 0.6")["keep_psnr"]
    assert way("SDEdit", 0, "from 0.6")["calls_per_edit"] == 30 and way("inversion", 0, "back to 0.8")["calls_per_edit"] == 75
    assert len(study.write_tables(plan)["arms"]) == 6


def test_the_judge_s_choice_among_samples_pleases_it_more(models):
    """Best of four: more P(yes) by the mean of the two answers' logarithms than plain sampling of the same requests, four times the
    calls; one particle asks no judge; several without a judge are refused."""
    student, judge, examples = tiny_dit(1), tiny_judge(3), held_out(16, 0, EDIT_TYPES)
    pleased = lambda **given: ask_judge(judge, examples, *edit_examples(student, examples, **given)).log().mean().item()
    plain = pleased()
    for strength in (0.0, 1.0):
        assert pleased(search="samples", judge=judge, particles=4, strength=strength) > plain
    assert cells.use(student, [judge], judge, 8, 0, 1.0, study.WAYS["FK of 4"])["calls_per_edit"] == 16
    assert torch.equal(edit_examples(student, examples)[1], edit_examples(student, examples, search="samples", judge=judge, particles=1, strength=1.0)[1])
    with pytest.raises(ValueError, match="search is 'samples', and no judge says what pleases"):
        edit_examples(student, examples, search="samples", particles=4)
    with pytest.raises(ValueError, match="unknown search 'luck'; known: samples, noise"):
        edit_examples(student, examples, search="luck", judge=judge)


def test_noise_that_pleases_the_judge_is_found(models):
    """ReNO: more P(yes) than its start, which is a single call; no weight gathers a gradient; nobody to please and several calls are refused."""
    student, judge, examples = tiny_dit(1), tiny_judge(3), held_out(16, 0, EDIT_TYPES)
    pleased = lambda **given: ask_judge(judge, examples, *edit_examples(student, examples, steps=1, **given)).log().mean().item()
    assert pleased(search="noise", judge=judge, descents=15) > pleased() + 1e-3
    assert all(p.grad is None for p in (*student.parameters(), *judge.parameters()))
    assert cells.use(student, [judge], judge, 8, 0, 1.0, study.WAYS["ReNO"])["calls_per_edit"] == 21
    with pytest.raises(ValueError, match="the noise of one call"):
        edit_examples(student, examples, steps=4, search="noise", judge=judge, descents=2)


# --- the table's arithmetic, and the command


def test_errors_are_over_seeds_and_never_below_those_over_requests():
    """Of 96 edits, success .25, eight types: the binomial .0442, and a type's of twelve; two seeds that agree have no less, since the requests are the
    same; two far apart half their distance. A PSNR's error is over edits, or over seeds where that is more; a gap's over seeds alone."""
    kinds = {f"success_{k}": 0.5 for k in "abcdefgh"}
    row = lambda seed, success, psnr=30.0: {"arm": "a", "seed": seed, "updates": 2, "n": 96, "calls": 5, "success": success, "keep_psnr": psnr, "keep_psnr_se": 0.2, "hacking_gap": 0.1 * seed} | kinds
    one, alike, apart = (study.summarize([row(i, *s) for i, s in enumerate(given)])[0] for given in (((0.25,),), ((0.25,), (0.25,)), ((0.1, 29), (0.3, 31))))
    assert one["success_se"] == alike["success_se"] == pytest.approx((0.25 * 0.75 / 96) ** 0.5) and one["success_a_se"] == pytest.approx((0.25 / 12) ** 0.5)
    assert one["keep_psnr_se"] == alike["keep_psnr_se"] == pytest.approx(0.2) and "hacking_gap_se" not in one and "calls_se" not in alike
    assert apart["success_se"] == pytest.approx(0.1) and apart["keep_psnr_se"] == pytest.approx(1) and alike["hacking_gap_se"] == pytest.approx(0.05)


def test_the_list_names_every_study_and_arm(capsys, tmp_path):
    assert main(["study", "list", "--json", str(tmp_path / "list.json")]) == 0
    said, listed = capsys.readouterr().out, json.loads((tmp_path / "list.json").read_text())
    assert {k: v["arms"] for k, v in listed.items()} == {k: list(s.arms) for k, s in study.STUDIES.items()}
    assert all(name in said for s in study.STUDIES.values() for name in s.arms)
    assert not any("," in name for s in study.STUDIES.values() for name in s.arms)  # --arms splits there


@pytest.mark.parametrize("words, message", ((["studdy"], "unknown study 'studdy'"), (["objective", "--jobs", "0"], "--jobs is 0"), (["objective", "--set", "lr"], "--set lr: write key=value")))
def test_the_command_refuses_with_one_message(words, message, capsys, tmp_path):
    assert main(["study", *words, "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_study_that_was_not_run_says_how(tmp_path):
    with pytest.raises(InputError, match="study 'unroll' has not been run; run it: vlmedit study unroll"):
        study.read("unroll", tmp_path)
