"""Unpaired data: what a model's answers must be to be used, resuming after a kill at every point, doubles, targets never read, shards."""

import io
import json
import os
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.photos import photo
from PIL import Image

from vlmedit.cli import main
from vlmedit.data import shards as sh
from vlmedit.data.layouts import (
    MAPPED,
    Item,
    check_dataset,
    kind_of,
    read_dataset,
    read_items,
    thing_removed,
    write_items,
)
from vlmedit.data.manifest import load_fitted
from vlmedit.data.prepare import journal as journals
from vlmedit.data.prepare import run as p
from vlmedit.data.prepare.dedupe import Gallery, Looks
from vlmedit.data.prepare.proposals import REASONS, plain
from vlmedit.data.requests import batch_of
from vlmedit.data.shards import read_shards, write_shards
from vlmedit.data.tables import parquet_rows
from vlmedit.errors import InputError
from vlmedit.io import to_tensor
from vlmedit.networks.judges import text_vlm as writers
from vlmedit.networks.prompts import PromptTable
from vlmedit.testing import random_models as tiny

FIELDS = ["image", "instruction", "type", "object", "caption", "target_caption"]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "pictures"
    path.mkdir()
    for i in range(6):
        photo(i).save(path / f"{i}.png")
    return path


class Script:
    """Answers as a good model would, unless `say(step, prompt, good)` says otherwise; `stop` is the call that is interrupted."""

    sees = True

    def __init__(self, say=lambda step, prompt, good: good, stop=None):
        self.say, self.stop, self.calls, self.asked = say, stop, 0, []

    def write(self, images, texts, length):
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.asked += [(len(row), t) for row, t in zip(images, texts, strict=True)]
        return [self.answer(row, text) for row, text in zip(images, texts)]

    def answer(self, row, text):
        look = f"number {round(float(row[0].mean()) * 1e6)}" if row else "unseen"
        if text == p.CAPTION:
            return self.say("caption", text, json.dumps({"caption": f"A gray dog and a red ball on the grass {look}."}))
        if "You write instructions" in text:
            kind = next(k for k, v in p.KINDS.items() if v[0] in text)
            thing = "the red ball" if kind in ("remove", "color") else "the dog"
            good = f'Sure:\n```json\n{{"instruction": "Please {kind} {thing} in picture {look}.", "object": "{thing}"}}\n```'
            return self.say(kind, text, good)
        if text.startswith("An image editor was given"):
            return self.say("check", text, "Yes.")
        instruction = re.search(r"instruction: \"(.*?)\"", text)[1]
        return self.say("target", text, json.dumps({"caption": f"A gray dog on the grass after this, {re.sub('red (ball|flag)', 'thing', plain(instruction))}"}))


def run(folder, out, writer, llm=None, batch=2, repeats=20, **settings):
    chosen = p.Settings(str(folder), settings.pop("layout", "folder"), "script", None, **settings)
    return list(p.prepare(out, chosen, writer, llm, batch, repeats))


def report(out):
    return json.loads((out / "report.json").read_text())


def test_a_folder_becomes_requests(folder, tmp_path):
    """Every picture gives its three edits; the manifest has exactly the fields of the contract, its paths lead to the pictures from the
    manifest's folder, and a trainer's batch can be made of it; the report and its page count the same."""
    out = tmp_path / "out"
    steps = run(folder, out, Script())
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert all(list(line) == FIELDS for line in lines) and len(lines) == 18 == steps[-1].kept == report(out)["kept"]
    items = read_items(out / "manifest.jsonl")
    assert {Image.open(i.image).size for i in items} == {(96, 64)} and len({i.image for i in items}) == 6
    assert len({i.type for i in items}) > 4 and all(i.object == "the red ball" for i in items if i.type == "remove")
    batch = batch_of([i.request() for i in items[:4]], torch.zeros(4, 3, 8, 8), PromptTable(), PromptTable())
    assert batch.types == tuple(i.type for i in items[:4])
    page = (out / "report.html").read_text()
    assert "18 requests from 6 pictures" in page and page.count("<img") == 18


def test_removals_are_drawn_as_often_as_the_recipe_says():
    """Each of a picture's types comes once; of single draws a quarter are removals, within four standard errors."""
    settings = p.Settings("f", "folder", "v", None, per_picture=1)
    first = [p.draw_kinds(settings, str(i))[0] for i in range(4000)]
    assert abs(first.count("remove") / 4000 - 3 / 12) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    many = p.draw_kinds(p.Settings("f", "folder", "v", None, per_picture=10), "x")
    assert sorted(many) == sorted(p.KINDS)


BAD = {  # reason -> (type proposed, where, what is said)
    "no caption": ("color", "caption", '{"caption": "dog"}'),
    "no proposal": ("color", "color", "Make the ball blue."),
    "not an instruction": ("color", "color", '{"instruction": "%% ## 1,1,1,1 ~~ a\\u0000b ()", "object": "x"}'),
    "no object": ("remove", "remove", '{"instruction": "Remove the red ball.", "object": "the unicorn"}'),
    "the example": ("color", "color", json.dumps({"instruction": p.KINDS["color"][1], "object": "the sofa"})),
    "no clear answer": ("color", "check", "It depends on what you mean."),
    "not possible": ("color", "check", "No, there is no ball."),
    "no target caption": ("color", "target", "{'caption': broken"),
    "nothing changes": ("color", "target", None),
    "still there": ("remove", "target", '{"caption": "A gray dog and a red ball on the grass, edited."}'),
}


@pytest.mark.parametrize("reason", BAD)
def test_answers_that_are_refused(reason, folder, tmp_path):
    """One kind of bad answer, to all pictures or all but one: exactly those edits go, for that reason, and the answer is in the report."""
    kind, where, said = BAD[reason]
    spared = []  # the first picture's check or target caption; other questions are the same for all pictures

    def say(step, prompt, good):
        if step != where or (step in ("check", "target") and prompt == (spared or [spared.append(prompt), prompt])[-1]):
            return good
        return json.dumps({"caption": re.search(r'shows: "(.*?)"', prompt)[1]}) if said is None else said

    kept = int(where in ("check", "target"))
    with nullcontext() if kept else pytest.raises(InputError, match=re.escape(REASONS[reason])):
        run(folder, tmp_path / "out", Script(say), kinds=(kind,), per_picture=1)
    found = report(tmp_path / "out")
    assert (tmp_path / "out" / "manifest.jsonl").exists() == bool(kept)
    assert found["kept"] == kept and set(found["refusals"]) == {reason} and found["refusals"][reason]["times"] == 6 - kept
    assert found["refusals"][reason]["for example"]


def test_every_reason_has_a_test():
    assert set(REASONS) == {*BAD, "unreadable", "unsuitable", "seen before", "twice for one picture", "too common"}


def test_doubles_and_broken_files(folder, tmp_path):
    """A recompressed, a resized and an identical copy count as seen; other pictures, flat ones of two colors included, do not; a broken
    file is refused; an instruction comes once per picture and `repeats` times altogether."""
    photo(0).save(folder / "x-copy.png")
    photo(1).resize((48, 32), Image.Resampling.LANCZOS).save(folder / "x-small.png")
    photo(2).save(folder / "x-again.jpg", quality=80)
    for color in ("red", "blue"):
        Image.new("RGB", (40, 40), color).save(folder / f"y-{color}.png")
    (folder / "z.png").write_bytes(b"\x89PNG and then nothing")
    same = Script(lambda step, q, good: '{"instruction": "Make the dog blue today.", "object": "the dog"}' if step in p.KINDS else good)
    run(folder, tmp_path / "out", same, kinds=("color", "style"), per_picture=2, repeats=3)
    found = report(tmp_path / "out")
    assert found["refusals"]["seen before"]["times"] == 3 and found["refusals"]["unreadable"]["times"] == 1
    assert found["refusals"]["twice for one picture"]["times"] == 8 and found["kept"] == 3 and found["refusals"]["too common"]["times"] == 5


def test_pictures_are_shown_as_the_trainer_shows_them(tmp_path):
    """What the model describes is what training loads, 16 bits, transparency, CMYK and a turned photo included; pictures that `vlmedit edit`
    refuses (animated, tiny, very long) and other formats are passed over and counted."""
    folder = tmp_path / "pictures"
    (folder / "Bücher 图").mkdir(parents=True)
    rows = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(rows).save(folder / "deep.png")
    glass = photo(1, (64, 64)).convert("RGBA")
    glass.putalpha(Image.linear_gradient("L").resize((64, 64)))
    glass.save(folder / "Bücher 图" / "glass.png")
    photo(2, (64, 64)).convert("CMYK").save(folder / "print.jpg", quality=95)
    turned = Image.Exif()
    turned[0x0112] = 6
    photo(3, (96, 64)).save(folder / "turned.jpg", exif=turned)
    photo(4).save(folder / "moves.png", save_all=True, append_images=[photo(5)])
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    photo(6, (400, 40)).save(folder / "long.png")
    photo(7).save(folder / "other.tiff")
    seen = {f.name: None for f in read_dataset(folder)}
    for found in read_dataset(folder):
        try:
            seen[found.name] = found.picture()
        except InputError as error:
            assert found.name in ("moves.png", "dot.png", "long.png"), error
    shown = {name: image for name, image in seen.items() if image}
    assert len(shown) == 4 and shown["turned.jpg"].size == (64, 96)
    for name, image in shown.items():
        fitted = load_fitted(folder / name, image.size)
        assert (fitted - to_tensor(image, 999)).abs().max() < 1e-6, name
    assert np.asarray(shown["deep.png"]).std() > 50  # not clipped to white
    assert np.asarray(shown["Bücher 图/glass.png"])[0].mean() > 250  # transparent is paper
    run(folder, tmp_path / "out", Script(), batch=3)
    found = report(tmp_path / "out")
    assert found["refusals"]["unsuitable"]["times"] == 3 and "animated, 2 frames" in json.dumps(found) + (tmp_path / "out" / "journal.jsonl").read_text()
    assert found["skipped"]["another format"]["times"] == 1 and {Path(i.image).name for i in read_items(tmp_path / "out" / "manifest.jsonl")} == {Path(n).name for n in shown}


def test_looks_are_compared_through_bands():
    """The band index finds exactly the pairs that a comparison of all finds."""
    rng = np.random.default_rng(0)
    base = int.from_bytes(rng.bytes(32), "big")
    looks = [Looks(base ^ sum(1 << int(b) for b in rng.choice(256, k, replace=False)), bytes(48)) for k in (0, 3, 9, 10, 11, 12, 15, 40)]
    gallery = Gallery()
    gallery.add(looks[0])
    assert [gallery.has(other) for other in looks] == [looks[0].like(other) for other in looks] == [True] * 4 + [False] * 4


@pytest.mark.parametrize("stop", range(1, 9, 2))
def test_a_killed_run_goes_on(stop, folder, tmp_path):
    """Interrupted at one of its calls, with a torn line in the journal: the next run asks about the remaining pictures alone, and manifest
    and report are those of a run that was never stopped."""
    run(folder, tmp_path / "whole", Script())
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "out", Script(stop=stop))
    journal = tmp_path / "out" / "journal.jsonl"
    done = len(journal.read_text().splitlines()) - 1
    assert done == 2 * ((stop - 1) // 4)
    with open(journal, "a") as file:
        file.write('{"name": "3.png", "loo')
    again = Script()
    run(folder, tmp_path / "out", again)
    assert sum(text == p.CAPTION for _, text in again.asked) == 6 - done
    for name in ("manifest.jsonl", "report.json", "journal.jsonl"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()
    finished = Script()
    run(folder, tmp_path / "out", finished)
    assert finished.calls == 0


def test_another_run_in_the_folder_is_refused(folder, tmp_path):
    run(folder, tmp_path / "out", Script())
    with pytest.raises(InputError, match=r"run of other settings \(per_picture\)"):
        run(folder, tmp_path / "out", Script(), per_picture=2)
    (tmp_path / "out" / "journal.jsonl").write_text("{]\n")
    with pytest.raises(InputError, match="journal.jsonl: damaged"):
        run(folder, tmp_path / "out", Script())


# several processes


WRITTEN = ("manifest.jsonl", "report.json")


def part(folder, out, process, processes, writer=None):
    return p.prepare(out, p.Settings(str(folder), "folder", "script", None), writer or Script(), None, 1, 20, process, processes)


def test_processes_share_the_pictures(folder, tmp_path, monkeypatch):
    """Three processes, in turns: each asks about its own pictures alone, none is asked about twice, the main one waits for the others, and
    manifest and report are those of one process; a copy of a picture that another process has is dropped at the end, wherever it went."""
    monkeypatch.setattr(journals, "POLL", 0.0)
    for i in range(4):
        photo(i).save(folder / f"copy-{i}.png")
    run(folder, tmp_path / "one", Script())
    writers_, out = [Script() for _ in range(3)], tmp_path / "three"
    running = [part(folder, out, i, 3, w) for i, w in enumerate(writers_)]
    while running:
        assert not (out / "manifest.jsonl").exists()
        running = [g for g in running if next(g, None)]
    asked = [sum(t == p.CAPTION for _, t in w.asked) for w in writers_]
    assert min(asked) > 0 and 6 < sum(asked) <= 10  # copies that went to another process were asked about
    for name in WRITTEN:
        assert (out / name).read_text() == (tmp_path / "one" / name).read_text()
    assert report(out)["refusals"]["seen before"]["times"] == 4 and report(out)["kept"] == 18


@pytest.mark.parametrize("after", [1, 2, 3])
def test_another_number_of_processes_goes_on(after, folder, tmp_path, monkeypatch):
    """Two processes are killed, one of them within a line: any number goes on, asks about the rest alone, and ends as a run of one process.
    A copy of a picture that is done is not asked about where one process knows all journals."""
    monkeypatch.setattr(journals, "POLL", 0.0)
    for i in range(6):
        photo(i).save(folder / f"copy-{i}.png")
    run(folder, tmp_path / "one", Script())
    out = tmp_path / "out"
    for process in (0, 1):
        next(part(folder, out, process, 2))
    with open(out / "journal-1.jsonl", "a") as file:
        file.write('{"name": "3.png", "loo')
    writers_ = [Script() for _ in range(after)]
    for process in reversed(range(after)):
        list(part(folder, out, process, after, writers_[process]))
    asked = sum(t == p.CAPTION for w in writers_ for _, t in w.asked)
    assert asked == 4 if after == 1 else 4 <= asked <= 10
    for name in WRITTEN:
        assert (out / name).read_text() == (tmp_path / "one" / name).read_text()


def test_the_command_under_a_launcher(folder, tmp_path, monkeypatch, vlm, capsys):
    """The command with the variables that torchrun and accelerate launch set: the second process says nothing, the first one reports all."""
    monkeypatch.setattr(writers, "load_writer", lambda *a, **k: Script())
    command = ["data", "prepare", str(folder), "--vlm", str(vlm), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "r.json")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(command) == 0 and (tmp_path / "r.json").exists() == (rank == "0")
        assert ("18 requests of 6 pictures" in capsys.readouterr().out) == (rank == "0")
    parts = [len((tmp_path / "out" / journals.journal_name(i)).read_text().splitlines()) - 1 for i in (0, 1)]
    assert sum(parts) == 6 and min(parts) > 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(command) == 2 and "process 1 of this machine has no GPU, there is 1" in capsys.readouterr().err


def test_processes_that_stand_still_are_named(folder, tmp_path, monkeypatch):
    """The main process does not wait forever, and does not take journals of another run, or damaged ones."""
    monkeypatch.setattr(journals, "POLL", 0.0)
    monkeypatch.setattr(journals, "PATIENCE", 0.0)
    theirs = sum(journals.part_of(f"{i}.png", 2) for i in range(6))
    with pytest.raises(InputError, match=rf"nothing came from the other processes .*process 1 has {theirs} pictures left.*; the same command goes on"):
        list(part(folder, tmp_path / "out", 0, 2))
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
    (tmp_path / "out" / "journal-1.jsonl").write_text('{"settings": {"seed": 1}}\n')
    with pytest.raises(InputError, match=r"run of other settings \(.*seed"):
        list(part(folder, tmp_path / "out", 0, 2))
    (tmp_path / "out" / "journal-1.jsonl").write_text("{]\n")
    with pytest.raises(InputError, match="journal-1.jsonl: damaged"):
        list(part(folder, tmp_path / "out", 0, 2))
    with pytest.raises(InputError, match="process 2 of 2"):
        list(part(folder, tmp_path / "out", 2, 2))


# models


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return tiny.save_judge("qwen2.5-vl", tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("llm")
    Qwen2ForCausalLM(Qwen2Config(**tiny.TEXT, bos_token_id=None, eos_token_id=2)).save_pretrained(out)
    tiny.tokenizer().save_pretrained(out)
    return out


def test_a_model_that_talks_nonsense_is_refused(folder, tmp_path, vlm, capsys):
    """A real class with random weights through `from_pretrained`: nothing of it gets into a manifest; one message, and a report."""
    out = tmp_path / "out"
    assert main(["data", "prepare", str(folder), "--vlm", str(vlm), "--out", str(out), "--batch", "6"]) == 2
    said = capsys.readouterr().err
    assert "none of 6 pictures gave an edit" in said and "a stronger --vlm" in said and "Traceback" not in said
    assert not (out / "manifest.jsonl").exists() and report(out)["refusals"] and (out / "report.html").stat().st_size > 500
    assert json.loads((out / "journal.jsonl").read_text().splitlines()[0])["vlm"]["class"] == "Qwen2_5_VLForConditionalGeneration"


def test_command_line_makes_a_manifest(folder, tmp_path, monkeypatch, vlm, capsys):
    """The command with a model that answers well, then shards of its manifest."""
    monkeypatch.setattr(writers, "load_writer", lambda *a, **k: Script())
    out = tmp_path / "out"
    assert main(["data", "prepare", str(folder), "--vlm", str(vlm), "--out", str(out), "--kinds", "remove,color", "--per-picture", "2", "--json", str(tmp_path / "r.json")]) == 0
    assert "12 requests of 6 pictures" in capsys.readouterr().out and json.loads((tmp_path / "r.json").read_text())["kept"] == 12
    assert main(["data", "shards", str(out / "manifest.jsonl"), "--out", str(tmp_path / "shards"), "--per-shard", "5"]) == 0
    assert len(list(read_shards(tmp_path / "shards"))) == 12 and len(list((tmp_path / "shards").glob("*.tar"))) == 3


def test_a_language_model_proposes_from_captions(folder, tmp_path, llm):
    """With an --llm without eyes, proposals and target captions go to it, with the caption and without a picture; descriptions and checks stay
    with the VLM. A real causal model answers a batch as it answers each text alone."""
    blind, seeing = Script(), Script()
    blind.sees = False
    run(folder, tmp_path / "out", seeing, blind)
    assert {n for n, _ in seeing.asked} == {1} and {n for n, _ in blind.asked} == {0}
    assert any('shows: "A gray dog' in t and "You write" in t for _, t in blind.asked) and not any("You write" in t for _, t in seeing.asked)
    scribe = writers.load_writer(llm)
    texts = ["hi", "a much longer text than the first"]
    assert scribe.write([[], []], texts, 6) == [scribe.write([[]], [t], 6)[0] for t in texts]
    with pytest.raises(ValueError, match="without eyes"):
        scribe.write([[torch.zeros(3, 8, 8)]], ["what?"])
    with pytest.raises(InputError, match="cannot describe or check pictures"):
        run(folder, tmp_path / "out2", scribe)


def test_models_that_cannot_write_are_refused(tmp_path):
    import transformers

    with pytest.raises(FileNotFoundError, match="no model at someone/some-model"):
        writers.load_writer("someone/some-model")
    transformers.BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is BertForMaskedLM; a writer is a causal language model or one of Qwen2_5_VL"):
        writers.load_writer(tmp_path / "bert")
    transformers.Qwen2Config(**tiny.TEXT, architectures=["Qwen2ForCausalLM"]).save_pretrained(tmp_path / "half")
    with pytest.raises(FileNotFoundError, match="not all of its files"):
        writers.load_writer(tmp_path / "half")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "prepare", "DIR", "--out", "OUT"], "--vlm is missing"),
        (["data", "prepare", "--vlm", "x", "--out", "OUT"], "needs a folder of pictures"),
        (["data", "prepare", "nowhere", "--vlm", "x", "--out", "OUT"], "no such folder"),
        (["data", "prepare", "EMPTY", "--vlm", "x", "--out", "OUT"], "nothing in the layout 'folder'"),
        (["data", "prepare", "DIR", "--vlm", "x", "--layout", "coco", "--out", "OUT"], "unknown layout 'coco'"),
        (["data", "prepare", "DIR", "--vlm", "x", "--kinds", "teleport", "--out", "OUT"], "unknown edit types teleport"),
        (["data", "prepare", "DIR", "--vlm", "x", "--per-picture", "11", "--out", "OUT"], "--per-picture is 11"),
        (["data", "prepare", "DIR", "--vlm", "someone/model", "--out", "OUT"], "--vlm someone/model: no model at"),
        (["data", "prepare", "DIR", "--vlm", "x", "--batch", "0", "--out", "OUT"], "--batch is 0"),
        (["data", "shards", "nowhere.jsonl", "--out", "OUT"], "cannot be read as a manifest"),
        (["data", "examples", "DIR", "--out", "OUT"], "did you mean vlmedit data prepare"),
    ],
)
def test_bad_commands(words, message, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = {"DIR": str(folder), "OUT": str(tmp_path / "out"), "EMPTY": str(tmp_path / "empty")}
    assert main([places.get(w, w) for w in words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


# data sets of others: the target is never read

OPENED: list[str] = []
LISTENING = []


def _listen(event, args):
    if LISTENING and event == "open":
        OPENED.append(str(args[0]))


@pytest.fixture
def opened():
    """Every file that Python opens during a test."""
    if not getattr(sys, "_vlmedit_hook", False):
        sys.addaudithook(_listen)
        sys._vlmedit_hook = True
    OPENED.clear()
    LISTENING.append(True)
    yield OPENED
    LISTENING.clear()


SAID = ["Remove the red flag from the roof.", "Make the car green."]


def write_pico(folder):
    rows = [
        {"open_image_input_url": f"https://somewhere/{i}_o.jpg", "text": said, "output_image": f"images/positive-edit/target-{i}.png", "edit_type": kind, "summarized_text": "short"}
        for i, (said, kind) in enumerate(zip(SAID, ("Remove an existing object", "Change an object's color")))
    ]
    (folder / "sft.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:1]))
    turns = [{"id": f"edit_turn{i}", "url": f"images/multi-turn/target-{i}.png"} for i in (1, 2)] + [{"id": "final_image", "url": "images/multi-turn/target-3.png"}]
    row = {"files": [*turns, {"id": "original_input_image", "url": "https://somewhere/1_o.jpg"}], "metadata_edit_turn_prompts": [SAID[1], "then make it blue", "remove it"]}
    (folder / "multi-turn.jsonl").write_text(json.dumps(row) + "\n")
    mapped = folder / f"multi-turn{MAPPED}.jsonl"  # by the data set's own script; a list is read once, mapped if it can be
    mapped.write_text(json.dumps({**row, "local_input_image": "train/1.jpg"}) + "\n" + json.dumps({"files": [], "metadata_edit_turn_prompts": ["x"]}) + "\n")
    return {"0_o.jpg": 0, "train/1.jpg": 1}, ["images/positive-edit/target-0.png", *(f"images/multi-turn/target-{i}.png" for i in (1, 2, 3))]


def write_gpt(folder):
    rows = [{"image": [f"in-{i}.jpg", f"target-{i}.png"], "conversations": [{"from": "human", "value": f"<image>\n{s}"}, {"from": "gpt", "value": "<image>"}]} for i, s in enumerate(SAID)]
    (folder / "training_json").mkdir()
    (folder / "training_json" / "hqedit_gpt_edit.json").write_text(json.dumps(rows[:1], indent=1))
    (folder / "gpt-edit" / "omniedit").mkdir(parents=True)
    (folder / "gpt-edit" / "omniedit" / "omniedit.json").write_text(json.dumps([{"input": "in-1.jpg", "output": "target-1.png", "instruction": [SAID[1]]}]))
    return {"gpt-edit/hqedit/edit/in-0.jpg": 0, "gpt-edit/omniedit/in-1.jpg": 1}, ["gpt-edit/hqedit/edit/target-0.png", "gpt-edit/omniedit/target-1.png"]


def write_magicbrush(folder):
    turn = lambda s, start, n, said: {"input": start, "mask": f"{s}-mask{n}.png", "output": f"{s}-output{n}.png", "instruction": said}
    sessions = {"7": [turn("7", "7-input.png", 1, SAID[0]), turn("7", "7-output1.png", 2, "then add a bird")], "8": [turn("8", "8-input.png", 1, SAID[1])]}
    (folder / "train").mkdir()
    (folder / "train" / "edit_sessions.json").write_text(json.dumps(sessions))
    return {"train/images/7/7-input.png": 0, "train/images/8/8-input.png": 1}, ["train/images/7/7-output1.png", "train/images/7/7-output2.png", "train/images/8/8-output1.png"]


def write_npedit(folder):
    rows = [
        {"id": str(i), "input_image_path": f"in/{i}.png", "output_image_path": f"target-{i}.png", "edit_instruction": said, "edit_type": kind, "edited_caption": f"after {i}", "input_description": f"before {i}"}
        for i, (said, kind) in enumerate(zip(SAID, ("remove", "color")))
    ]
    (folder / "merged_edit_data.json").write_text(json.dumps(rows))
    return {"in/0.png": 0, "in/1.png": 1}, ["target-0.png", "target-1.png"]


PASSED = {"pico-banana": {"later turn": 2, "no input": 1}, "magicbrush": {"later turn": 1}}  # over, as the report counts it
WRITERS = {"pico-banana": write_pico, "gpt-image-edit": write_gpt, "magicbrush": write_magicbrush, "npedit": write_npedit}


@pytest.mark.parametrize("layout", WRITERS)
def test_targets_are_never_read(layout, tmp_path, opened):
    """Each layout from its annotation to the manifest: inputs and words come through, and among all files that were opened is no target
    (those on the disk are no pictures, so that decoding one would fail); no target's name is in what is written."""
    folder = tmp_path / "set"
    folder.mkdir()
    inputs, targets = WRITERS[layout](folder)
    for name, i in inputs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        photo(i).save(folder / name)
    for name in targets:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"the target")
    opened.clear()
    found = list(read_dataset(folder, layout))
    assert sorted((f.name, f.instruction, f.type, f.object) for f in found) == sorted((n, SAID[i], ("remove", "color")[i], ("the red flag", None)[i]) for n, i in inputs.items())
    run(folder, tmp_path / "out", Script(), layout=layout)
    items = read_items(tmp_path / "out" / "manifest.jsonl")
    assert len(items) == 2 and {i.instruction for i in items} == set(SAID)
    assert {reason: v["times"] for reason, v in report(tmp_path / "out")["skipped"].items()} == PASSED.get(layout, {})
    if layout == "npedit":
        assert {(i.caption, i.target_caption) for i in items} == {("before 0", "after 0"), ("before 1", "after 1")}
    names = [str(n).rpartition("/")[2] for n in opened]
    assert all(n.rpartition("/")[2] in names for n in inputs)  # the listener hears the inputs
    assert not {n.rpartition("/")[2] for n in targets} & set(names)
    assert not any(n.rpartition("/")[2] in path.read_text() for n in targets for path in (tmp_path / "out").glob("*.json*"))


@pytest.mark.parametrize("run_from", ["parent", "folder", "elsewhere"])
def test_pico_bananas_mapped_paths(run_from, tmp_path, monkeypatch):
    """The mapping script writes paths as seen from where it was run: from the folder's parent (as published), from the folder, or whole; a
    picture that it did not find has no path. The picture is found for each, and never outside the folder."""
    folder = tmp_path / "work" / "openimages"
    (folder / "openimage_source_images" / "train_0").mkdir(parents=True)
    monkeypatch.chdir({"parent": folder.parent, "folder": folder, "elsewhere": tmp_path}[run_from])
    photo(0).save(folder / "openimage_source_images" / "train_0" / "a.jpg")
    start = {"parent": "openimages/", "folder": "", "elsewhere": f"{folder}/"}[run_from]
    rows = [
        {"open_image_input_url": "https://somewhere/x_o.jpg", "text": SAID[1], "edit_type": "Zoom in", "local_input_image": f"{start}openimage_source_images/train_0/a.jpg"},
        {"open_image_input_url": "https://somewhere/y_o.jpg", "text": SAID[0], "edit_type": "Zoom in", "local_input_image": None},
    ]
    (folder / f"sft{MAPPED}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for place in (folder, Path(os.path.relpath(folder))):
        first, second = read_dataset(place, "pico-banana")
        assert first.picture().size == (96, 64) and first.type == "color" and second.name == "y_o.jpg" and not second.path.exists()
    photo(1).save(tmp_path / "work" / "secret.jpg")
    (folder / f"sft{MAPPED}.jsonl").write_text(json.dumps({**rows[0], "local_input_image": "../secret.jpg"}) + "\n")
    with pytest.raises(InputError, match="leads out of the data set's folder"):
        list(read_dataset(folder, "pico-banana"))


def test_a_parquet_rows_target_is_not_read(tmp_path):
    """MagicBrush's parquet with the bytes of the target's column destroyed on the disk: reading that column fails, our reader does not notice."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def content(i):
        path = tmp_path / "x.png"
        photo(i).save(path)
        return {"bytes": path.read_bytes(), "path": "x.png"}

    rows = [{"img_id": str(i), "turn_index": t, "source_img": content(i), "mask_img": content(8), "instruction": SAID[i], "target_img": content(9 + i)} for i, t in ((0, 1), (0, 2), (1, 1))]
    folder = tmp_path / "set"
    folder.mkdir()
    file = folder / "train-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, compression="none", use_dictionary=False)
    group = parquet.read_metadata(file).row_group(0)
    spoiled = bytearray(file.read_bytes())
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema.startswith("target_img"):
            spoiled[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(spoiled)
    with pytest.raises((InputError, OSError)):
        list(parquet_rows(file, ["target_img"]))
    found = list(read_dataset(folder, "magicbrush"))
    assert [f.name for f in found] == ["0-input.png", "1-input.png"] and found[1].picture().size == (96, 64)
    run(folder, tmp_path / "out", Script(), layout="magicbrush")
    assert {i.image.rpartition("/")[2] for i in read_items(tmp_path / "out" / "manifest.jsonl")} == {"0-input.png", "1-input.png"}
    with pytest.raises(InputError, match="lacks the columns nothing"):
        list(parquet_rows(file, ["nothing"]))


def test_types_and_things_by_name():
    names = {"subject-remove": "remove", "color_alter": "color", "material_alter": "material", "motion_change": "action", "background_change": "background", "style_change": "style"}
    names |= {"text_change": "text", "subject-add": "add", "subject-replace": "replace", "Add a new object to the scene": "add", "tone_transfer": "style", "ps_human": "other"}
    names |= {"Add film grain or vintage filter": "style", "Add new scene context/background": "background", "Strong artistic style transfer (e.g., Van Gogh/anime/etc.)": "style"}
    names |= {"Replace one object category with another": "replace", "Outpainting (extend canvas beyond boundaries)": "other", "Add a vintage car": "add"}
    assert {n: kind_of(n) for n in names} == names
    assert kind_of("ps_human", "Make her smile") == "action"
    things = {"Remove the red flag and its pole from the left.": "the red flag", "please erase a cat": "a cat", "Get rid of the old man in the boat": "the old man", "Make it red": None}
    assert {t: thing_removed(t) for t in things} == things


def test_layouts_that_do_not_fit(tmp_path, folder):
    with pytest.raises(InputError, match="nothing in the layout 'magicbrush'"):
        list(read_dataset(folder, "magicbrush"))
    with pytest.raises(InputError, match="not laid out as 'npedit'"):
        list(read_dataset(folder, "npedit"))
    (folder / "sft.jsonl").write_text(json.dumps({"local_input_image": "../../secret.png", "text": "Add a hat."}) + "\n")
    with pytest.raises(InputError, match="leads out of the data set's folder"):
        list(read_dataset(folder, "pico-banana"))
    row = json.dumps({"open_image_input_url": "https://somewhere/gone.jpg", "text": "Add a hat."}) + "\n"
    (folder / "sft.jsonl").write_text(row * 3 + '{"text": "half')
    with pytest.raises(InputError, match="sft.jsonl: not JSON rows to its end, which is 'f'; download it again"):
        next(read_dataset(folder, "pico-banana"))
    (folder / "sft.jsonl").write_text(row * 3)
    with pytest.raises(InputError, match="none of the first 3 pictures is there, such as .*gone.jpg; download them"):
        check_dataset(folder, "pico-banana")
    (folder / "sft.jsonl").write_text(row * 300 + "{]}")  # far behind the first rows
    (folder / "gone.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="not JSON"):
        check_dataset(folder, "pico-banana")


# manifests and shards


@pytest.fixture
def manifest(folder, tmp_path):
    items = [Item(f"pictures/{i}.png", f"Remove thing {i} – now.", "remove", f"thing {i}", f"caption {i}", "") for i in range(6)]
    write_items(items, tmp_path / "manifest.jsonl")
    return tmp_path / "manifest.jsonl"


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_shards_hold_the_pictures_own_bytes(kind, manifest, tmp_path):
    """Items and bytes come back as they were; two readers share them without overlap, and a reader that skips goes on where it was; a
    shard that a kill left out is written again, the others stay as they are."""
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    items, out = read_items(manifest), tmp_path / "shards"
    paths = write_shards(items, out, kind, 4)
    rows = list(read_shards(out))
    assert [r[1] for r in rows] == [(tmp_path / "pictures" / f"{i}.png").read_bytes() for i in range(6)]
    assert [(r[0].instruction, r[0].object, r[0].caption) for r in rows] == [(i.instruction, i.object, i.caption) for i in items]
    halves = [list(read_shards(out, rank, 2)) for rank in (0, 1)]
    assert [r for pair in zip(*halves) for r in pair] == rows and list(read_shards(out, 1, 2, skip=2)) == halves[1][2:]
    first = paths[0].stat().st_mtime_ns
    paths[1].unlink()
    write_shards(items, out, kind, 4)
    assert list(read_shards(out)) == rows and paths[0].stat().st_mtime_ns == first
    with pytest.raises(InputError, match="shards of another manifest"):
        write_shards(items[:2], out, kind, 4)
    paths[1].write_bytes(paths[1].read_bytes()[:700])
    with pytest.raises(InputError, match="not a whole"):
        list(read_shards(out))


def test_a_trainer_takes_manifests_and_shards(folder, tmp_path):
    """The trainer's own reader: the same requests from the manifest and from its tar shards, and the same pixels."""
    from vlmedit.data.manifest import load_fitted, read_manifest

    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
    photo(9).save(tmp_path / "elsewhere.png")
    run(folder, tmp_path / "out", Script())
    write_shards(read_items(tmp_path / "out" / "manifest.jsonl"), tmp_path / "shards", per_shard=4)
    plain_rows, packed = read_manifest(tmp_path / "out" / "manifest.jsonl"), read_manifest(tmp_path / "shards")
    assert len(plain_rows) == 21 and [r.request for r in plain_rows] == [r.request for r in packed]
    assert torch.equal(load_fitted(plain_rows[5].image, (64, 64)), load_fitted(packed[5].image, (64, 64)))


def picture_bytes(seed, tmp_path) -> bytes:
    photo(seed).save(tmp_path / "x.png")
    return (tmp_path / "x.png").read_bytes()


def write_rows(path, rows, **kwargs):
    """A parquet file as others write it."""
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="none", use_dictionary=False, **kwargs)
    return pyarrow.parquet.read_metadata(path)


def words(i=0, **more):
    return {"instruction": f"Make thing {i} red.", "caption": f"thing {i}", "target_caption": f"red thing {i}", **more}


def test_parquet_shards_are_hugging_faces(manifest, tmp_path):
    """Pictures are structs of bytes and path, and the schema says so as `datasets` reads it; groups are small enough to be read for one picture."""
    parquet = pytest.importorskip("pyarrow.parquet")
    write_shards(read_items(manifest) * 3, tmp_path / "shards", "parquet")
    file = parquet.ParquetFile(tmp_path / "shards" / "000000.parquet")
    assert str(file.schema_arrow.field("image").type) == "struct<bytes: binary, path: string>"
    features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == file.schema_arrow.names and features["image"] == {"_type": "Image"} and features["type"] == {"dtype": "string", "_type": "Value"}
    assert [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] == [8, 8, 2]


def test_a_target_in_a_shard_is_not_read(tmp_path):
    """Training from a parquet file of somebody with the target's column beside the input's, its bytes destroyed on the disk: reading them
    fails, the trainer does not notice. Pictures that are not embedded are found by their paths; `type` and `object` may be missing."""
    from vlmedit.data.manifest import load_fitted, read_manifest

    (tmp_path / "set").mkdir()
    photo(3).save(tmp_path / "set" / "outside.png")
    cells = [{"bytes": picture_bytes(i, tmp_path), "path": f"{i}.png"} for i in range(3)] + [{"bytes": None, "path": "outside.png"}]
    file = tmp_path / "set" / "train.parquet"
    about = write_rows(file, [{"output_image": {"bytes": picture_bytes(9, tmp_path), "path": "t"}, "image": c, **words(i)} for i, c in enumerate(cells)], row_group_size=2)
    spoiled = bytearray(file.read_bytes())
    for group in map(about.row_group, range(about.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.startswith("output_image"):
                spoiled[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(spoiled)
    with pytest.raises((InputError, OSError)):
        list(parquet_rows(file, ["output_image"]))
    rows = read_manifest(file)
    assert [r.request.instruction for r in rows] == [f"Make thing {i} red." for i in range(4)] and {r.request.type for r in rows} == {"other"}
    for i, row in enumerate(rows):
        photo(i).save(tmp_path / "own.png")
        assert torch.equal(load_fitted(row.image, (64, 64)), load_fitted(tmp_path / "own.png", (64, 64)))


def spoil_shards(what, out, tmp_path):
    """One thing wrong with a folder of two shards, 000000 and 000001, of four and two requests."""
    import tarfile

    first, last = sorted(out.glob("00000?.*"))
    cell = {"bytes": picture_bytes(0, tmp_path), "path": "0.png"}
    if what == "cut in a picture":
        last.write_bytes(last.read_bytes()[:700])
    elif what == "cut at an end":
        with tarfile.open(first) as tar:
            end = tar.getmembers()[2].offset
        first.write_bytes(first.read_bytes()[:end])
    elif what == "no bytes":
        last.write_bytes(b"")
    elif what == "a shard is missing":
        last.unlink()
    elif what == "two kinds":
        write_rows(out / "a.parquet", [{"image": cell, **words()}])
    elif what == "one level higher":
        return out.parent
    elif what == "damaged index":
        (out / "shards.json").write_text("{")
    elif what in ("two pictures", "no words", "bad words", "no picture", "an empty tar"):
        def add(tar, name, data):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))

        with tarfile.open(out / "other.tar", "w") as tar:
            names = {"two pictures": ("0.input.png", "0.output.png"), "no picture": (), "an empty tar": ()}.get(what, ("0.png",))
            for name in names:
                add(tar, name, cell["bytes"])
            if what not in ("no words", "an empty tar"):
                add(tar, "0.json", b"[1]" if what == "bad words" else json.dumps(words()).encode())
    else:
        (tmp_path / "p").mkdir()
        rows = {
            "an empty table": [], "type is a number": [{"image": cell, **words(), "type": 3}], "image is a number": [{"image": 3, **words()}], "no bytes in it": [{"image": {"path": "x"}, **words()}],
            "a column is missing": [{"image": cell, "instruction": "x y"}], "a picture is missing": [{"image": cell, **words()}, {"image": None, **words()}],
            "nothing at the path": [{"image": {"bytes": None, "path": "gone.png"}, **words()}, {"image": cell, **words()}], "a large group": [{"image": cell, **words(i)} for i in range(4)],
            "a removal of nothing": [{"image": cell, **words(), "type": "remove"}],
        }[what]  # fmt: skip
        pyarrow = pytest.importorskip("pyarrow")
        if rows:
            write_rows(tmp_path / "p" / "a.parquet", rows)
        else:
            pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist([{"image": cell, **words()}]).slice(0, 0), tmp_path / "p" / "a.parquet")
        return tmp_path / "p"
    return out


SPOILED = {
    "cut in a picture": "000001.{kind}: not a whole .* write it again",
    "cut at an end": "000000.tar: not a whole tar shard .its end is missing",
    "no bytes": "000001.{kind}: not a whole",
    "a shard is missing": "4 requests in 1 shards, shards.json counts 6",
    "two kinds": "shards of two kinds .*parquet.*tar",
    "one level higher": "no shards in this folder; there are some in .*shards",
    "damaged index": "shards.json: damaged",
    "two pictures": "0 has 2 pictures .0.input.png, 0.output.png.; of unpaired data there is one",
    "no words": "0 has no words",
    "bad words": "0 has no words",
    "no picture": "0 has no picture",
    "an empty tar": "other.tar: an empty shard",
    "an empty table": "a.parquet: an empty shard",
    "type is a number": "columns type .int64. must hold text; are columns mixed up",
    "image is a number": "column image holds int64; it must hold paths, or structs",
    "no bytes in it": "column image holds struct<path: string>",
    "a column is missing": "lacks the columns caption, target_caption; it has image, instruction",
    "a picture is missing": "a.parquet: row 2 holds no picture",
    "nothing at the path": "no picture .*gone.png",
    "a large group": "row group of 4 rows has 0 MiB of pictures.*of at most 2 rows",
    "a removal of nothing": "row 1: the removal 'Make thing 0 red.' names no object",
}


@pytest.mark.parametrize("what", SPOILED)
def test_shards_that_cannot_be_used(what, manifest, tmp_path, monkeypatch):
    """One message that names the shard, from the trainer's reader, before any picture is decoded."""
    from vlmedit.data.manifest import read_manifest

    captioned = [replace(item, target_caption="after") for item in read_items(manifest)]
    for kind in ["tar", "parquet"] if what in ("cut in a picture", "no bytes", "a shard is missing") else ["tar"]:
        write_shards(captioned, tmp_path / kind / "shards", kind, 4)
        if what == "a large group":
            monkeypatch.setattr(sh, "GROUP_BYTES", 20_000)
        place = spoil_shards(what, tmp_path / kind / "shards", tmp_path)
        with pytest.raises(InputError, match=SPOILED[what].format(kind=kind)):
            read_manifest(place)


def test_tar_shards_are_webdatasets(manifest, tmp_path):
    """Files of one key stand together, picture before words, as webdataset groups them."""
    import tarfile

    (path,) = write_shards(read_items(manifest), tmp_path / "shards")
    with tarfile.open(path) as tar:
        names = tar.getnames()
    assert names[:4] == ["000000000.png", "000000000.json", "000000001.png", "000000001.json"]


def test_manifests_of_other_programs(tmp_path, manifest):
    """A byte order mark, Windows line ends and Unicode's own line breaks within a text are read; a folder in place of a manifest is told apart."""
    items = [Item("a.png", "Write \u2028 and \x85 on it.", "text", None, "a wall", "a wall with words"), Item("b.png", "Übermale es", "color", None, "x y z", "z y x")]
    write_items(items, tmp_path / "own.jsonl")
    assert [i.instruction for i in read_items(tmp_path / "own.jsonl")] == [i.instruction for i in items]
    (tmp_path / "foreign.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "own.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    assert read_items(tmp_path / "foreign.jsonl") == read_items(tmp_path / "own.jsonl")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "merged_edit_data.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([{"input_image_path": "a.png", "edit_instruction": "Make it red"}]).encode())
    assert [f.instruction for f in read_dataset(tmp_path / "set", "npedit")] == ["Make it red"]
    with pytest.raises(InputError, match="a folder, not a manifest; vlmedit data prepare makes one"):
        read_items(tmp_path / "set")
    (tmp_path / "set" / "manifest.jsonl").write_text("")
    with pytest.raises(InputError, match="a folder, not a manifest; name .*set/manifest.jsonl"):
        read_items(tmp_path / "set")


def test_wrong_manifests_are_refused(tmp_path, manifest):
    path = tmp_path / "m.jsonl"
    path.write_text('{"image": "a.png", "instruction": "x y"}\n[1]\n{"image": "a.png", "instruction": "Remove it", "type": "remove"}\n{"image": 3, "instruction": "x"}\n{"im')
    with pytest.raises(InputError) as caught:
        read_items(path)
    text = str(caught.value)
    assert "line 2" in text and 'line 3: the removal' in text and "line 4: image: must be a text" in text and "line 5" in text and "line 1:" not in text
    path.write_text("\n")
    with pytest.raises(InputError, match="empty manifest"):
        read_items(path)
    with pytest.raises(InputError, match="no shards in this folder"):
        list(read_shards(tmp_path))
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(InputError, match="no shards in this folder; unpack a.tar.gz to a plain .tar"):
        list(read_shards(tmp_path))
    with pytest.raises(InputError, match="gone.png: no such picture"):
        write_shards([Item(str(tmp_path / "gone.png"), "Make it red")], tmp_path / "s")
    (tmp_path / "half.png").write_bytes(b"\x89PNG and then nothing")
    with pytest.raises(InputError, match="half.png: not a picture"):
        write_shards([*read_items(manifest), Item(str(tmp_path / "half.png"), "Make it red")], tmp_path / "s")
    assert not (tmp_path / "s").exists()
