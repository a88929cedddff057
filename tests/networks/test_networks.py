"""The DiT and the judge: reference cache, gradients, checkpointing, padding, causality. And the model card."""

import pytest
import torch
from helpers.tiny_models import pictures, saved_elements, tiny_dit, tiny_judge
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from vlmedit.methods.teacher import TeacherConfig
from vlmedit.networks.dit import DiT
from vlmedit.networks.judge import JudgeModel
from vlmedit.pipelines.card import KEYS, write_card
from vlmedit.world.tokenizer import encode

IDS = encode(["make the circle red", "remove the square"], 24)
QUESTIONS = ["is there a circle ?", "was this done : change the color of the striped circle to red ?"]


def call(dit, t=(0.3, 0.9), reference=None, ids=IDS):
    return dit(pictures(2, seed=1), torch.tensor(t), ids, pictures(2) if reference is None else reference)


# DiT


def test_clean_time_cache_equals_recomputation_at_every_time():
    """The reference's keys and values do not depend on t: one cache serves all calls."""
    dit = tiny_dit()
    cache = dit.encode_reference(pictures(2), dit.encode_text(IDS))
    for t in ((0.05, 0.5), (1.0, 0.7)):
        assert torch.allclose(call(dit, t, cache), call(dit, t), atol=1e-6)


def test_noisy_reference_depends_on_time_and_clean_does_not():
    text = lambda dit: dit.encode_text(IDS)
    for kind, moves in (("noisy", True), ("clean", False)):
        dit = tiny_dit(reference_time=kind)
        (early, _), (late, _) = (dit.encode_reference(pictures(2), text(dit), torch.full((2,), t))[-1] for t in (0.1, 0.9))
        assert ((early - late).abs().max() > 1e-3) == moves
    dit = tiny_dit(reference_time="noisy")
    t = torch.tensor([0.3, 0.9])
    assert torch.allclose(call(dit), call(dit, reference=dit.encode_reference(pictures(2), text(dit), t)), atol=1e-6)


def test_reference_and_text_and_time_matter():
    dit = tiny_dit()
    base = call(dit)
    assert (call(dit, reference=-pictures(2)) - base).abs().max() > 1e-3
    assert (call(dit, ids=IDS.flip(0)) - base).abs().max() > 1e-3
    assert (dit(pictures(2, seed=1), torch.tensor([0.3, 0.9]), IDS) - base).abs().max() > 1e-3  # no reference at all
    assert (call(dit, t=(0.4, 0.9))[0] - base[0]).abs().max() > 1e-3


def test_rows_of_a_batch_do_not_mix():
    dit = tiny_dit()
    alone = dit(pictures(2, seed=1)[1:], torch.tensor([0.9]), IDS[1:], pictures(2)[1:])
    assert torch.allclose(alone[0], call(dit)[1], atol=1e-5)


@pytest.mark.parametrize("cached", [True, False])
def test_gradient_reaches_reference_pixels_text_and_every_parameter(cached):
    dit, reference = tiny_dit(), pictures(2).requires_grad_()
    source = dit.encode_reference(reference, dit.encode_text(IDS)) if cached else reference
    call(dit, reference=source).square().mean().backward()
    assert all(g > 0 for g in reference.grad.flatten(1).norm(dim=1))
    rows = dit.text.embed.weight.grad.norm(dim=1)
    assert rows[IDS.unique()].min() > 0
    named = [(n, p) for n, p in dit.named_parameters() if not n.startswith("ground.")]  # the teacher's alone, see test_attack
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in named)


def test_gradient_to_the_reference_is_the_slope():
    """Against central differences, in float64."""
    dit = tiny_dit().double()
    reference, towards = pictures(1).double().requires_grad_(), pictures(1, seed=9).double()
    weight = pictures(1, seed=3).double()
    value = lambda r: (dit(pictures(1, seed=1).double(), torch.tensor([0.6]).double(), IDS[:1], r) * weight).sum()
    (gradient,) = torch.autograd.grad(value(reference), reference)
    with torch.no_grad():
        slope = (value(reference + 1e-5 * towards) - value(reference - 1e-5 * towards)) / 2e-5
    assert (gradient * towards).sum().item() == pytest.approx(slope.item(), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_gradient_checkpointing_keeps_gradients_and_saves_memory(training):
    """In train and eval mode alike: a frozen judge's or teacher's mode must not switch it off."""
    plain, frugal = tiny_dit(depth=4).train(training), tiny_dit(depth=4).train(training)
    frugal.enable_gradient_checkpointing()
    for dit in (plain, frugal):
        call(dit).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), frugal.parameters()):
        assert a.grad is b.grad is None if name.startswith("ground.") else torch.allclose(a.grad, b.grad, atol=1e-7), name
    stored, kept = (saved_elements(lambda: call(dit)) for dit in (plain, frugal))
    assert kept < stored / 3, (stored, kept)


def test_dit_refuses_a_bad_configuration():
    with pytest.raises(ValueError, match="side 18 is no multiple of patch 4"):
        DiT(side=18)
    with pytest.raises(ValueError, match="'dirty'; known: clean, noisy"):
        DiT(reference_time="dirty")


# judge


def test_judge_round_trip_through_transformers_auto_classes(tmp_path):
    judge = tiny_judge()
    judge.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).yes_token_id == judge.config.yes_token_id
    expected = judge.yes_no_margin(encode(QUESTIONS, 40), torch.stack((pictures(2), pictures(2, seed=1)), 1))
    for loader in (JudgeModel, AutoModel, AutoModelForImageTextToText):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is JudgeModel
        assert torch.equal(loaded.yes_no_margin(encode(QUESTIONS, 40), torch.stack((pictures(2), pictures(2, seed=1)), 1)), expected)


def test_margin_gradient_reaches_both_pictures_of_every_row():
    judge = tiny_judge()
    images = [pictures(2).requires_grad_(), pictures(2, seed=1).requires_grad_()]
    judge.yes_no_margin(encode(QUESTIONS, 40), torch.stack(images, 1)).sum().backward()
    assert all(row.norm() > 0 and row.isfinite().all() for image in images for row in image.grad)


def test_margin_does_not_depend_on_padding_or_company():
    judge, images = tiny_judge(), torch.stack((pictures(2), pictures(2, seed=1)), 1)
    together = judge.yes_no_margin(encode(QUESTIONS, 40), images)
    assert (together[0] - together[1]).abs() > 1e-3
    for i, question in enumerate(QUESTIONS):
        for length in (len(question.split()), 25, 40):
            alone = judge.yes_no_margin(encode([question], length), images[i : i + 1])
            assert torch.allclose(alone[0], together[i], atol=1e-5)
    assert torch.allclose(judge.yes_no_margin(encode(QUESTIONS[::-1], 30), images.flip(0)).flip(0), together, atol=1e-5)


def test_judge_text_is_causal():
    """A later word changes the logits from its own position on, and none before."""
    judge, images = tiny_judge(), pictures(1)[:, None]
    a, b = encode(["was this done : make the circle red ?"], 12), encode(["was this done : make the circle blue ?"], 12)
    place = (a != b)[0].nonzero().item()
    difference = (judge(a, images).logits - judge(b, images).logits).abs().amax(-1)[0]
    assert difference[:place].max() < 1e-5 and difference[place : place + 2].min() > 1e-3


def test_judge_features_computed_once_serve_many_questions():
    judge, images = tiny_judge(), torch.stack((pictures(1), pictures(1, seed=1)), 1)
    features = judge.get_image_features(images).expand(2, -1, -1)
    expected = judge.yes_no_margin(encode(QUESTIONS, 40), images.expand(2, -1, -1, -1, -1))
    assert torch.allclose(judge.yes_no_margin(encode(QUESTIONS, 40), image_features=features), expected, atol=1e-6)


def test_judge_labels_give_the_cross_entropy_of_the_answer():
    judge, images = tiny_judge(), pictures(2)[:, None]
    ids = encode(QUESTIONS, 16)
    last = (ids != 0).sum(1) - 1
    labels = torch.full_like(ids, -100)
    labels[torch.arange(2), last] = torch.tensor([judge.config.yes_token_id, judge.config.no_token_id])
    logits = judge.answer_logits(ids, images)
    expected = (logits.logsumexp(1) - logits[torch.arange(2), labels[torch.arange(2), last]]).mean()
    assert torch.allclose(judge(ids, images, labels=labels).loss, expected, atol=1e-5)


# model card

FACTS = dict(
    title="shapes: teacher", summary="Draws captions.", command="vlmedit train teacher", config=TeacherConfig(), seed=0, device="2 CPU cores",
    cpu_minutes=12.5, gpu_minutes=0, metrics={"fidelity": 0.961234, "n": 512}, license="mit", intended_use="Study.", limits=["Shapes only.", "32 pixels."],
)  # fmt: skip


def test_card_holds_every_fact_and_is_read_by_the_hub_library(tmp_path):
    path = write_card(tmp_path, FACTS)
    card = ModelCard.load(path)
    assert (card.data.license, card.data.library_name) == ("mit", "diffusers")
    for line in ("vlmedit train teacher", "| seed | 0 |", "| steps | 7000 |", "| CPU-minutes | 12.5 |", "| GPU-minutes | 0 |", "| fidelity | 0.9612 |", "- 32 pixels.", "Study."):
        assert line in card.text
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_card_refuses_gaps(tmp_path):
    for key in KEYS:
        with pytest.raises(ValueError, match=f"missing '{key}'"):
            write_card(tmp_path, {k: v for k, v in FACTS.items() if k != key})
    with pytest.raises(ValueError, match="unknown 'colour'"):
        write_card(tmp_path, {**FACTS, "colour": "red"})
    with pytest.raises(ValueError, match="save the checkpoint first"):
        write_card(tmp_path / "absent", FACTS)
    assert not list(tmp_path.iterdir())
