"""Benchmarks on local folders: layouts, scores recomputed by hand, answers that cannot be read, encoders against their stock forward, resuming."""

import io
import json
import math
import re

import numpy as np
import pytest
import torch
from helpers.photos import photo
from PIL import Image

from vlmedit import benchmarks as b
from vlmedit.cli import main
from vlmedit.errors import InputError
from vlmedit.networks.judges import load_judge
from vlmedit.testing import random_models as tiny

TASKS = ("color_alter", "subject-remove")


def write_gedit(folder, count=6, parquet=False):
    """A GEdit-Bench of `count` English cases and one Chinese one; every third is not in the intersection."""
    rows = []
    for i in range(count + 1):
        name = f"{i}.png"
        folder.mkdir(parents=True, exist_ok=True)
        photo(i).save(folder / name)
        row = {"task_type": TASKS[i % 2], "key": f"k{i}", "instruction": f"do it {i}", "instruction_language": "cn" if i == count else "en", "Intersection_exist": i % 3 > 0}
        rows.append({**row, "input_image": name})
    if not parquet:
        (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return folder
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    for row in rows:
        content = (folder / row["input_image"]).read_bytes()
        row["input_image"] = {"bytes": content, "path": row["input_image"]}
    (folder / "data").mkdir()
    pq.write_table(pyarrow.Table.from_pylist(rows), folder / "data" / "train-0.parquet")
    for path in folder.glob("*.png"):
        path.unlink()
    return folder


def write_edits(folder, count=6):
    for i in range(count):
        path = folder / "fullset" / TASKS[i % 2] / "en" / f"k{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(100 + i, (48, 32)).save(path)
    return folder


class Script:
    """A judge that gives set scores by case; `stop` is the call that is interrupted."""

    def __init__(self, scores=None, stop=None):
        self.scores, self.stop, self.calls, self.asked = scores or {}, stop, 0, []

    def write(self, images, texts, length):
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        out = []
        for row, text in zip(images, texts, strict=True):
            self.asked.append((len(row), text))
            assert all(r.shape == row[0].shape and r.abs().max() <= 1 for r in row)
            if text == b.PQ:
                out.append('{"score": [6, 9], "reasoning": "fine"}')
            elif found := re.search(r"do it (\d+)", text):
                sc = self.scores.get(int(found[1]), [int(found[1]), 8])
                out.append(sc if isinstance(sc, str) else f'Here: ```json\n{{"score": {sc}, "reasoning": "x"}}```')
            else:
                out.append("Brief reasoning: good.\nPrompt Compliance: 4\nVisual Seamlessness: 2\nPhysical & Detail Fidelity: 5")
        return out


@pytest.fixture
def gedit(tmp_path):
    return write_gedit(tmp_path / "gedit"), write_edits(tmp_path / "edits")


def run(gedit, out, judge, batch=2, partial=False, **models):
    pairs = b.find_edits(b.read_benchmark("gedit", gedit[0]), gedit[1], partial)
    list(b.measure("gedit", pairs, out, judge, batch=batch, **models))
    return json.loads((out / "result.json").read_text())


def test_scores_are_viescores(gedit, tmp_path):
    """Against the definitions by hand: the smaller sub-score of each pair, sqrt of their product per case, means by group, the mean of those,
    and the intersection alone; a case whose answer cannot be read counts in no mean and is counted."""
    result = run(gedit, tmp_path / "out", Script({3: "no idea", 4: [9, 2]}))
    sc = {0: 0, 1: 1, 2: 2, 4: 2, 5: 5}
    overall = {i: math.sqrt(v * 6) for i, v in sc.items()}
    mean = lambda values: sum(values) / len(values)
    for name, members in (("full", sc), ("intersection", [1, 2, 4, 5])):
        groups = {TASKS[g]: mean([overall[i] for i in members if i % 2 == g]) for g in (0, 1)}
        found = result["sets"][name]
        assert found["overall"]["groups"] == pytest.approx(groups) and found["overall"]["average"] == pytest.approx(mean(groups.values()))
        assert found["overall"]["mean"] == pytest.approx(mean([overall[i] for i in members])) and found["SC"]["mean"] == pytest.approx(mean([sc[i] for i in members]))
        assert found["PQ"]["average"] == 6 and found["overall"]["n"] == len(members)
    assert result["sets"]["full"]["n"] == 6 and result["sets"]["intersection"]["n"] == 4 and result["unreadable"] == 1
    kept = json.loads((tmp_path / "out" / "cases" / "k4.json").read_text())
    assert kept["sub-scores"] == [9, 2, 6, 9] and "```" in kept["said"]["sc"] and kept["group"] == "color_alter"
    assert Image.open(tmp_path / "out" / "contact.png").width > 800


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ('{"score": [7, 8]}', [7, 8]),
        ('I think {so}. {"reasoning": "a {b}", "score": [0, 10.0]} done', [0, 10]),
        ('{"score": [7]}', None),
        ('{"score": [7, 11]}', None),
        ('{"score": [-1, 3]}', None),
        ('{"score": ["7", "8"]}', None),
        ('{"score": [true, 3]}', None),
        ('{"score": [7, 8', None),
        ("7 and 8", None),
        ("", None),
    ],
)
def test_answers_are_read_or_not(text, scores):
    assert b.parse_scores(text) == scores


def test_imgedits_lines():
    assert b.parse_lines("Brief reasoning: 3 cats.\nStyle Fidelity: 1\nContent: 5\n**Rendering Quality:** 3") == 3.0
    assert b.parse_lines("Quality: 4/5\nOther: 9\nfine") == 4.0 and b.parse_lines("no scores here") is None


@pytest.mark.parametrize("parquet", [False, True])
def test_gedits_layout(parquet, tmp_path):
    cases = b.read_benchmark("gedit", write_gedit(tmp_path / "g", parquet=parquet))
    assert [(c.key, c.group, c.instruction, c.intersection) for c in cases] == [(f"k{i}", TASKS[i % 2], f"do it {i}", i % 3 > 0) for i in range(6)]
    assert all(np.array_equal(np.asarray(c.reference()), np.asarray(photo(i))) for i, c in enumerate(cases))
    assert cases[0].edits == ("fullset/color_alter/en/k0.png", "k0.png")
    assert [c.key for c in b.read_benchmark("gedit", tmp_path / "g", "cn")] == ["k6"]


def test_imgedits_layout(tmp_path):
    """The benchmark's own questions are put to the judge beside VIEScore's, and their scores averaged by type."""
    folder = tmp_path / "Benchmark" / "singleturn"
    (folder / "animal").mkdir(parents=True)
    photo(1).save(folder / "animal" / "1.jpg")
    (folder / "singleturn.json").write_text(json.dumps({"1082": {"id": "animal/1.jpg", "prompt": "do it 3", "edit_type": "adjust"}, "7": {"id": "animal/1.jpg", "prompt": "do it 4", "edit_type": "style"}}))
    (folder / "judge_prompt.json").write_text(json.dumps({"adjust": "Grade this: <edit_prompt>."}))
    cases = b.read_benchmark("imgedit", tmp_path)
    assert [(c.key, c.group, c.edits[0]) for c in cases] == [("1082", "adjust", "1082.png"), ("7", "style", "7.png")] and cases[0].question == "Grade this: do it 3."
    for key in ("1082", "7"):
        photo(50).save(tmp_path / f"{key}.png")

    class Grader(Script):
        def write(self, images, texts, length):
            return ["Compliance: 4\nSeamless: 2" if t.startswith("Grade") else super(Grader, self).write([r], [t], length)[0] for r, t in zip(images, texts)]

    list(b.measure("imgedit", b.find_edits(cases, tmp_path), tmp_path / "out", Grader()))
    found = json.loads((tmp_path / "out" / "result.json").read_text())["sets"]
    assert found["full"]["ImgEdit"]["groups"] == {"adjust": 3.0} and found["full"]["SC"]["groups"] == {"adjust": 3.0, "style": 4.0} and "intersection" not in found


@pytest.mark.parametrize("place", ["singleturn/judge_prompt.json", "judge_prompt.json", "prompts.json"])
def test_imgedits_own_questions(place, tmp_path):
    """They are found beside the list of edits or above it, under both published names, with the pictures beside it or in singleturn/. A case
    whose question has changed is judged again, and two runs with other questions have no case in common."""
    folder = tmp_path / "Benchmark"
    (folder / "singleturn" / "animal").mkdir(parents=True)
    photo(1).save(folder / "singleturn" / "animal" / "1.jpg")
    listed = folder / ("basic_edit.json" if place == "prompts.json" else "singleturn/singleturn.json")
    listed.write_text(json.dumps({"7": {"id": "animal/1.jpg", "prompt": "paint it", "edit_type": "adjust"}}))
    (folder / place).write_text(json.dumps({"adjust": "Grade this: <edit_prompt>."}))
    photo(50).save(tmp_path / "7.png")

    def measured(out):
        judge, cases = Script(), b.read_benchmark("imgedit", folder)
        list(b.measure("imgedit", b.find_edits(cases, tmp_path), out, judge))
        return [t for _, t in judge.asked]

    assert "Grade this: paint it." in measured(tmp_path / "out") and not measured(tmp_path / "out")
    assert json.loads((tmp_path / "out/result.json").read_text())["sets"]["full"]["ImgEdit"]["mean"] == pytest.approx(11 / 3)
    (folder / place).write_text(json.dumps({"adjust": "Rate this: <edit_prompt>."}))
    assert "Rate this: paint it." in measured(tmp_path / "out")
    (folder / place).unlink()
    assert measured(tmp_path / "without") and b.compare(tmp_path / "out", tmp_path / "without")["cases"] == 0


def write_dreambooth(folder):
    (folder / "dataset").mkdir(parents=True)
    for subject in ("dog6", "can"):
        (folder / "dataset" / subject).mkdir()
        for i in range(2):
            photo(i + (subject == "can") * 5).save(folder / "dataset" / subject / f"{i:02d}.jpg")
    (folder / "dataset" / "prompts_and_classes.txt").write_text(
        "Classes\nsubject_name,class\ncan,can\ndog6,dog\nvase,vase\n\nPrompts\nObject Prompts\nprompt_list = [\n'a {0} {1} in the jungle'.format(unique_token, class_token),\n"
        "'a red {0} {1}'.format(unique_token, class_token)\n]\nLive Subject Prompts\nprompt_list = [\n'a {0} {1} wearing a red hat'.format(unique_token, class_token)]\n"
    )
    return folder


def test_dreambooths_layout(tmp_path):
    cases = b.read_benchmark("dreambooth", write_dreambooth(tmp_path / "d"))
    assert [(c.key, c.group, c.instruction, c.edits[0], len(c.others)) for c in cases] == [
        ("can-00", "can", "a can in the jungle", "can/00.png", 2), ("can-01", "can", "a red can", "can/01.png", 2), ("dog6-00", "dog6", "a dog wearing a red hat", "dog6/00.png", 2),
    ]  # fmt: skip


# encoders


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return {name: b.Encoder(str(tiny.save_encoder(name, folder / name))) for name in ("clip", "dino")}


def test_cosines_are_the_models_own(encoders, tmp_path):
    """CLIP-T and CLIP-I against the stock forward's own embeddings on one picture at a time, DINO against its class token; CLIP-I with several
    pictures of a subject is their mean; a picture compared with itself gives 1."""
    clip, dino = encoders["clip"], encoders["dino"]
    cases = b.read_benchmark("dreambooth", write_dreambooth(tmp_path / "d"))[:2]
    references, edited = [c.reference() for c in cases], [photo(30, (40, 70)), photo(31)]
    rows = b.encode_cases(clip, dino, cases, references, edited)
    cosine = lambda x, y: torch.nn.functional.cosine_similarity(x, y).item()
    with torch.no_grad():
        for row, case, edit in zip(rows, cases, edited):
            ids = clip.tokenizer([case.instruction], return_tensors="pt")
            embed = lambda image, ids=ids: clip.model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], pixel_values=clip.processor([image], return_tensors="pt")["pixel_values"])
            after, known = embed(edit), [b.open_picture(p) for p in case.others]
            token = lambda image: dino.model(pixel_values=dino.processor([image], return_tensors="pt")["pixel_values"]).last_hidden_state[:, 0]
            assert row["CLIP-T"] == pytest.approx(cosine(after.text_embeds, after.image_embeds), abs=1e-5)
            assert row["CLIP-I"] == pytest.approx(sum(cosine(embed(k).image_embeds, after.image_embeds) for k in known) / 2, abs=1e-5)
            assert row["DINO"] == pytest.approx(sum(cosine(token(k), token(edit)) for k in known) / 2, abs=1e-5)
    assert abs(rows[0]["CLIP-T"] - rows[1]["CLIP-T"]) > 1e-4
    alone = b.encode_cases(clip, dino, [b.Case("x", "g", "a cat", lambda: photo(3), ())], [photo(3)], [photo(3)])[0]
    assert alone["CLIP-I"] == pytest.approx(1, abs=1e-5) and alone["DINO"] == pytest.approx(1, abs=1e-5) and alone["CLIP-T"] < 0.99
    assert torch.isfinite(clip.texts(["word " * 300])).all()
    with pytest.raises(InputError, match="ViTModel has no words"):
        dino.texts(["a"])


# runs


def test_a_stopped_run_goes_on(gedit, tmp_path):
    """Interrupted between batches: the next run judges what is left, and the result is that of a run that was never stopped. A changed edit is
    judged again, and it alone; a finished run asks nothing."""
    whole = run(gedit, tmp_path / "whole", Script())
    with pytest.raises(KeyboardInterrupt):
        run(gedit, tmp_path / "out", Script(stop=4))
    again = Script()
    assert run(gedit, tmp_path / "out", again) == whole and len(again.asked) == 2 * 4
    photo(77).save(gedit[1] / "fullset" / TASKS[1] / "en" / "k3.png")
    third = Script()
    run(gedit, tmp_path / "out", third)
    assert [t for n, t in third.asked if n == 2] == [b.SC.format(instruction="do it 3")]
    last = Script()
    run(gedit, tmp_path / "out", last)
    assert last.calls == 0


def test_two_runs_are_compared_case_by_case(gedit, tmp_path, encoders):
    """Against the definitions by hand: means, their difference, its standard error and the share of better cases, over the cases that both
    runs could read; a run with another judge or encoder is refused before anything is judged."""
    run(gedit, tmp_path / "one", Script())
    run(gedit, tmp_path / "two", Script({0: [4, 8], 1: [1, 1], 2: [9, 9], 3: "no idea"}))
    found = b.compare(tmp_path / "two", tmp_path / "one")
    two, one = np.array([4, 1, 9, 4, 5]), np.array([0, 1, 2, 4, 5])
    off = two - one
    expected = {"here": two.mean(), "there": one.mean(), "difference": off.mean(), "standard error": off.std(ddof=1) / 5**0.5, "better": 0.7, "n": 5}
    assert found["cases"] == 6 and found["metrics"]["SC"] == pytest.approx(expected)
    judge = Script()
    pairs = b.find_edits(b.read_benchmark("gedit", gedit[0]), gedit[1])
    with pytest.raises(InputError, match="one: measured with another dino; such numbers do not compare"):
        list(b.measure("gedit", pairs, tmp_path / "three", judge, dino=encoders["dino"], against=[tmp_path / "one"]))
    assert not judge.asked and not (tmp_path / "three").exists()
    with pytest.raises(InputError, match="no run of vlmedit bench"):
        b.compare(tmp_path / "one", tmp_path)


def test_a_run_that_came_to_nothing_binds_nobody(gedit, tmp_path, encoders):
    """The record holds from the first case on; records and cases that are damaged are named."""
    with pytest.raises(KeyboardInterrupt):
        run(gedit, tmp_path / "out", Script(stop=1))
    run(gedit, tmp_path / "out", Script(), dino=encoders["dino"])
    for name in ("cases/k1.json", "record.json"):
        whole = (tmp_path / "out" / name).read_text()
        (tmp_path / "out" / name).write_text(whole[:20])
        with pytest.raises(InputError, match=f"{name}: damaged .*delete it"):
            run(gedit, tmp_path / "out", Script(), dino=encoders["dino"])
        (tmp_path / "out" / name).write_text(whole)


def test_pictures_are_checked_before_any_is_judged(gedit, tmp_path):
    """Edits and references that are no pictures, and a subject without any, are all named at once by their headers."""
    (gedit[1] / "fullset" / TASKS[1] / "en" / "k5.png").write_bytes(b"\x89PNG broken")
    judge = Script()
    with pytest.raises(InputError, match="k5.png: not a picture .*make it again"):
        run(gedit, tmp_path / "out", judge)
    assert not judge.asked
    (gedit[0] / "1.png").unlink()
    (gedit[0] / "2.png").write_text("words")
    with pytest.raises(InputError) as found:
        b.read_benchmark("gedit", gedit[0])
    assert len(found.value.problems) == 2 and "1.png: no such picture; download" in str(found.value) and "2.png: not a picture" in str(found.value)
    folder = write_dreambooth(tmp_path / "d")
    for path in (folder / "dataset" / "can").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="can: no picture of this subject"):
        b.read_benchmark("dreambooth", folder)


def test_pictures_are_judged_as_the_trainer_sees_them(tmp_path):
    """16 bits are scaled, not clipped; what is transparent is paper."""
    Image.fromarray(np.full((32, 32), 32768, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "glass.png")
    assert np.asarray(b.open_picture(tmp_path / "deep.png")).mean() == pytest.approx(128, abs=1) and np.asarray(b.open_picture(tmp_path / "glass.png")).min() == 255


def test_the_judge_is_on_record(gedit, tmp_path, encoders):
    """Class, weights and questions are written down; another judge in the same folder is refused, for the numbers would not compare."""
    judge = load_judge(tiny.save_judge("internvl", tmp_path / "j"))
    run(gedit, tmp_path / "out", judge, batch=6)
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["judge"]["class"] == "InternVLForConditionalGeneration" and record["temperature"] == 0 and record["dino"] is None
    with pytest.raises(InputError, match="another judge; name a new folder"):
        run(gedit, tmp_path / "out", load_judge(tiny.save_judge("internvl", tmp_path / "j2", seed=1)))
    with pytest.raises(InputError, match="another dino"):
        run(gedit, tmp_path / "out", judge, dino=encoders["dino"])


def test_command_line(gedit, tmp_path, capsys):
    """A tiny judge talks nonsense: nothing is scored, it is said so, and CLIP and DINO are measured all the same; a second run with --json gives
    the same numbers."""
    for name in ("clip", "dino"):
        tiny.save_encoder(name, tmp_path / name)
    tiny.save_judge("qwen2.5-vl", tmp_path / "judge")
    words = ["bench", "gedit", str(gedit[0]), "--edits", str(gedit[1]), "--out", str(tmp_path / "out"), "--judge", str(tmp_path / "judge"), "--batch", "6", "--side", "32"]
    words += ["--clip", str(tmp_path / "clip"), "--dino", str(tmp_path / "dino")]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "6 of 6 answers of the judge could not be read" in said.err and "CLIP-I" in said.out
    assert main([*words, "--json", str(tmp_path / "r.json")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["unreadable"] == 6 and "SC" not in result["sets"]["full"] and -1 <= result["sets"]["full"]["DINO"]["average"] <= 1
    assert result == json.loads((tmp_path / "out" / "result.json").read_text()) and result["sets"]["full"]["CLIP-T"]["n"] == 6


def test_what_cannot_be_measured_is_refused(gedit, tmp_path, capsys):
    """Missing edits, broken pictures, wrong folders, no model, no encoder: one error each, before any model is read where possible."""
    base = ["bench", "gedit", str(gedit[0]), "--edits", str(gedit[1]), "--out", str(tmp_path / "out")]
    (gedit[1] / "fullset" / TASKS[0] / "en" / "k2.png").unlink()
    for words, message in (
        (base, "name a --judge, a --clip or a --dino"),
        ([*base, "--judge", "x"], "1 of 6 edits are missing, for example fullset/color_alter/en/k2.png; --partial"),
        ([*base, "--judge", "someone/judge", "--partial"], "--judge someone/judge: no vision-language model"),
        ([*base, "--clip", str(gedit[0]), "--partial"], "not a picture encoder"),
        ([*base, "--clip", str(tiny.save_encoder("dino", tmp_path / "dino")), "--partial"], "is ViTModel, which has no words; name a CLIP"),
        ([*base, "--dino", str(tiny.save_encoder("clip", tmp_path / "clip")), "--partial"], "is CLIPModel, which has words; name a DINO"),
        ([*base, "--judge", "x", "--model", "shapes"], "--model shapes: no editor of real models that vlmedit export wrote"),
        ([*base, "--judge", "x", "--against", "nowhere"], "--against nowhere: no result.json of a finished vlmedit bench"),
        ([*base, "--judge", "x", "--seed", "-1"], "--seed is -1"),
        (["bench", "imgedit", *base[2:], "--judge", "x"], "no singleturn.json"),
        (["bench", "dreambooth", *base[2:], "--judge", "x"], "no prompts_and_classes.txt"),
        ([*base, "--judge", "x", "--language", "cn"], "1 of 1 edits are missing"),
        (["bench", "gedit", "nowhere", *base[3:], "--judge", "x"], "nowhere: no such folder"),
        (["bench", "gedit", str(gedit[1]), *base[3:], "--judge", "x"], "not laid out as gedit publishes it"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(gedit, tmp_path / "out", Script(), partial=True)["cases"] == 5


def test_keys_become_safe_names(tmp_path):
    names = {b._file(tmp_path, key).name for key in ("a/b", "a_b", "../x", "k" * 300, "plain")}
    assert len(names) == 5 and all("/" not in n and len(n) < 140 for n in names) and "plain.json" in names


def test_pictures_from_inside_files_are_named_when_broken():
    with pytest.raises(InputError, match="a picture of the benchmark: not a picture"):
        b.open_picture(io.BytesIO(b"no").getvalue())
