"""Editing by captions alone: worlds of one picture per caption, where every method has a closed form; and the teacher's own calls."""

import pytest
import torch
from helpers.tiny_models import SIDE, tiny_dit

from vlmedit.data.batches import TEXT_LENGTH
from vlmedit.data.world import held_out
from vlmedit.equations.training_free import EDITORS, calls, flowedit, guided, inversion, invert, sdedit, times_below
from vlmedit.evaluation.editing import edit_by_captions
from vlmedit.flow import sample
from vlmedit.world.edits import EDIT_TYPES
from vlmedit.world.render import render
from vlmedit.world.tokenizer import encode


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def only(picture):
    """The flow of a caption of which there is one picture: v = (x - picture) / t."""
    return lambda x, t: (x - picture) / t.view(-1, 1, 1, 1)


def gaussian(mean, std):
    """The flow whose data are N(mean, std^2)."""

    def velocity(x, t):
        t = t.view(-1, 1, 1, 1)
        x0 = mean + (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2) * (x - (1 - t) * mean)
        return (x - x0) / t

    return velocity


Y, SOURCE, TARGET = double(2, 3, 4, 4), double(2, 3, 4, 4, seed=1), double(2, 3, 4, 4, seed=2)
FLOWS = gaussian(SOURCE, 0.5), gaussian(TARGET, 0.5)


def test_sdedit_of_a_one_picture_world_is_that_picture():
    """Whatever the reference: to 1e-9. And it never asks what the reference shows."""
    found = sdedit(None, only(TARGET), Y, start=0.6, steps=5)
    torch.testing.assert_close(found, TARGET, atol=1e-9, rtol=0)


def test_sdedit_keeps_more_the_later_it_starts():
    """Distance to the reference grows with `start`; at 0.02 it is below 0.1, at 0.9 the target is nearer than the reference."""
    draw = lambda start: sdedit(None, FLOWS[1], Y, start=start, steps=20, generator=torch.Generator().manual_seed(0))
    away = [(draw(start) - Y).square().mean().sqrt() for start in (0.02, 0.3, 0.6, 0.9)]
    assert away[0] < 0.1 and sorted(away) == away
    assert (draw(0.9) - TARGET).square().mean() < (draw(0.9) - Y).square().mean()


def test_the_backward_step_undoes_the_sampler_s():
    """On a Gaussian flow at 15 steps from 0.8: forwards again gives the reference to 1e-9 after 200 iterations, to 1e-3 after 10, and
    one (DDIM inversion) is worse than ten."""
    times = times_below(0.8, 15)
    error = lambda k: (sample(FLOWS[0], invert(FLOWS[0], Y, times, k), times) - Y).abs().max().item()
    assert error(200) < 1e-9 and error(10) < 1e-3 < error(1)


def test_inversion_under_one_caption_changes_nothing_and_under_two_moves_to_the_other():
    """The same flow there and back is the identity; between Gaussians of one width, the exact flow moves a picture by the difference
    of their means (to 2 % of it in 200 steps from 0.99)."""
    torch.testing.assert_close(inversion(FLOWS[0], FLOWS[0], Y, 0.8, 10, 300), Y, atol=1e-9, rtol=0)
    moved = inversion(*FLOWS, Y, start=0.99, steps=200, iterations=50) - Y
    assert (moved - (TARGET - SOURCE)).norm() < 0.02 * (TARGET - SOURCE).norm()


def test_flowedit_under_one_caption_is_the_reference_to_the_bit():
    """Equal flows cancel at every step, whatever the noise: mutants that forget y in z + y_t - y would not."""
    assert torch.equal(flowedit(FLOWS[0], FLOWS[0], torch.zeros_like(Y), average=2), torch.zeros_like(Y))
    torch.testing.assert_close(flowedit(FLOWS[0], FLOWS[0], Y), Y, atol=1e-12, rtol=0)


def test_flowedit_adds_the_difference_of_the_captions_pictures():
    """In worlds of one picture per caption: y + target - source, to 1e-9, for any start, steps and noise."""
    for start, steps, average in ((0.3, 1, 1), (0.8, 7, 1), (1.0, 15, 3)):
        found = flowedit(only(SOURCE), only(TARGET), Y, start, steps, average)
        torch.testing.assert_close(found, Y + TARGET - SOURCE, atol=1e-9, rtol=0)


def test_averaging_makes_flowedit_steadier():
    """The spread over noises falls with their number: 16 per step against 1, by more than half."""
    spread = lambda k: torch.stack([flowedit(gaussian(SOURCE, 0.3), gaussian(TARGET, 1.0), Y, 1.0, 4, k, torch.Generator().manual_seed(s)) for s in range(8)]).std(0).mean()
    assert spread(16) < 0.5 * spread(1)


@pytest.mark.parametrize("start", (0.0, 1.2))
def test_a_start_that_is_no_time(start):
    with pytest.raises(ValueError, match=f"start is {start}; it is a time in .0, 1."):
        times_below(start, 4)


# --- on a teacher


@pytest.mark.parametrize("editor", EDITORS)
@pytest.mark.parametrize("guidance", (1.0, 2.0))
def test_the_count_of_calls_is_the_teacher_s(editor, guidance):
    """Every call of the network on one request is counted, and `calls` says the same number."""
    teacher, count = tiny_dit(1), []
    hook = teacher.register_forward_hook(lambda *_: count.append(1))
    settings = dict(steps=4, start=0.7)
    edit_by_captions(teacher, held_out(1, 0, EDIT_TYPES), editor, guidance=guidance, **settings)
    hook.remove()
    assert len(count) == calls(editor, guidance=guidance, **settings)


@pytest.mark.parametrize("editor", EDITORS)
def test_edits_of_held_out_requests(editor):
    """References are the scenes; outputs are in range, finite, of their own seed, and those of two batches are those of the requests."""
    teacher, examples = tiny_dit(1), held_out(5, 0, EDIT_TYPES)
    draw = lambda **given: edit_by_captions(teacher, examples, editor, **{"steps": 3, "start": 0.7, "batch": 3} | given)
    reference, output = draw(seed=1)
    assert torch.equal(reference, render([e.scene for e in examples], SIDE))
    assert output.shape == reference.shape and output.abs().max() <= 1 and output.isfinite().all()
    assert torch.equal(output, draw(seed=1)[1]) and torch.equal(output, draw(seed=2)[1]) == (editor == "inversion")
    assert (output - reference).abs().max() > 1e-3


def test_both_captions_are_asked_for_what_they_are():
    """The source flow reads the reference's caption, unguided; the target's reads the other, guided against the empty one."""
    teacher = tiny_dit(1)
    x, t = torch.randn(1, 3, SIDE, SIDE), torch.tensor([0.5])
    words = encode(["a red circle on white"], TEXT_LENGTH)
    with torch.no_grad():
        plain, strong = guided(teacher, words, 1.0)(x, t), guided(teacher, words, 3.0)(x, t)
        empty = guided(teacher, torch.zeros_like(words), 1.0)(x, t)
    torch.testing.assert_close(strong, empty + 3 * (plain - empty), atol=1e-5, rtol=0)


def test_unknown_editor():
    with pytest.raises(ValueError, match="unknown editor 'ddim'; known: sdedit, inversion, flowedit"):
        edit_by_captions(tiny_dit(1), [], "ddim")
