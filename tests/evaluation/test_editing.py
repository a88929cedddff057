"""Measuring: a perfect student, a copying one and judges of known opinion get the figures they must."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import SIDE, tiny_dit, tiny_pipeline

from vlmedit.data.batches import TEXT_LENGTH
from vlmedit.data.judge_lessons import lesson
from vlmedit.data.world import held_out, target_of
from vlmedit.evaluation import editing as module
from vlmedit.evaluation.editing import edit_examples, evaluate, evaluate_student, judge_against_oracle, judge_by_oracle
from vlmedit.evaluation.judge import ask_judge, evaluate_judge
from vlmedit.evaluation.teacher import evaluate_teacher, says_the_same
from vlmedit.flow import few_step_times, sample
from vlmedit.seeds import rng_for
from vlmedit.world.edits import EDIT_TYPES
from vlmedit.world.language import caption
from vlmedit.world.render import render
from vlmedit.world.scene import Scene, Thing, sample_scene
from vlmedit.world.tokenizer import encode

N = 64


class Opinion:
    """A judge whose logit margin is the same for every question and picture."""

    config = SimpleNamespace(side=32, yes_token_id=2, no_token_id=3)
    device = torch.device("cpu")

    def __init__(self, margin: float):
        self.margin = margin

    def get_image_features(self, pictures):
        return torch.zeros(len(pictures), 1, 1)

    def answer_logits(self, ids, image_features):
        assert len(ids) == len(image_features)
        logits = torch.zeros(len(ids), 8)
        logits[:, 2] = self.margin
        return logits


def reference_of(examples):
    return render([e.scene for e in examples])


def target_pictures(examples):
    return render([target_of(e, random.Random(i)) for i, e in enumerate(examples)])


def student(monkeypatch, draw):
    """Evaluate whoever draws `draw(examples)`."""
    monkeypatch.setattr(module, "edit_examples", lambda _, examples, *rest: (reference_of(examples), draw(examples)))
    return evaluate_student(None, Opinion(1.0), N)


# --- students whose success is known


def test_a_perfect_student_succeeds(monkeypatch):
    """Exact targets: success at least .98 over all eight types, kept pixels at 55 dB or more (the cap is 60), and a hacking gap that is
    the judge's mean probability of the right answer minus success."""
    metrics, judged = student(monkeypatch, target_pictures)
    assert metrics["success"] >= 0.98 and metrics["keep_psnr"] > 55 and metrics["manifold_psnr"] > 30 and metrics["on_manifold"] >= 0.98
    assert set(metrics["success_by_type"]) == set(EDIT_TYPES) and min(metrics["success_by_type"].values()) >= 7 / 8
    assert sum(metrics["success_by_type"].values()) / 8 == pytest.approx(metrics["success"])
    yes = torch.tensor(1.0).sigmoid().item()
    removals = 1 / 8  # asked whether the thing is there: this judge says yes, and is wrong
    assert metrics["judge_p_yes"]["edit"] == pytest.approx((1 - removals) * yes + removals * (1 - yes), abs=1e-5)
    assert metrics["judge_p_yes"]["identity"] == pytest.approx(yes, abs=1e-5)
    expected = (metrics["judge_p_yes"]["edit"] + metrics["judge_p_yes"]["identity"]) / 2 - metrics["success"]
    assert metrics["hacking_gap"] == pytest.approx(expected, abs=1e-5)
    done, kept = metrics["done"], metrics["kept"]
    against = judge_against_oracle(Opinion(1.0), judged)
    assert against == {"edit": pytest.approx(done - removals, abs=0.02), "identity": pytest.approx(kept, abs=1e-6), "n": N}


def test_a_copying_student_never_succeeds(monkeypatch):
    """References as outputs: success 0, done 0, kept nearly always, pixels equal to the cap; a judge that says yes is hacked by
    all it says."""
    metrics, _ = student(monkeypatch, reference_of)
    assert metrics["success"] == metrics["done"] == 0 and metrics["kept"] >= 0.95 and metrics["keep_psnr"] == pytest.approx(60)
    assert metrics["hacking_gap"] == pytest.approx((metrics["judge_p_yes"]["edit"] + metrics["judge_p_yes"]["identity"]) / 2, abs=1e-6)


def test_damage_lowers_keep_psnr_to_what_it_is():
    """A constant error of 0.2 in [-1, 1] where nothing may change is 20 dB; styles and customisations have no figure, and the mean
    leaves them out."""
    examples = held_out(6, 0, ("recolor", "nothing", "style"))
    reference = reference_of(examples)
    judged = judge_by_oracle(examples, reference, reference - 0.2 * reference.sign())
    assert judged.keep_psnr.isnan().tolist() == [False, False, True] * 2
    assert judged.keep_psnr[~judged.keep_psnr.isnan()].tolist() == pytest.approx([20.0] * 4, abs=0.01)


def test_questions_reach_the_judge_in_order():
    """Removals ask about the output alone; the rows are edit questions first, then identity questions; and batches do not matter."""
    examples = held_out(5, 0, ("remove", "recolor"))
    reference, output = reference_of(examples), target_pictures(examples)
    p = ask_judge(Opinion(2.0), examples, reference, output)
    yes = torch.tensor(2.0).sigmoid().item()
    assert p[0].tolist() == pytest.approx([1 - yes, yes, 1 - yes, yes, 1 - yes]) and p[1].tolist() == pytest.approx([yes] * 5)
    assert torch.equal(p, ask_judge(Opinion(2.0), examples, reference, output, batch=2))


# --- drawing and the pipeline's door


@pytest.mark.parametrize("reference_time", ("clean", "noisy"))
def test_edits_are_the_sampler_s(reference_time):
    """References are the scenes' renders. By Euler, outputs equal the flow sampled by hand with the reference's pixels given in every
    call (here they are encoded once, where time allows): to 1e-4."""
    dit, examples = tiny_dit(reference_time=reference_time), held_out(3, 0, EDIT_TYPES)
    reference, output = edit_examples(dit, examples, steps=3, seed=4, sampler="euler", shift=2.0)
    assert torch.equal(reference, render([e.scene for e in examples], SIDE))
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(4))
    text = encode([e.instruction for e in examples], TEXT_LENGTH)
    by_hand = sample(lambda x, t: dit(x, t, text, reference), noise, few_step_times(3, 2.0), "euler")
    torch.testing.assert_close(output, by_hand.clamp(-1, 1), atol=1e-4, rtol=0)


def test_edits_repeat_with_the_seed():
    """The re-noising sampler too: the global generator has no say."""
    dit, examples = tiny_dit(), held_out(3, 0, EDIT_TYPES)
    runs = [edit_examples(dit, examples, seed=seed)[1] for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and (runs[0] - runs[2]).abs().mean() > 1e-3


def test_evaluate_fills_every_field(monkeypatch):
    """What `vlmedit eval` promises, from a pipeline, with the pipeline's own time shift."""
    seen = []

    def watched(*args):
        seen.append(args)
        return edit_examples(*args)

    monkeypatch.setattr(module, "edit_examples", watched)
    metrics = evaluate(tiny_pipeline(shift=3.0), n=4, seed=7, steps=2, checkpoint="mine")
    assert {"success", "success_by_type", "keep_psnr", "manifold_psnr", "hacking_gap", "judge_p_yes", "seconds"} <= set(metrics)
    assert {k: metrics[k] for k in ("n", "seed", "steps", "checkpoint")} == {"n": 4, "seed": 7, "steps": 2, "checkpoint": "mine"}
    assert 0 <= metrics["success"] <= 1 and set(metrics["judge_p_yes"]) == {"edit", "identity"}
    assert seen[0][2:] == (2, 7, "renoise", 3.0)
    assert "hacking_gap" not in evaluate(tiny_pipeline(judge=False), n=2, steps=1)


# --- captions


SCENE = Scene((Thing("circle", "red"), Thing("square", "blue", "striped")), "grey", "night")


def test_a_caption_holds_in_any_order_and_nothing_else():
    """Order, place and size do not matter; every word does."""
    assert says_the_same(SCENE, replace(SCENE, things=SCENE.things[::-1]))
    assert says_the_same(SCENE, SCENE.with_thing(0, x=0.1, size=0.1))
    others = [SCENE.with_thing(0, **change) for change in ({"shape": "cross"}, {"color": "green"}, {"texture": "hollow"})]
    others += [replace(SCENE, background="white"), replace(SCENE, style="plain"), replace(SCENE, things=SCENE.things[:1])]
    others += [replace(SCENE, things=(*SCENE.things, SCENE.things[0]))]
    assert not any(says_the_same(SCENE, other) for other in others)


class Draughtsman:
    """A text-to-image model that knows every held-out caption's scene and flows straight to its render."""

    config = SimpleNamespace(side=32)

    def __init__(self, n: int, wrong: int = 0):
        rng = rng_for("held-out", "captions", 0)
        scenes = [sample_scene(rng) for _ in range(n)]
        texts = encode([caption(s) for s in scenes], TEXT_LENGTH)
        pictures = render(scenes)
        pictures[:wrong] = render([Scene((), "white")])
        self.known = {tuple(row): picture for row, picture in zip(texts.tolist(), pictures)}

    def parameters(self):
        yield torch.zeros(1)

    def encode_text(self, ids):
        return ids

    def __call__(self, x, t, text):
        goal = torch.stack([self.known.get(tuple(row), torch.zeros(3, 32, 32)) for row in text.tolist()])
        return (x - goal) / t.view(-1, 1, 1, 1)


def test_caption_fidelity_counts_right_pictures():
    """A model that draws every caption is faithful; one that draws nothing for 4 of 16 is so for the other 12."""
    perfect, pictures = evaluate_teacher(Draughtsman(16), 16, steps=2, guidance=1, batch=5)
    assert perfect["fidelity"] == perfect["shapes"] == 1 and perfect["manifold_psnr"] > 30 and len(pictures) == 16
    worse, _ = evaluate_teacher(Draughtsman(16, wrong=4), 16, steps=2, guidance=1, batch=5)
    assert worse["fidelity"] == worse["shapes"] == 0.75


def test_guidance_is_against_the_empty_caption():
    """With w = 2 this model's x0 is 2 c - u with u = 0: pictures twice as far from grey, clamped; fidelity suffers, the count does not."""
    metrics, pictures = evaluate_teacher(Draughtsman(4), 4, steps=1, guidance=2.0)
    expected = (2 * torch.stack(list(Draughtsman(4).known.values()))).clamp(-1, 1)
    torch.testing.assert_close(pictures, expected, atol=1e-5, rtol=0)
    assert metrics["n"] == 4 and metrics["guidance"] == 2.0


# --- the judge's own accuracy


def test_judge_accuracy_is_the_share_of_its_answers(monkeypatch):
    """A judge that always says yes is as accurate as yes is frequent, per question, over exactly the pairs asked for (6, in batches of
    4 and 2)."""
    got = evaluate_judge(Opinion(1.0), pairs=6, seed=3, batch=4)
    answers = {"edit": [], "identity": [], "presence": []}
    for b, size in enumerate((4, 2)):
        work = lesson(size, 32, "held-out", 3, b)
        answers["edit"] += work.answers[0::2].tolist()
        answers["identity"] += work.answers[1::2].tolist()
        answers["presence"] += work.single_answers.tolist()
    for name, given in answers.items():
        asked = [a for a in given if a >= 0]
        assert got[name] == pytest.approx(sum(asked) / len(asked)), name
    assert got["pairs"] == 6 and got["radius"] == 0
