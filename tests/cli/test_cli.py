"""The command line on real files, with a small pipeline of random weights: results, reports, exit codes, and nothing written on bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from helpers.foreign import draw_all
from PIL import Image, ImageDraw

import vlmedit
from vlmedit import doctor
from vlmedit.cli import main
from vlmedit.cli._settings import convert, typed
from vlmedit.cli._shared import Tier
from vlmedit.config import TIERS
from vlmedit.data.batches import TEXT_LENGTH
from vlmedit.errors import ConfigError
from vlmedit.io import load_picture
from vlmedit.methods.judge import JudgeConfig, build_judge
from vlmedit.methods.npedit import NPEditConfig
from vlmedit.methods.teacher import TeacherConfig, train_teacher
from vlmedit.training.run import Step
from vlmedit.world.edits import EDIT_TYPES


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A saved pipeline of random weights. The editor's output projection is not zero, so that instructions and noise matter."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from vlmedit.networks.dit import DiT
    from vlmedit.pipelines.shapes import EditPipeline
    from vlmedit.world.tokenizer import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    dit = DiT(side=32, vocab_size=len(tokenizer), text_length=TEXT_LENGTH)
    with torch.no_grad():
        for p in dit.parameters():
            if p.ndim > 1 and not p.any():
                p.normal_(std=0.05)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True)
    folder = tmp_path_factory.mktemp("model")
    EditPipeline(dit.eval(), scheduler, tokenizer, build_judge("small", 32).eval()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipe(model):
    return vlmedit.load(model)


@pytest.fixture(scope="session")
def foreign(tmp_path_factory):
    return draw_all(tmp_path_factory.mktemp("drawings"))


@pytest.fixture
def drawing(tmp_path) -> Path:
    """A red circle and a blue square on white, 160 x 120."""
    image = Image.new("RGB", (160, 120), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 30, 76, 86), fill="crimson")
    draw.rectangle((92, 40, 140, 88), fill="royalblue")
    image.save(tmp_path / "drawing.png")
    return tmp_path / "drawing.png"


def array(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def edit(source, instruction, out, model, *options) -> int:
    words = [] if instruction is None else [instruction]
    return main(["edit", str(source), *words, "--out", str(out), "--model", str(model), *map(str, options)])


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def test_edit_writes_the_pipelines_edit_at_the_inputs_size(tmp_path, drawing, model, pipe):
    out = tmp_path / "deep" / "edited.png"
    assert edit(drawing, "make the circle green", out, model, "--seed", 3, "--steps", 2) == 0
    picture = load_picture(drawing)
    expected = pipe(picture.view, "make the circle green", num_inference_steps=2, seed=3).images[0]
    assert Image.open(out).size == (160, 120)
    assert (array(out) == np.asarray(picture.restore(expected))).all()
    assert files(tmp_path / "deep") == {"edited.png"}


def test_seed_and_steps_do_what_they_say(tmp_path, drawing, model):
    runs = {"a": (0, 2), "again": (0, 2), "seed": (1, 2), "steps": (0, 3)}
    for name, (seed, steps) in runs.items():
        assert edit(drawing, "make the circle green", tmp_path / f"{name}.png", model, "--seed", seed, "--steps", steps) == 0
    a, again, seed, steps = (array(tmp_path / f"{n}.png") for n in runs)
    assert (a == again).all() and (a != seed).any() and (a != steps).any()


@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_output_format_follows_the_name(tmp_path, drawing, model, ending):
    assert edit(drawing, "make the circle green", tmp_path / f"e.{ending}", model, "--steps", 1) == 0
    assert Image.open(tmp_path / f"e.{ending}").format == {"jpg": "JPEG", "webp": "WEBP"}[ending]


def test_report_holds_the_judges_answers_and_a_strip(tmp_path, drawing, model, pipe):
    out = tmp_path / "out" / "e.png"
    assert edit(drawing, "remove the circle", out, model, "--report", "--num-samples", 2, "--json", tmp_path / "all.json") == 0
    assert files(out.parent) == {"e-1.png", "e-2.png", "e.json", "e-strip.png"}
    report = json.loads((out.parent / "e.json").read_text())
    view = load_picture(drawing).view
    answers = pipe.ask(view, pipe(view, "remove the circle", seed=0, num_samples=2).images, "remove the circle")
    assert report["judge"]["p_edit"] == pytest.approx(answers.p_edit.tolist(), abs=2e-4)
    assert report["judge"]["p_identity"] == pytest.approx(answers.p_identity.tolist(), abs=2e-4)
    assert report["judge"]["edit_question"]["right_answer"] == "no" and report["edit"] == {"type": "remove", "shape": "circle"}
    assert json.loads((tmp_path / "all.json").read_text())["edits"] == [report]
    strip = Image.open(out.parent / "e-strip.png")
    assert strip.width > 3 * 150 and strip.height > 192


def test_first_of_several_samples_is_the_single_one(tmp_path, drawing, model):
    assert edit(drawing, "make the circle green", tmp_path / "one.png", model) == 0
    assert edit(drawing, "make the circle green", tmp_path / "n.png", model, "--num-samples", 3) == 0
    many = [array(tmp_path / f"n-{k}.png") for k in (1, 2, 3)]
    assert np.abs(many[0] - array(tmp_path / "one.png")).max() <= 1  # batches of 1 and 3 may round differently
    assert (many[0] != many[1]).any() and (many[1] != many[2]).any()


def test_best_of_keeps_what_the_judge_likes_best(tmp_path, drawing, model):
    assert edit(drawing, "make the circle green", tmp_path / "n.png", model, "--num-samples", 4, "--report") == 0
    assert edit(drawing, "make the circle green", tmp_path / "best.png", model, "--best-of", 4, "--json", tmp_path / "best.json") == 0
    judge = json.loads((tmp_path / "n.json").read_text())["judge"]
    best = int(np.argmax(np.multiply(judge["p_edit"], judge["p_identity"])))
    record = json.loads((tmp_path / "best.json").read_text())["edits"][0]
    assert record["picked"] == best
    assert record["judge"]["p_edit"] == pytest.approx([judge["p_edit"][best]], abs=2e-3)  # before and after rounding to 8 bits
    assert (array(tmp_path / "best.png") == array(tmp_path / f"n-{best + 1}.png")).all()


def test_folder_and_manifest_give_each_pictures_own_edit(tmp_path, foreign, model):
    """Whatever else is in the folder or the manifest, a picture's edit is the one it gets alone."""
    folder = tmp_path / "in"
    folder.mkdir()
    chosen = [f for f in foreign if f.edit.type == "background" and f.edit.background == "black"][:2] or pytest.fail("no drawing")
    for f in chosen:
        shutil.copy(f.path, folder)
    assert edit(folder, "make the background black", tmp_path / "out", model, "--steps", 1) == 0
    assert files(tmp_path / "out") == {f"{f.path.stem}.png" for f in chosen}
    lines = [json.dumps({"image": f.path.name, "instruction": f.instruction}) for f in foreign[:7]]
    shutil.copytree(foreign[0].path.parent, tmp_path / "list")
    (tmp_path / "list" / "m.jsonl").write_text("\n".join(lines))
    assert edit(tmp_path / "list" / "m.jsonl", None, tmp_path / "listed", model, "--steps", 1, "--json", tmp_path / "m.json") == 0
    assert len(files(tmp_path / "listed")) == 7
    records = json.loads((tmp_path / "m.json").read_text())["edits"]
    assert [r["instruction"] for r in records] == [f.instruction for f in foreign[:7]]
    for f, record in zip(foreign[:3], records):
        assert edit(f.path, f.instruction, tmp_path / "alone.png", model, "--steps", 1) == 0
        assert (array(tmp_path / "alone.png") == array(record["outputs"][0])).all()


# Bad input


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is an error: every check has to come before it."""
    monkeypatch.setattr(vlmedit, "load", lambda *a, **k: pytest.fail("the model was loaded before the input was checked"))


def test_the_guard_against_loading_guards(tmp_path, drawing, model, no_model):
    """A good edit gets as far as the model and is stopped there: the tests below would see one that is loaded too early."""
    with pytest.raises(pytest.fail.Exception, match="before the input was checked"):
        edit(drawing, "do nothing", tmp_path / "e.png", model)


BAD_EDITS = {
    "unknown word": (["make the cirle red"], ["unknown word 'cirle' (nearest: circle", "Known instructions:"]),
    "order": (["red circle the make"], ["not in a known order", "Known instructions:"]),
    "empty": ([""], ["the instruction is empty"]),
    "no such thing": (["make the triangle red"], ["there is no triangle", "red circle", "--force"]),
    "no change": (["make the circle red"], ["the circle is red already"]),
    "steps": (["do nothing", "--steps", "0"], ["--steps is 0; it must be at least 1"]),
    "samples": (["do nothing", "--num-samples", "0"], ["--num-samples is 0"]),
    "both": (["do nothing", "--num-samples", "2", "--best-of", "2"], ["choose one"]),
    "several": (["make the cirle red", "--steps", "0", "--seed", "-1"], ["3 problems", "'cirle'", "--steps is 0", "--seed is -1"]),
    "unknown option": (["do nothing", "--step", "3"], ["--step"]),
}


@pytest.mark.parametrize("case", BAD_EDITS)
def test_bad_edits_are_told_before_the_model_is_loaded(tmp_path, drawing, model, no_model, capsys, case):
    options, told = BAD_EDITS[case]
    before = files(tmp_path)
    assert main(["edit", str(drawing), *options, "--out", str(tmp_path / "out" / "e.png"), "--model", str(model)]) == 2
    said = capsys.readouterr()
    for words in told:
        assert words in said.err + said.out
    assert files(tmp_path) == before


def test_force_tries_what_the_picture_seems_not_to_allow(tmp_path, drawing, model):
    assert edit(drawing, "make the triangle red", tmp_path / "e.png", model, "--steps", 1, "--force") == 0


def test_the_oracle_does_not_refuse_what_it_cannot_read(tmp_path, model):
    """A photograph-like picture is far from every render, so no edit of it is called impossible."""
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((100, 100), Image.Resampling.BICUBIC).save(tmp_path / "noise.png")
    assert edit(tmp_path / "noise.png", "make the triangle red", tmp_path / "e.png", model, "--steps", 1) == 0


def test_no_possible_edit_of_a_foreign_drawing_is_refused(foreign):
    """The oracle's reading says no only where there is reason to: every drawing's own edit passes, and an edit of a thing
    that is not there does not."""
    from vlmedit.io import Request
    from vlmedit.pipelines.batch_edit import impossible
    from vlmedit.world.edits import Edit
    from vlmedit.world.scene import SHAPES

    ready = [(Request(f.path, f.instruction, str(f.path)), load_picture(f.path), f.edit) for f in foreign]
    assert impossible(ready) == []
    absent = [next(s for s in SHAPES if s not in {t.shape for t in f.scene.things}) for f in foreign]
    wrong = [(r, p, Edit("recolor", shape=s, color="red")) for (r, p, _), s in zip(ready, absent)]
    assert len(impossible(wrong)) >= 70


def test_a_manifests_problems_are_told_at_once(tmp_path, drawing, model, no_model, capsys):
    (tmp_path / "cut.png").write_bytes(drawing.read_bytes()[:200])
    entries = [
        {"image": "drawing.png", "instruction": "make the circle green"},
        {"image": "gone.png", "instruction": "do nothing"},
        {"image": "cut.png", "instruction": "do nothing"},
        {"image": "drawing.png", "instruction": "paint it blak"},
        {"image": "drawing.png", "instruction": "remove the cross"},
        {"image": "drawing.png"},
        {"image": "drawing.png", "instruction": "mak the circle red"},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, entries)))
    before = files(tmp_path)
    assert edit(tmp_path / "m.jsonl", None, tmp_path / "out", model) == 2
    said = capsys.readouterr().err
    assert "6 problems" in said and "line 1" not in said and said.count("Known instructions:") == 1
    for number, words in {2: "no such file", 3: "damaged", 4: "'blak'", 5: "there is no cross", 6: "'instruction' is missing", 7: "'mak'"}.items():
        (line,) = [text for text in said.splitlines() if f"line {number}:" in text]
        assert words in line
    assert files(tmp_path) == before


def test_a_manifest_takes_no_instruction(tmp_path, drawing, model, no_model, capsys):
    (tmp_path / "m.jsonl").write_text(json.dumps({"image": "drawing.png", "instruction": "do nothing"}))
    assert edit(tmp_path / "m.jsonl", "do nothing", tmp_path / "out", model) == 2
    assert "carries its own instructions" in capsys.readouterr().err


@pytest.mark.parametrize("out, told", [("e.gif", "unknown ending '.gif'"), ("e", "unknown ending ''"), ("drawing.png/e.png", "not a folder"), ("drawing.png", "would replace an input"), ("", "a folder")])
def test_bad_places_for_the_result(tmp_path, drawing, model, no_model, capsys, out, told):
    before = drawing.read_bytes()
    assert edit(drawing, "do nothing", tmp_path / out, model) == 2
    assert told in capsys.readouterr().err and drawing.read_bytes() == before


def test_full_disk_is_told_before_and_during_the_work(tmp_path, drawing, model, capsys, monkeypatch):
    out = tmp_path / "out" / "e.png"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        patch.setattr(vlmedit, "load", lambda *a, **k: pytest.fail("the model was loaded before the disk was checked"))
        assert edit(drawing, "do nothing", out, model) == 2
    assert "disk is full" in capsys.readouterr().err and not out.parent.exists()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert edit(drawing, "do nothing", out, model, "--steps", 1) == 2
    assert "disk is full" in capsys.readouterr().err and not list(out.parent.iterdir())


def test_bad_models_are_told(tmp_path, drawing, model, capsys):
    assert edit(drawing, "do nothing", tmp_path / "e.png", tmp_path / "nowhere") == 2
    assert "no such shipped model" in capsys.readouterr().err
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = next((broken / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    assert edit(drawing, "do nothing", tmp_path / "e.png", broken) == 2
    assert "cannot be loaded" in capsys.readouterr().err and not (tmp_path / "e.png").exists()


@pytest.mark.parametrize("command, code", [(["edit", "gone.png", "make the cirle red", "--out", "e.png"], 2), (["data", "--out", "d", "--n", "0"], 2), (["nothing"], 2), (["--help"], 0), (["data", "--out", "d", "--n", "2"], 0)])
def test_exit_codes_of_the_real_command(tmp_path, command, code):
    """In a process of its own: the exit code, and never a traceback."""
    root = str(Path(vlmedit.__file__).parents[1])
    done = subprocess.run([sys.executable, "-m", "vlmedit.cli", *command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code == 2 and command[0] == "edit":
        assert "gone.png: no such file" in done.stderr and "'cirle'" in done.stderr


def test_bugs_are_not_disguised_as_bad_input(monkeypatch, drawing, model, tmp_path):
    """Only known errors become messages: a ValueError from inside stays a traceback."""
    import vlmedit.pipelines.batch_edit

    def broken(*args):
        raise ValueError("a bug")

    monkeypatch.setattr(vlmedit.pipelines.batch_edit, "carry_out", broken)
    with pytest.raises(ValueError, match="a bug"):
        edit(drawing, "do nothing", tmp_path / "e.png", model)


# data


@pytest.mark.parametrize("task", ["unpaired", "captioned", "paired"])
def test_data_writes_examples(tmp_path, task):
    assert main(["data", "--out", str(tmp_path / "d"), "--n", "5", "--task", task, "--json", str(tmp_path / "d.json")]) == 0
    lines = [json.loads(text) for text in (tmp_path / "d" / "data.jsonl").read_text().splitlines()]
    pictures = {v for line in lines for k, v in line.items() if k in ("image", "target")}
    assert len(lines) == 5 and files(tmp_path / "d") == pictures | {"data.jsonl", "contact.png"}
    assert len(pictures) == (10 if task == "paired" else 5)  # the no-pair data holds no picture but the references
    assert json.loads((tmp_path / "d.json").read_text())["n"] == 5
    keys = {"unpaired": {"instruction", "target_caption", "edit_question", "identity_answer"}, "captioned": {"caption"}, "paired": {"instruction", "target"}}
    assert keys[task] <= set(lines[0])


def test_data_repeats_and_is_a_manifest(tmp_path, model):
    for name in "ab":
        assert main(["data", "--out", str(tmp_path / name), "--n", "4", "--seed", "7"]) == 0
    assert (tmp_path / "a/data.jsonl").read_text() == (tmp_path / "b/data.jsonl").read_text()
    assert edit(tmp_path / "a" / "data.jsonl", None, tmp_path / "out", model, "--steps", 1, "--force") == 0
    assert len(files(tmp_path / "out")) == 4


def test_data_keeps_what_is_there(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["data", "--out", str(tmp_path), "--n", "2"]) == 2
    assert "not empty" in capsys.readouterr().err and files(tmp_path) == {"mine.txt"}


# eval


def test_eval_writes_the_metrics(tmp_path, model):
    pytest.importorskip("vlmedit.evaluation.editing")
    assert main(["eval", "--json", str(tmp_path / "e.json"), "--n", "16", "--steps", "1", "--seed", "2", "--checkpoint", str(model)]) == 0
    found = json.loads((tmp_path / "e.json").read_text())
    assert {"success", "success_by_type", "keep_psnr", "manifold_psnr", "hacking_gap", "judge_p_yes", "seconds"} <= set(found)
    assert (found["n"], found["seed"], found["steps"], found["checkpoint"]) == (16, 2, 1, str(model))
    assert set(found["success_by_type"]) == set(EDIT_TYPES) and set(found["judge_p_yes"]) == {"edit", "identity"}
    assert 0 <= found["success"] <= 0.5  # random weights edit nothing


def test_eval_tells_all_problems(tmp_path, capsys):
    assert main(["eval", "--n", "0", "--steps", "0", "--checkpoint", str(tmp_path / "nowhere")]) == 2
    said = capsys.readouterr().err
    assert "--n is 0" in said and "--steps is 0" in said and "--checkpoint" in said


# train


@pytest.fixture
def stages(monkeypatch):
    """The stage registry with the teacher alone; returns it, to be added to."""
    from vlmedit import methods

    known = {"teacher": (TeacherConfig, train_teacher)}
    monkeypatch.setattr(methods, "names", lambda: list(known))
    monkeypatch.setattr(methods, "find", known.__getitem__)
    return known


def test_train_a_stage(tmp_path, stages):
    run = tmp_path / "run"
    assert main(["train", "teacher", "--tier", "smoke", "--out", str(run), "--json", str(tmp_path / "t.json"), "--set", "seed=3", "lr=1e-3"]) == 0
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["updates"] == 2 and found["metrics"]["loss"] > 0 and found["config"]["lr"] == 1e-3 and found["config"]["seed"] == 3
    assert (run / "model" / "config.json").is_file()
    config = json.loads((run / "config.json").read_text())
    assert config == found["config"]


def test_train_takes_a_config_file_and_set_wins(tmp_path, stages):
    (tmp_path / "c.yaml").write_text("lr: 1e-3\nbatch: 3\nbetas: [0.8, 0.9]\n")
    options = ["--tier", "smoke", "--out", str(tmp_path / "run"), "--config", str(tmp_path / "c.yaml"), "--json", str(tmp_path / "t.json")]
    assert main(["train", "teacher", *options, "--set", "batch=2"]) == 0
    config = json.loads((tmp_path / "t.json").read_text())["config"]
    assert (config["lr"], config["batch"], config["betas"]) == (1e-3, 2, [0.8, 0.9])


BAD_TRAINING = {
    "stage": (["techer"], "unknown stage 'techer' (nearest: teacher)"),
    "key": (["teacher", "--set", "learning_rate=1"], "unknown config key 'learning_rate'"),
    "near key": (["teacher", "--set", "bach=1"], "batch"),
    "type": (["teacher", "--set", "steps=many"], "steps is 'many'; it must be int"),
    "fraction": (["teacher", "--set", "steps=2.5"], "steps is '2.5'"),
    "value": (["teacher", "--set", "steps=0"], "steps is 0; it must be at least 1"),
    "pair": (["teacher", "--set", "steps"], "write key=value"),
    "no config": (["teacher", "--config", "gone.yaml"], "gone.yaml: cannot be read (no such file)"),
    "tier": (["teacher", "--tier", "desktop"], "desktop"),
}


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_bad_settings_are_told(tmp_path, stages, capsys, case):
    options, told = BAD_TRAINING[case]
    assert main(["train", *options, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert told in said.err + said.out and not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_config_is_told(tmp_path, stages, capsys):
    options = ["train", "teacher", "--tier", "smoke", "--out", str(tmp_path / "run")]
    assert main(options) == 0
    assert main([*options, "--set", "lr=0.5"]) == 2
    assert "belongs to another configuration" in capsys.readouterr().err


def test_interrupting_says_how_to_go_on(tmp_path, stages, capsys):
    def interrupted(config):
        yield Step(1, config.steps, {"loss": 1.0})
        raise KeyboardInterrupt

    stages["teacher"] = (TeacherConfig, interrupted)
    assert main(["train", "teacher", "--tier", "smoke", "--out", str(tmp_path / "run")]) == 130
    said = capsys.readouterr().err
    assert "stopped after update 1 of 2; the same command resumes" in said and str(tmp_path / "run") in said


def test_main_job_trains_evaluates_and_reports(tmp_path, model, monkeypatch, capsys):
    """The whole job at its smallest, from random models in place of the shipped ones."""
    import vlmedit.experiments.live

    asked = []

    def checkpoint(family, role):
        asked.append(role)
        return model / ("judge" if role == "judge" else "transformer")

    monkeypatch.setattr(vlmedit.experiments.live, "checkpoint", checkpoint)
    run = tmp_path / "run"
    assert main(["train", "--tier", "smoke", "--out", str(run), "--set", "seed=5", "--json", str(tmp_path / "m.json")]) == 0
    found = json.loads((tmp_path / "m.json").read_text())
    assert {"judge", "teacher", "warm"} <= set(asked)
    assert found["updates"] == 2 and found["config"]["seed"] == 5 and 0 <= found["metrics"]["live"]["success"] <= 1
    assert {"metrics.json", "edits.png", "config.json", "model"} <= files(run)
    assert main(["train", "--tier", "smoke", "--out", str(run), "--set", "sed=5"]) == 2
    assert "unknown config key 'sed'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "value, kind, expected",
    [("3", int, 3), (3.0, int, 3), ("1e-3", float, 1e-3), (2, float, 2.0), ("true", bool, True), (False, bool, False), ("a", str, "a"),
     ("0.9, 0.99", tuple[float, float], (0.9, 0.99)), ([1, 2], tuple[int, ...], (1, 2)), ("none", int | None, None), ("4", int | None, 4)],
)  # fmt: skip
def test_settings_take_their_fields_type(value, kind, expected):
    assert convert("x", value, kind) == expected and type(convert("x", value, kind)) is type(expected)


@pytest.mark.parametrize("value, kind", [("x", int), ("1.5", int), (True, int), ("yes", bool), ([1], tuple[float, float]), ("a,b", tuple[float, float]), ("none", int)])
def test_settings_of_another_type_are_refused(value, kind):
    with pytest.raises(ConfigError, match="x is "):
        convert("x", value, kind)


def test_every_setting_of_a_saved_config_comes_back():
    """A run folder's config.json, given with --config, makes the same configuration."""
    for config in (TeacherConfig(lr=0.1), JudgeConfig(size="small"), NPEditConfig.make(side=16, emphasis=("move",), judge=("a", "b"))):
        loaded = json.loads(json.dumps(config.flat()))
        assert config.make(**typed(type(config), loaded)) == config


def test_the_tiers_of_the_command_line_are_the_configs():
    assert get_args(Tier) == TIERS


# doctor


def test_doctor_tells_missing_and_damaged_checkpoints(tmp_path, model):
    for role in doctor.ROLES:
        shutil.copytree(model / ("judge" if role == "judge" else "transformer"), tmp_path / "shapes" / role)
    assert all(c.ok for c in doctor.checkpoints(tmp_path))
    weights = next((tmp_path / "shapes" / "warm").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:50])
    shutil.rmtree(tmp_path / "shapes" / "judge")
    found = {c.name: c for c in doctor.checkpoints(tmp_path)}
    assert [c.ok for c in found.values()] == [True, True, False, False]
    assert "damaged" in found["checkpoint warm"].detail and "not found" in found["checkpoint judge"].detail


def test_doctor_fails_when_a_check_fails(tmp_path, monkeypatch, capsys):
    bad = [doctor.Check("python", True, "3.11"), doctor.Check("disk", False, "0.0 GB free here; 1 GB are needed")]
    monkeypatch.setattr(doctor, "examine", lambda timed: bad)
    assert main(["doctor", "--quick", "--json", str(tmp_path / "d.json")]) == 1
    assert capsys.readouterr().out.splitlines() == ["OK    python: 3.11", "FAIL  disk: 0.0 GB free here; 1 GB are needed"]
    assert json.loads((tmp_path / "d.json").read_text())["ok"] is False


def test_doctor_checks_versions_against_declared_bounds(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["torch>=99", "numpy>=1", "no-such-package>=1", "unused>=1; extra == 'gpu'"])
    found = {c.name: c for c in doctor.packages()}
    assert not found["torch"].ok and ">=99" in found["torch"].detail and found["numpy"].ok
    assert not found["no-such-package"].ok and "unused" not in found


def test_doctor_tells_which_extras_are_there(monkeypatch):
    """What is missing is no failure, what is too old is; an extra within an extra is not looked up as a package."""
    declared = ["torch>=2", "einops>=99; extra == 'train'", "no-such-package>=1; extra == 'notebooks'", "vlmedit[train]; extra == 'notebooks'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: declared)
    train, notebooks, data = doctor.extras()
    assert not train.ok and "einops" in train.detail and ">=99 is needed; pip install 'vlmedit[train]'" in train.detail
    assert notebooks.ok and notebooks.detail == "not installed: no-such-package; pip install 'vlmedit[notebooks]'"
    assert data.ok and data.detail == "there" and "torch" not in train.detail


def test_doctor_measures_durations_of_every_stage(monkeypatch):
    """Each registered stage makes real updates from random models."""
    monkeypatch.setattr(doctor, "PATIENCE", float("inf"))
    from vlmedit import methods

    (check,) = doctor.durations(("smoke",))
    assert check.ok and set(check.values["minutes"]) == set(methods.names()) and all(m >= 0 for m in check.values["minutes"].values())


def test_doctor_tells_a_stage_that_fails(stages):
    def broken(config):
        raise RuntimeError("no kernel for this card")
        yield

    stages["sft"] = (TeacherConfig, broken)
    (check,) = doctor.durations(("smoke",))
    assert not check.ok and "sft fails (RuntimeError: no kernel for this card)" in check.detail and set(check.values["minutes"]) == {"teacher"}


def test_doctor_does_not_wait_for_ever(monkeypatch, stages):
    monkeypatch.setattr(doctor, "PATIENCE", -1.0)
    (check,) = doctor.durations(("smoke",))
    assert check.ok and check.detail == "teacher not timed: this machine is slow or busy"


def test_doctor_times_updates_without_the_first():
    def paced(config):
        for k in range(config.steps):
            time.sleep(2.0 if k == 0 else 0.05)
            yield Step(k + 1, config.steps, {})

    assert 0.04 < doctor.stage_seconds(TeacherConfig(steps=5), paced) < 0.6  # the first two seconds are left out, though a busy machine may oversleep


def test_training_without_the_models_it_starts_from_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "npedit", "--tier", "smoke", "--set", "student=nowhere"]) == 2
    said = capsys.readouterr().err
    assert "3 problems" in said and "student is 'nowhere'" in said and "vlmedit train judge" in said and not files(tmp_path)
