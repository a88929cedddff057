"""`vlmedit edit` with exported editors of real classes: the pipeline's own picture, any size and any words, one error each for what cannot be."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig
from PIL import Image

from vlmedit.cli import main, read_settings, typed
from vlmedit.real import editor
from vlmedit.real.backbones import Channels, family_of, load_transformer, widen
from vlmedit.real.export import ABOUT, CODE, LORA_FILE, export
from vlmedit.real.rehearsal import made
from vlmedit.real.roles import lora_targets
from vlmedit.real.settings import CONFIGS, RealConfig

WORDS = "turn the sky into a nest of colours"  # no instruction of the miniature
SIZE = (90, 50)


def perturb(parameters) -> None:
    with torch.no_grad():
        for i, p in enumerate(parameters):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))


@pytest.fixture(scope="module")
def editors(tmp_path_factory):
    """Exported folders of runs whose students are random, made when they are first asked for. Not to be written to."""
    folder, found = tmp_path_factory.mktemp("editors"), {}

    def make(backbone: str, kind: str = "full") -> Path:
        if (backbone, kind) in found:
            return found[backbone, kind]
        place = made(f"tiny:{backbone}", folder, "backbone")
        own = dict(
            backbone=place, text_length=160 if backbone == "qwen-image" else 64, buckets=["128x128" if backbone == "flux2" else "64x64"], sampler_steps=2, sampler_shift=3.0,
            roles="adapters" if kind == "adapter" else "modules",
        )  # fmt: skip
        run = folder / f"{backbone}-{kind}-run"
        run.mkdir()
        RealConfig.make("laptop", **typed(RealConfig, {**read_settings(CONFIGS / "tiny.yaml"), **own})).save(run / "config.json")
        transformer = load_transformer(place, "transformer")
        if kind == "adapter":
            transformer.add_adapter(LoraConfig(r=2, target_modules=lora_targets(transformer)))
            perturb(p for n, p in transformer.named_parameters() if "lora" in n)
            transformer.save_lora_adapter(run / "model")
        else:
            transformer = widen(transformer) if issubclass(family_of(type(transformer).__name__), Channels) else transformer
            perturb(transformer.parameters())
            transformer.save_pretrained(run / "model")
        found[backbone, kind] = export(run, folder / f"{backbone}-{kind}", kind, torch.float32)
        return found[backbone, kind]

    return make


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> str:
    return made("tiny:qwen2.5-vl", tmp_path_factory.mktemp("judge"), "judge")


@pytest.fixture
def photo(tmp_path) -> Path:
    pixels = torch.randint(0, 256, (5, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(7)).numpy()
    Image.fromarray(pixels).resize(SIZE, Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def edit(source, words, out, model, *options) -> int:
    return main(["edit", str(source), *([words] if words else []), "--out", str(out), "--model", str(model), *map(str, options)])


def array(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def by_the_card(folder: Path, photo: Path, size: tuple[int, int], seed: int) -> Image.Image:
    """The picture that the card's own program draws."""
    program = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    for there, here in (("THIS_FOLDER", str(folder)), ("dog.png", str(photo)), ("(512, 512)", f"{size}, 1"), ("make the dog red", WORDS)):  # 1: Lanczos
        assert there in program
        program = program.replace(there, here)
    lines, names = program.strip().split("\n"), {}
    assert lines[-1].startswith("edited = ") and "vlmedit" not in program.replace(str(folder), "")
    exec("\n".join(lines[:-1]), names)
    torch.manual_seed(seed)
    exec(lines[-1], names)
    return names["edited"]


EDITORS = [("flux", "full"), ("flux", "adapter"), ("flux2", "full"), ("z-image", "full"), ("z-image", "adapter"), ("qwen-image", "full"), ("sd3", "full"), ("sana", "full")]


@pytest.mark.parametrize("backbone, kind", EDITORS)
def test_an_edit_is_the_pipelines_own(editors, photo, tmp_path, backbone, kind):
    """A picture that is no square comes back at its own size, and equals what the program in the card draws at the working size after
    `torch.manual_seed(seed)`."""
    folder = editors(backbone, kind)
    assert edit(photo, WORDS, tmp_path / "e.png", folder, "--seed", 3, "--json", tmp_path / "r.json") == 0
    record = json.loads((tmp_path / "r.json").read_text())["edits"][0]
    exported = editor.find(str(folder))
    size = tuple(record["drawn_at"])
    assert record["steps"] == 2 and size == exported.working_size(*SIZE) and all(side % exported.multiple == 0 for side in size)
    assert abs(size[0] * size[1] / exported.pixels - 1) < 0.15 and abs(size[0] / size[1] / 1.8 - 1) < 0.15
    own = by_the_card(folder, photo, size, 3)
    assert own.size == size and array(tmp_path / "e.png").std() > 2
    assert (array(tmp_path / "e.png") == np.asarray(own.resize(SIZE, Image.Resampling.LANCZOS))).all()


def test_folders_manifests_samples_and_going_on(editors, photo, tmp_path, capsys):
    """A picture's edit is the same alone, in a folder of several sizes and in a manifest; sample 1 is the single edit, the others are different;
    steps, seed, instruction and --side matter; what is there already is left alone when asked."""
    folder = editors("z-image")
    assert edit(photo, WORDS, tmp_path / "one.png", folder) == 0
    many = tmp_path / "many"
    many.mkdir()
    shutil.copy(photo, many / "a.png")
    Image.open(photo).crop((0, 0, 30, 44)).save(many / "b.jpg")
    lines = [{"image": f"many/{name}", "instruction": words} for name, words in (("a.png", WORDS), ("a.png", "do something else"))]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert edit(many, WORDS, tmp_path / "out", folder, "--num-samples", 2, "--report", "--json", tmp_path / "f.json") == 0
    assert edit(tmp_path / "m.jsonl", None, tmp_path / "listed", folder) == 0
    one = array(tmp_path / "one.png")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f"{n}{e}" for n in "ab" for e in ("-1.png", "-2.png", ".json", "-strip.png")}
    assert (array(tmp_path / "out/a-1.png") == one).all() and (array(tmp_path / "listed/0001-a.png") == one).all()
    assert np.abs(array(tmp_path / "out/a-2.png") - one).mean() > 0.5 and np.abs(array(tmp_path / "listed/0002-a.png") - one).max() > 0
    assert Image.open(tmp_path / "out/b-1.png").size == (30, 44)
    report = json.loads((tmp_path / "out/a.json").read_text())
    assert report == json.loads((tmp_path / "f.json").read_text())["edits"][0] and report["instruction"] == WORDS and "judge" not in report
    for name, options in (("steps", ("--steps", 3)), ("seed", ("--seed", 1)), ("side", ("--side", 48))):
        assert edit(photo, WORDS, tmp_path / f"{name}.png", folder, *options, "--json", tmp_path / f"{name}.json") == 0
        assert np.abs(array(tmp_path / f"{name}.png") - one).mean() > 0.5
    assert json.loads((tmp_path / "side.json").read_text())["edits"][0]["drawn_at"] == [48, 24]  # 48 x 26.7 in multiples of 8
    (tmp_path / "out/b-2.png").unlink()
    Image.new("RGB", SIZE).save(tmp_path / "out/a-1.png")
    assert edit(many, WORDS, tmp_path / "out", folder, "--num-samples", 2, "--skip-existing", "--json", tmp_path / "s.json") == 0
    assert [e.get("skipped", False) for e in json.loads((tmp_path / "s.json").read_text())["edits"]] == [True, False]
    assert array(tmp_path / "out/a-1.png").max() == 0 and (tmp_path / "out/b-2.png").is_file()
    capsys.readouterr()
    assert edit(many, WORDS, tmp_path / "out", folder, "--num-samples", 2, "--skip-existing") == 0
    assert "nothing left to do" in capsys.readouterr().err


def test_a_named_judge_reports_and_chooses(editors, judge, photo, tmp_path):
    """The report's probabilities are the judge's own, asked about reference and edit as the model drew them; --best-of keeps the sample that
    it likes best."""
    from vlmedit.models.pipeline import to_pixels
    from vlmedit.real.judges import load_judge
    from vlmedit.real.requests import Request

    folder, n = editors("z-image"), 3
    Image.open(photo).crop((0, 0, 48, 48)).resize((64, 64), Image.Resampling.BICUBIC).save(photo)  # worked at as it is: files hold what was judged
    assert edit(photo, WORDS, tmp_path / "n.png", folder, "--num-samples", n, "--report", "--judge", judge) == 0
    found = json.loads((tmp_path / "n.json").read_text())["judge"]
    asked, view = load_judge(judge), to_pixels(Image.open(photo), 64)[0]
    question, _, _, identity = Request(WORDS, "", "").questions()
    for k in range(n):
        after = to_pixels(Image.open(tmp_path / f"n-{k + 1}.png"), 64)[0]
        margins = asked.logit_margin([[view, after]] * 2, [question, identity]).sigmoid()
        assert [found["p_edit"][k], found["p_identity"][k]] == pytest.approx(margins.tolist(), abs=2e-4)
    assert found["edit_question"] == {"text": question, "right_answer": "yes"}
    scores = np.multiply(found["p_edit"], found["p_identity"])
    assert scores.std() > 0
    assert edit(photo, WORDS, tmp_path / "best.png", folder, "--best-of", n, "--judge", judge, "--json", tmp_path / "b.json") == 0
    record = json.loads((tmp_path / "b.json").read_text())["edits"][0]
    assert record["picked"] == scores.argmax() and (array(tmp_path / "best.png") == array(tmp_path / f"n-{scores.argmax() + 1}.png")).all()


def test_an_id_of_the_hub_is_its_folder(editors, photo, tmp_path, monkeypatch):
    """An editor that lies in the Hub's cache under an id edits as its folder does."""
    folder, cache = editors("z-image"), tmp_path / "cache/models--somebody--editor"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("0" * 40)
    shutil.copytree(folder, cache / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert edit(photo, WORDS, tmp_path / "id.png", "somebody/editor") == 0
    assert edit(photo, WORDS, tmp_path / "folder.png", folder) == 0
    assert (array(tmp_path / "id.png") == array(tmp_path / "folder.png")).all()


# Code that comes with a folder


def with_code(folder: Path, target: Path) -> Path:
    """A copy whose pipeline turns its pictures upside down."""
    shutil.copytree(folder, target)
    text = (target / CODE.name).read_text()
    line = "images = x if output_type"
    assert line in text
    (target / CODE.name).write_text(text.replace("        images = x if output_type", "        x = x.flip(-2)\n        images = x if output_type"))
    return target


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_changed_code_runs_only_if_it_is_trusted(editors, photo, tmp_path, capsys, kind):
    """A pipeline file that is not ours is refused before a weight is read; with --trust-remote-code it is what draws."""
    changed = with_code(editors("z-image", kind), tmp_path / "changed")
    assert edit(photo, WORDS, tmp_path / "e.png", changed) == 2
    said = capsys.readouterr().err
    assert CODE.name in said and "--trust-remote-code" in said and not (tmp_path / "e.png").exists()
    assert edit(photo, WORDS, tmp_path / "own.png", editors("z-image", kind)) == 0
    assert edit(photo, WORDS, tmp_path / "e.png", changed, "--trust-remote-code") == 0
    assert np.abs(array(tmp_path / "own.png") - array(tmp_path / "e.png")).mean() > 0.5


# Bad input


def spoil(editors, tmp_path: Path, what: str) -> tuple[Path | str, tuple]:
    """A model and options of which one thing is wrong."""
    whole, half = editors("z-image"), tmp_path / "half"
    copy = lambda kind="full": shutil.copytree(editors("z-image", kind), half)
    if what == "no editor.json":
        (copy() / ABOUT).unlink()
    elif what == "broken editor.json":
        (copy() / ABOUT).write_text('{"kind": "full"}')
    elif what == "half a transformer":
        (copy() / "transformer/diffusion_pytorch_model.safetensors").unlink()
    elif what == "no scheduler":
        shutil.rmtree(copy() / "scheduler")
    elif what == "no adapter":
        (copy("adapter") / LORA_FILE).unlink()
    elif what == "base is gone":
        about = copy("adapter") / ABOUT
        about.write_text(json.dumps({**json.loads(about.read_text()), "base": str(tmp_path / "gone")}))
    elif what == "code of a component":
        (copy() / "transformer/mine.py").write_text("print()")
    elif what == "component of another library":
        index = copy() / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), "vae": ["os", "system"]}))
    elif what == "a run":
        half.mkdir()
        (half / "config.json").write_text(json.dumps({"backbone": "x"}))
    elif what == "an id without network":
        return "nobody/nothing", ()
    else:
        return whole, {
            "force": ("--force",), "no judge": ("--best-of", "2"), "judge is gone": ("--report", "--judge", str(tmp_path / "gone")), "judge is an editor": ("--report", "--judge", str(whole)),
            "no words": (), "no steps": ("--steps", "0"), "no side": ("--side", "3"), "a huge side": ("--side", "100000"),
            "idle judge": ("--judge", made("tiny:qwen2.5-vl", tmp_path, "judge")),
        }[what]  # fmt: skip
    return half, ()


BAD = {
    "no editor.json": r"no editor that vlmedit export wrote \(it has no editor.json\)",
    "broken editor.json": r"its editor.json is not what vlmedit export writes",
    "half a transformer": r"half a model, it lacks its weights",
    "no scheduler": r"it lacks scheduler/scheduler_config.json",
    "no adapter": r"it lacks pytorch_lora_weights.safetensors",
    "base is gone": r"its base .*gone: no such folder.*editor.json names it",
    "code of a component": r"code of its own \(transformer/mine.py\), which is not run",
    "component of another library": r"code of its own \(vae of os\), which is not run",
    "a run": r"a training run of real models; .*vlmedit export",
    "an id without network": r"nobody/nothing: no such folder, and no model of the Hub that can be reached",
    "force": r"--force: .* tries every edit; leave it out",
    "no judge": r"--best-of 2: .* has no judge of its own; name one",
    "judge is gone": r"--judge: .*gone: no such folder",
    "judge is an editor": r"--judge: .*has no config.json",
    "no words": r"the instruction is empty; say what to do",
    "no steps": r"--steps is 0; it must be at least 1",
    "no side": r"--side is 3; it must be at least 16",
    "a huge side": r"--side is 100000; a real model works at 4096 pixels at most",
    "idle judge": r"--judge .*: it is asked for --report or --best-of alone",
}


@pytest.mark.parametrize("what", BAD)
def test_bad_edits_are_one_message_before_any_weight(editors, photo, tmp_path, monkeypatch, capsys, what):
    model, options = spoil(editors, tmp_path, what)
    monkeypatch.setattr(editor, "load", lambda *_: pytest.fail("a model was loaded before the input was checked"))
    assert edit(photo, None if what == "no words" else WORDS, tmp_path / "out/e.png", model, *options) == 2
    said = capsys.readouterr().err
    assert re.search(BAD[what], said) and "Traceback" not in said and " problems:" not in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, said", [(("--judge", "x/y"), "--judge"), (("--side", "64"), "--side"), (("--trust-remote-code",), "--trust-remote-code")])
def test_the_miniature_refuses_what_only_real_models_use(photo, tmp_path, folder, capsys, options, said):
    assert edit(photo, "do nothing", tmp_path / "e.png", folder / "student", *options) == 2
    assert f"{said}: " in (err := capsys.readouterr().err) and "no real model" in err


def test_what_a_real_editor_is_not_for(editors, capsys):
    """The oracle of drawn scenes cannot measure it."""
    assert main(["eval", "--checkpoint", str(editors("z-image"))]) == 2
    assert "vlmedit bench" in capsys.readouterr().err
