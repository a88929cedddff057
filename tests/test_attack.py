"""The judge's schooling: the adversary stays within its radius and hurts, and one update of the stage answers to it."""

import pytest
import torch
from tiny_models import SIDE, tiny_judge

from vlmedit.schooling import lesson
from vlmedit.train.judge import attack, yes_no_losses

PAIRS = 6


@pytest.fixture(scope="module")
def school():
    return tiny_judge().requires_grad_(False), lesson(PAIRS, SIDE, "attack")


@pytest.mark.parametrize("steps", [1, 4])
def test_attacks_stay_within_their_radius(school, steps):
    """Each pair has a radius of its own; the result is a picture in [-1, 1] without a graph."""
    judge, work = school
    radius = torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0, 0.1])
    out = attack(judge, work, radius, steps)
    moved = (out - work.output).flatten(1).norm(dim=1)
    assert (moved <= radius + 1e-4).all() and out.abs().max() <= 1 and not out.requires_grad
    assert moved[0] == 0 and (moved[1:] > 0).all()


def test_attacks_hurt_more_than_noise_of_the_same_size(school):
    """Gradient ascent: the loss rises above the clean one, and far above what random directions of that length do to it."""
    judge, work = school
    loss = lambda output: float(yes_no_losses(judge, work, output)[0].mean())
    with torch.no_grad():
        noise = torch.randn_like(work.output)
        noise = noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * 2.0
        clean, dirty = loss(work.output), loss((work.output + noise).clamp(-1, 1))
    attacked = loss(attack(judge, work, torch.full((PAIRS,), 2.0), 4))
    assert attacked > clean and attacked - clean > 3 * abs(dirty - clean)


def test_only_asked_answers_count(school):
    """Rows marked as not asked (-1) enter neither losses nor accuracy."""
    judge, work = school
    losses, right, _, _ = yes_no_losses(judge, work, work.output)
    asked = int((work.answers >= 0).sum() + (work.single_answers >= 0).sum())
    assert len(losses) == len(right) == asked < len(work.answers) + len(work.single_answers)
    assert set(right.tolist()) <= {0.0, 1.0} and not right.requires_grad
