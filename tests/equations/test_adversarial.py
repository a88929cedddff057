"""The judge's schooling beyond its lessons: the adversary stays within its radius and hurts, and the patch labels are true."""

import math

import pytest
import torch
from helpers.tiny_models import SIDE, tiny_judge

from vlmedit.data.judge_lessons import lesson
from vlmedit.data.world import ground
from vlmedit.equations.adversarial import attack, yes_no_losses
from vlmedit.networks.judge import ground_loss
from vlmedit.seeds import rng_for
from vlmedit.world.render import render
from vlmedit.world.scene import COLORS, GROUND_CLASSES, SHAPES, TEXTURES, Scene, Thing, sample_scene

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


def test_patch_labels_by_hand():
    """A small square at the center of a patch labels that patch alone; indices count from 1, 0 is background."""
    scene = Scene((Thing("square", "yellow", "striped", x=(2 + 0.5) / 8, y=(5 + 0.5) / 8, size=0.08),))
    labels = ground([scene], 8)
    expected = torch.zeros(1, 8, 8, 3, dtype=torch.long)
    expected[0, 5, 2] = torch.tensor((SHAPES.index("square"), tuple(COLORS).index("yellow"), TEXTURES.index("striped"))) + 1
    assert torch.equal(labels, expected.flatten(1, 2))


def test_patches_labelled_background_look_like_it():
    """On random scenes: a patch without a thing has the background's color, one without contrast is rare among the others."""
    rng = rng_for("patches")
    scenes = [sample_scene(rng) for _ in range(60)]
    labels = ground(scenes, 8)[..., 0]
    empty = render([Scene((), s.background, s.style, s.look) for s in scenes], 32)
    change = (render(scenes, 32) - empty).abs().amax(1).unfold(1, 4, 4).unfold(2, 4, 4).amax((3, 4)).flatten(1)  # (B, 64)
    # things reach at most a soft edge beyond their labelled patches
    assert change[labels == 0].quantile(0.8) < 0.01 and (change[labels > 0] > 0.1).float().mean() > 0.85


def test_ground_loss_in_closed_form():
    """Certain and right is 0, knowing nothing is the mean of the classes' log counts, and -100 is not asked."""
    labels = ground([Scene((Thing("cross", "red"),))], 8)
    right = torch.cat([torch.nn.functional.one_hot(y, n) * 50.0 for y, n in zip(labels.unbind(-1), GROUND_CLASSES)], -1)
    assert ground_loss(right, labels) < 1e-6
    blank = sum(math.log(n) for n in GROUND_CLASSES) / 3
    assert float(ground_loss(torch.zeros_like(right), labels)) == pytest.approx(blank, rel=1e-5)
    wrong = right.clone()
    wrong[:, :10] = right[:, :10].roll(1, -1)
    unasked = labels.clone()
    unasked[:, :10] = -100
    assert ground_loss(wrong, labels) > 1 and ground_loss(wrong, unasked) < 1e-6
