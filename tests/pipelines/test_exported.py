"""`vlmedit edit` with exported editors of real classes: the pipeline's own picture, any size and any words, one error each for what cannot be."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from peft import LoraConfig
from PIL import Image
from safetensors import SafetensorError

from vlmedit.cli import main
from vlmedit.cli._settings import read_settings, typed
from vlmedit.networks.backbones import family_of
from vlmedit.networks.load import load_transformer, widen
from vlmedit.networks.lora import LORA_FILE, lora_targets
from vlmedit.pipelines import export as exporting
from vlmedit.pipelines import exported as editor
from vlmedit.pipelines.export import ABOUT, CODE, export
from vlmedit.testing import random_models as tiny
from vlmedit.testing import resolve
from vlmedit.training.settings import CONFIGS, RealConfig

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

    def make(backbone: str, kind: str = "full", dtype: torch.dtype = torch.float32) -> Path:
        if dtype != torch.float32:
            make(backbone, kind)
            out = folder / f"{backbone}-{kind}-{str(dtype)[6:]}"
            return out if out.is_dir() else export(folder / f"{backbone}-{kind}-run", out, kind, dtype)
        if (backbone, kind) in found:
            return found[backbone, kind]
        place = resolve(f"tiny:{backbone}", folder, "backbone")
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
            transformer = widen(transformer) if family_of(type(transformer).__name__).widened else transformer
            perturb(transformer.parameters())
            transformer.save_pretrained(run / "model")
        found[backbone, kind] = export(run, folder / f"{backbone}-{kind}", kind, torch.float32)
        return found[backbone, kind]

    return make


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> str:
    return resolve("tiny:qwen2.5-vl", tmp_path_factory.mktemp("judge"), "judge")


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
    trained = str(tuple(int(v) for v in re.search(r"resize\(\((\d+), (\d+)\)\)", program).groups()))
    for there, here in (("THIS_FOLDER", str(folder)), ("dog.png", str(photo)), (trained, f"{size}, 1"), ("make the dog red", WORDS)):  # 1: Lanczos
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


@pytest.mark.parametrize("backbone, kind", EDITORS)
def test_the_card_runs_in_the_precision_of_the_command(editors, photo, tmp_path, backbone, kind):
    """`vlmedit export` writes bf16: the card's program, as it stands, loads that without this package and draws what float32 draws, but for
    rounding. Without a precision in it, transformers' parts would come in bf16 and diffusers' in float32, and most families would fail."""
    size = (128, 64) if backbone == "flux2" else (96, 48)
    program = (editors(backbone, kind, torch.bfloat16) / "README.md").read_text()
    assert "torch_dtype=torch.bfloat16" in program and f"resize(({'128, 128' if backbone == 'flux2' else '64, 64'}))" in program
    low = np.asarray(by_the_card(editors(backbone, kind, torch.bfloat16), photo, size, 5)).astype(float)
    high = np.asarray(by_the_card(editors(backbone, kind), photo, size, 5)).astype(float)
    assert low.shape == high.shape == (size[1], size[0], 3) and np.abs(low - high).mean() < 0.5 * high.std()
    assert np.corrcoef(low.ravel(), high.ravel())[0, 1] > 0.8


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
    from vlmedit.data.requests import Request
    from vlmedit.networks.judges import load_judge
    from vlmedit.pipelines.shapes import to_pixels

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


# To the Hub


class Hub:
    """Records what is uploaded, as the client's calls would send it."""

    def __init__(self):
        self.files, self.private = {}, None

    def create_repo(self, name, private, exist_ok):
        self.private = private
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def upload_folder(self, folder_path, repo_id, ignore_patterns):
        self.files |= {str(p.relative_to(folder_path)): p.read_bytes() for p in Path(folder_path).rglob("*") if p.is_file() and p.name not in ignore_patterns}

    def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
        self.files[path_in_repo] = path_or_fileobj


@pytest.mark.parametrize("backbone, kind", [("flux", "full"), ("z-image", "adapter")])
def test_what_is_pushed_runs_by_its_name(editors, photo, tmp_path, monkeypatch, capsys, backbone, kind):
    """A folder that was exported before is uploaded by the command; the card on the Hub runs from the repository's name alone and draws what
    the folder draws. An adapter of a base in a folder is refused until the base is named by an id."""
    hub, folder = Hub(), shutil.copytree(editors(backbone, kind), tmp_path / "copy")
    monkeypatch.setattr(exporting, "reachable", lambda: True)
    monkeypatch.setattr(exporting, "HfApi", lambda: hub)
    if kind == "adapter":
        assert main(["export", str(folder), "--push", "me/editor"]) == 2 and "a folder that nobody else has" in capsys.readouterr().err
        about = json.loads((folder / ABOUT).read_text())
        (folder / ABOUT).write_text(json.dumps({**about, "base": "me/base"}))
    assert main(["export", str(folder), "--push", "editor", "--json", str(tmp_path / "r.json")]) == 0
    assert hub.private and json.loads((tmp_path / "r.json").read_text())["address"] == "https://huggingface.co/me/editor"
    for name, content in hub.files.items():
        (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / name).write_bytes(content)
    card = hub.files["README.md"].decode()
    assert "THIS_FOLDER" not in card and "--model me/editor" in card and 'folder = snapshot_download("me/editor")' in card
    assert {p.name for p in folder.iterdir()} == {n.split("/")[0] for n in hub.files}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: {"me/editor": str(tmp_path / "there")}[name])
    (tmp_path / "there" / "README.md").write_text(card.replace('"dog.png"', '"dog.png" or "THIS_FOLDER"'))  # what by_the_card looks for
    drawn = [np.asarray(by_the_card(place, photo, (64, 48), 2)) for place in (tmp_path / "there", folder)]
    assert (drawn[0] == drawn[1]).all()


def test_the_hub_refuses(editors, tmp_path, monkeypatch, capsys):
    """No network, no login, no such owner, no name: one message, the last before anything is exported; what is exported stays, and the message
    tells how to push it."""
    folder, refusal = editors("flux"), []

    class Closed(Hub):
        def create_repo(self, *args, **kwargs):
            raise refusal[0]

    later = f"vlmedit export {folder} --push me/editor"
    assert main(["export", str(folder), "--push", "me/editor"]) == 2
    said = capsys.readouterr().err
    assert "the Hub cannot be reached" in said and later in said
    monkeypatch.setattr(exporting, "reachable", lambda: True)
    monkeypatch.setattr(exporting, "HfApi", Closed)
    for error, words in ((HfHubHTTPError.__bases__[0]("Name or service not known"), "cannot be reached or refuses"), (LocalTokenNotFoundError("no token"), "hf auth login")):
        refusal[:] = [error]
        assert main(["export", str(folder), "--push", "me/editor"]) == 2
        said = capsys.readouterr().err
        assert words in said and later in said
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "e"), "--push", "no//name"]) == 2 and "no name of a repository" in capsys.readouterr().err
    assert main(["export", str(folder)]) == 2 and "exported already; upload it with --push" in capsys.readouterr().err
    assert main(["export", str(tmp_path)]) == 2 and "--out is missing" in capsys.readouterr().err


def test_runs_that_are_not_whole_are_not_exported(editors, tmp_path, capsys):
    """A student, a configuration or a backbone that is cut short or gone is named before a weight is read."""
    editors("z-image", "adapter")
    whole = editors("z-image", "adapter").parent / "z-image-adapter-run"
    spoil = {
        f"model/{LORA_FILE}": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "is cut off or damaged"),
        "config.json": (lambda p: p.write_text(p.read_text()[:-20]), "config.json is no JSON"),
        "config.json ": (lambda p: p.write_text(re.sub(r'"backbone": "[^"]*"', '"backbone": "nobody/base"', p.read_text())), "the run's backbone: nobody/base: no such folder, and no model of the Hub"),
    }
    for name, (damage, said) in spoil.items():
        run = shutil.copytree(whole, tmp_path / "run", dirs_exist_ok=True)
        damage(run / name.strip())
        for kind in ("full", "adapter"):
            assert main(["export", str(run), "--out", str(tmp_path / "out"), "--kind", kind]) == 2
            assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_an_export_onto_a_full_disk_leaves_nothing(editors, tmp_path, monkeypatch, capsys, kind):
    """A disk that is seen to be too small is named before a weight is read; one that fills up while writing, as each library reports it, is
    one message, and nothing half-written stays."""
    editors("z-image", "adapter")
    run = editors("z-image", "adapter").parent / "z-image-adapter-run"
    command = ["export", str(run), "--out", str(tmp_path / "there" / "out"), "--kind", kind]
    with monkeypatch.context() as small:
        small.setattr("vlmedit.io.free_bytes", lambda path: 2**20)
        small.setattr(exporting, "write_parts", lambda *_: pytest.fail("weights were read first"))
        assert main(command) == 2 and "the disk is full: 1 MB free" in capsys.readouterr().err
    for error in (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), OSError(errno.ENOSPC, "No space left on device")):
        with monkeypatch.context() as full:

            def card(*_, error=error):
                raise error

            full.setattr(exporting, "card", card)  # the last but one of the files
            assert main(command) == 2 and "out: the disk is full; make room" in capsys.readouterr().err
        assert not list((tmp_path / "there").iterdir())
    assert main(command) == 0 and (tmp_path / "there/out" / ABOUT).is_file()


def test_the_card_of_a_warm_up_promises_no_edits(editors):
    """A copy warm-up may be exported to look at; its card says what it is."""
    whole = editors("z-image", "adapter").parent / "z-image-adapter-run"
    settings = json.loads((whole / "config.json").read_text())
    text = exporting.card({**settings, "text_dropout": 0.1}, "ZImageTransformer2DModel", "full")
    assert "# A copy warm-up" in text and "judge" not in text.split("|---|---|")[1].split("The license")[0] and "does not edit yet" in text


# Settings of the runs that are exported


def test_a_runs_settings_start_another(editors, tmp_path, capsys):
    """`--config RUN/config.json`, as --help says: the settings a run has saved are taken as they are; a side by --set is refused still."""
    config = editors("z-image", "adapter").parent / "z-image-adapter-run" / "config.json"
    words = ["train", "npedit", "--config", str(config), "--out", str(tmp_path / "new"), "--dry-run"]
    assert main([*words, "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["pictures_per_update"] == json.loads(config.read_text())["batch"]
    capsys.readouterr()
    assert main([*words, "--set", "side=32"]) == 2 and "a real run's pictures come in buckets" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (("train", "grpo", "--config", "tiny"), "real models are trained by the stages npedit and copy_warmup, not grpo: vlmedit train npedit --config tiny"),
        (("train", "--config", "tiny"), "not main"),
        (("train", "npedit", "--config", "zimage_refcopy"), "text_dropout, time_shift: settings of the copy warm-up"),
    ],
)
def test_settings_of_another_stage_are_told_apart(words, said, capsys):
    assert main(list(words)) == 2 and said in capsys.readouterr().err


def test_a_class_that_cannot_be_counted_is_one_message(editors, tmp_path, capsys):
    run = editors("z-image", "adapter").parent / "z-image-adapter-run"
    place = shutil.copytree(json.loads((run / "config.json").read_text())["backbone"], tmp_path / "odd")
    about = place / "transformer/config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "_class_name": "UNet2DConditionModel"}))
    assert main(["train", "npedit", "--config", str(run / "config.json"), "--out", str(tmp_path / "new"), "--set", f"backbone={place}", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "cannot be counted: no adapter for UNet2DConditionModel" in said and "Traceback" not in said


# Benchmarks


def test_a_benchmarks_edits_are_drawn(editors, photo, tmp_path, capsys):
    """`vlmedit bench --model` draws what is missing, at the references' sizes and as `vlmedit edit` draws it, leaves alone what is there, and
    refuses to mix two editors; the second run is compared with the first."""
    folder = tmp_path / "bench" / "singleturn"
    folder.mkdir(parents=True)
    shutil.copy(photo, folder / "a.png")
    Image.open(photo).rotate(90, expand=True).save(folder / "b.png")
    (folder / "singleturn.json").write_text(json.dumps({k: {"id": f"{k}.png", "prompt": WORDS, "edit_type": "style"} for k in "ab"}))
    clip = str(tiny.save_encoder("clip", tmp_path / "clip"))

    def bench(name, *more):
        return main(["bench", "imgedit", str(tmp_path / "bench"), "--edits", str(tmp_path / name), "--out", str(tmp_path / f"{name}-out"), "--clip", clip, *map(str, more)])

    assert bench("one", "--model", editors("z-image"), "--seed", 4) == 0
    assert edit(folder / "b.png", WORDS, tmp_path / "b.png", editors("z-image"), "--seed", 4) == 0
    assert (array(tmp_path / "one/b.png") == array(tmp_path / "b.png")).all() and Image.open(tmp_path / "one/a.png").size == SIZE
    photo_bytes = (tmp_path / "one/a.png").read_bytes()
    (tmp_path / "one/b.png").unlink()
    assert bench("one", "--model", editors("z-image"), "--seed", 4) == 0
    assert (tmp_path / "one/a.png").read_bytes() == photo_bytes and (array(tmp_path / "one/b.png") == array(tmp_path / "b.png")).all()
    assert bench("one", "--model", editors("flux")) == 2 and "holds edits of another model, seed" in capsys.readouterr().err
    assert bench("two", "--model", editors("z-image"), "--seed", 5, "--against", tmp_path / "one-out", "--json", tmp_path / "r.json") == 0
    found = json.loads((tmp_path / "r.json").read_text())["against"][0]
    assert found["cases"] == 2 and "2 cases that both have" in capsys.readouterr().out
    assert found["metrics"]["CLIP-I"]["here"] == pytest.approx(json.loads((tmp_path / "two-out/result.json").read_text())["sets"]["full"]["CLIP-I"]["mean"])


# Code that comes with a folder


def with_code(folder: Path, target: Path) -> Path:
    """A copy whose pipeline turns its pictures upside down."""
    shutil.copytree(folder, target)
    text = (target / CODE).read_text()
    line = "images = x if output_type"
    assert line in text
    (target / CODE).write_text(text.replace("        images = x if output_type", "        x = x.flip(-2)\n        images = x if output_type"))
    return target


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_changed_code_runs_only_if_it_is_trusted(editors, photo, tmp_path, capsys, kind):
    """A pipeline file that is not ours is refused before a weight is read; with --trust-remote-code it is what draws."""
    changed = with_code(editors("z-image", kind), tmp_path / "changed")
    assert edit(photo, WORDS, tmp_path / "e.png", changed) == 2
    said = capsys.readouterr().err
    assert CODE in said and "--trust-remote-code" in said and not (tmp_path / "e.png").exists()
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
            "idle judge": ("--judge", resolve("tiny:qwen2.5-vl", tmp_path, "judge")),
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
