"""The judge's loss: two logits and their gain, pixels that keep their gradient, and each question asked of the right pictures."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import SIDE, pictures, requests, tiny_judge

from vlmedit.data.batches import UnpairedBatch
from vlmedit.equations.judge_loss import (
    ANSWER_LOSSES,
    answer_logits,
    gain_ramp,
    judge_loss,
    see,
    vocabulary_loss,
    yes_no_loss,
)
from vlmedit.teaching import exercises

GAINS = (0.1, 0.55, 1.0)


def many(n: int = 1000, spread: float = 8.0):
    """Random [No, Yes] logits (n, 2) and right answers (n,), float64."""
    g = torch.Generator().manual_seed(0)
    return spread * torch.randn(n, 2, generator=g, dtype=torch.float64), torch.randint(2, (n,), generator=g).double()


# --- the two-logit loss


@pytest.mark.parametrize("gain", GAINS)
def test_two_logit_loss_is_the_two_class_cross_entropy(gain):
    """-log sigmoid(gain (l_a - l_not_a)), which is the cross-entropy over [No, Yes] with the logits multiplied by the gain, as the
    released critic computes it: to 1e-8 (softplus is a line above 20, where e^-20 = 2e-9 is left out)."""
    no_yes, answer = many()
    margin = no_yes[:, 1] - no_yes[:, 0]
    ours = yes_no_loss(margin, answer, gain)
    right = torch.where(answer > 0, margin, -margin)
    torch.testing.assert_close(ours, -F.logsigmoid(gain * right), atol=1e-8, rtol=0)
    torch.testing.assert_close(ours, F.cross_entropy(gain * no_yes, answer.long(), reduction="none"), atol=1e-8, rtol=0)


def test_descent_pulls_towards_the_right_answer():
    """Where Yes is right the loss falls as the margin rises; where No is right (a removal's edit question) as it falls."""
    margin = torch.tensor([0.3, 0.3], dtype=torch.float64, requires_grad=True)
    yes_no_loss(margin, torch.tensor([1.0, 0.0])).sum().backward()
    yes = torch.sigmoid(torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(margin.grad, torch.stack((yes - 1, yes)), atol=1e-12, rtol=0)


def test_gain_scales_the_slope():
    """At margin 0 the slope is -gain / 2."""
    for gain in (0.1, 0.5, 1.0):
        margin = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        yes_no_loss(margin, torch.ones(1), gain).backward()
        assert margin.grad.item() == pytest.approx(-gain / 2, abs=1e-12)


def test_gain_ramp_numbers():
    """0.1 at the start, 0.55 half way, 1 at the end and ever after; with no ramp always 1 [npedit critic.py, 2000 updates]."""
    assert [gain_ramp(s, 2000) for s in (0, 500, 1000, 2000, 14_000)] == pytest.approx([0.1, 0.325, 0.55, 1.0, 1.0], abs=1e-12)
    assert gain_ramp(0, 0) == 1.0


def test_the_exercise_s_loss_is_the_package_s():
    """`exercises.ANSWER_LOSS` on logits equals `yes_no_loss` on their margin, to 1e-12, wherever the two words stand."""
    g = torch.Generator().manual_seed(1)
    logits, answer = 4 * torch.randn(500, 9, generator=g, dtype=torch.float64), torch.randint(2, (500,), generator=g).double()
    for yes, no, gain in ((2, 3, 1.0), (7, 0, 0.1)):
        ours = exercises.ANSWER_LOSS.reference(logits, answer, yes, no, gain)
        torch.testing.assert_close(ours, yes_no_loss(logits[:, yes] - logits[:, no], answer, gain), atol=1e-12, rtol=0)


# --- the vocabulary loss


@pytest.mark.parametrize("gain", GAINS)
def test_vocabulary_loss_is_never_below_the_two_logit_loss(gain):
    """It adds every other word to the denominator: strictly above with finite logits, equal when the others are impossible."""
    g = torch.Generator().manual_seed(0)
    logits, answer = 3 * torch.randn(1000, 12, generator=g, dtype=torch.float64), torch.randint(2, (1000,), generator=g).double()
    two = yes_no_loss(logits[:, 2] - logits[:, 3], answer, gain)
    assert (vocabulary_loss(logits, answer, 2, 3, gain) > two).all()
    logits[:, [0, 1, *range(4, 12)]] = -1e9
    torch.testing.assert_close(vocabulary_loss(logits, answer, 2, 3, gain), two, atol=1e-8, rtol=0)


# --- what the judge sees


def test_straight_through_clamp_keeps_the_gradient_of_saturated_pixels():
    """Values are clamped either way; a pixel at 1.5 keeps gradient 1 with `straight_through` and loses it without."""
    for straight, gradient in ((True, 1.0), (False, 0.0)):
        x = torch.full((1, 3, SIDE, SIDE), 1.5, requires_grad=True)
        seen = see(x, SIDE, straight)
        torch.testing.assert_close(seen.detach(), torch.ones_like(x.detach()), atol=1e-6, rtol=0)
        seen.sum().backward()
        assert (x.grad == gradient).all()
    inside = pictures(2)
    torch.testing.assert_close(see(inside, SIDE), inside, atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", (8, 12))
def test_resizing_is_differentiable(side):
    """Down and up by bicubic: autograd equals finite differences in float64; a constant picture stays constant, to 1e-6."""
    x = 0.9 * torch.tanh(torch.randn(1, 1, 10, 10, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda v: see(v, side), x.requires_grad_(), eps=1e-6, atol=1e-7)
    flat = see(torch.full((1, 3, 10, 10), 0.4), side)
    assert flat.shape == (1, 3, side, side)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.4), atol=1e-6, rtol=0)


# --- the questions


@pytest.fixture(scope="module")
def judge():
    return tiny_judge().requires_grad_(False)


@pytest.fixture(scope="module")
def mixed() -> UnpairedBatch:
    """Six requests, two of them removals."""
    return requests("recolor", "move", "remove", "remove", "add", "background")


def test_mixed_questions_equal_each_asked_alone(judge, mixed):
    """Per row as a direct forward of the judge on that row's own pictures: the output alone for a removal's edit question, both
    pictures for all others; to 1e-5. Rows, answers and their order are as documented."""
    output = pictures(6, 1)
    logits, answers, owners = answer_logits(judge, mixed, output)
    assert mixed.edit_pair.tolist() == [1, 1, 0, 0, 1, 1]
    assert answers.tolist() == [1, 1, 0, 0, 1, 1] + [1] * 6 and owners.tolist() == [*range(6)] * 2
    both = torch.stack((mixed.reference, output), 1)
    for i in range(6):
        shown = both[i : i + 1] if mixed.types[i] != "remove" else output[i : i + 1, None]
        trimmed = lambda ids: ids[i : i + 1, : int((ids[i] != 0).sum())]
        edit = judge(trimmed(mixed.edit_question), pixel_values=shown).logits[:, -1]
        identity = judge(trimmed(mixed.identity_question), pixel_values=both[i : i + 1]).logits[:, -1]
        torch.testing.assert_close(logits[[i, 6 + i]], torch.cat((edit, identity)), atol=1e-5, rtol=0)


def test_without_the_identity_question_only_edits_are_asked(judge, mixed):
    full, edits = answer_logits(judge, mixed, pictures(6, 1)), answer_logits(judge, mixed, pictures(6, 1), identity=False)
    assert all(torch.equal(a[:6], b) for a, b in zip(full, edits)) and len(edits[0]) == 6


def test_a_removal_s_edit_question_ignores_the_reference(judge, mixed):
    """With other references the logits of removals' edit questions stay, exactly; all other rows change."""
    one, _, _ = answer_logits(judge, mixed, pictures(6, 1))
    two, _, _ = answer_logits(judge, replace(mixed, reference=pictures(6, 9)), pictures(6, 1))
    changed = (one != two).any(1).tolist()
    assert changed == [True, True, False, False, True, True] + [True] * 6


def test_larger_pictures_are_resized_for_the_judge(judge, mixed):
    """Pictures of twice the judge's side are answered as their resized versions."""
    large = replace(mixed, reference=pictures(6, 2, 2 * SIDE))
    small = replace(mixed, reference=see(large.reference, SIDE).clamp(-1, 1))
    output = 0.5 * pictures(6, 3, 2 * SIDE)
    torch.testing.assert_close(answer_logits(judge, large, output)[0], answer_logits(judge, small, see(output, SIDE))[0], atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", ANSWER_LOSSES)
def test_loss_is_the_mean_over_questions_and_batch(judge, mixed, kind):
    """Recomputed from the logits; the probabilities are of the RIGHT answer, one row per question, and gain leaves them alone."""
    output = pictures(6, 1)
    loss, right = judge_loss(judge, mixed, output, 0.4, answer_loss=kind)
    logits, answers, _ = answer_logits(judge, mixed, output)
    pair = logits[:, [judge.config.no_token_id, judge.config.yes_token_id]]
    target = answers.long() if kind == "two_logits" else torch.where(answers > 0, judge.config.yes_token_id, judge.config.no_token_id)
    expected = F.cross_entropy(0.4 * (pair if kind == "two_logits" else logits), target)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(right.flatten(), pair.softmax(1)[torch.arange(12), answers.long()], atol=1e-6, rtol=0)
    assert right.shape == (2, 6) and not right.requires_grad
    assert judge_loss(judge, mixed, output, identity=False, answer_loss=kind)[1].shape == (1, 6)


@pytest.mark.parametrize("kind", ANSWER_LOSSES)
def test_gradient_reaches_the_pixels_and_not_a_frozen_judge(judge, mixed, kind):
    """Every output picture, saturated pixels included, has a gradient; no weight of the judge does; the reference asks for none."""
    output = (3 * pictures(6, 1)).requires_grad_()
    judge_loss(judge, mixed, output, answer_loss=kind)[0].backward()
    assert (output.grad.flatten(1).norm(dim=1) > 0).all() and (output.grad[output.abs() > 1] != 0).float().mean() > 0.99
    assert all(p.grad is None for p in judge.parameters()) and mixed.reference.grad is None


def test_gradient_step_makes_the_judge_say_the_right_answer_more(judge, mixed):
    """Descending the pixels a little lowers the loss and raises the mean probability of the right answers: the sign is right
    for both kinds of answer."""
    output = pictures(6, 1).requires_grad_()
    loss, before = judge_loss(judge, mixed, output)
    (gradient,) = torch.autograd.grad(loss, output)
    step = 0.3 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    later, after = judge_loss(judge, mixed, (output - step).detach())
    assert later < loss and (after.mean(0) > before.mean(0)).all()


def test_unknown_answer_loss(judge, mixed):
    with pytest.raises(ValueError, match="unknown answer loss 'hinge'; known: two_logits, vocabulary"):
        judge_loss(judge, mixed, pictures(6), answer_loss="hinge")
