"""Notebook 05's references are what the trainer does."""

import pytest
import torch
from helpers.tiny_models import requests, tiny_dit, tiny_judge

from vlmedit.equations.dmd import dmd_gradient, dmd_loss, dmd_scores, draw_dmd_time
from vlmedit.equations.judge_loss import gain_ramp, judge_loss
from vlmedit.methods.npedit import NPEdit, NPEditConfig, nothing_loss
from vlmedit.teaching import exercises

TIMES, STEP = (1.0, 0.5), 12


@pytest.fixture(scope="module")
def batch():
    return requests("recolor", "remove", "nothing", "move")


def make() -> NPEdit:
    side = tiny_dit(0).config.side
    config = NPEditConfig.make("smoke", side=side, batch=4, precision="no", judge_weight=0.3, nothing_weight=0.7)
    return NPEdit(config, tiny_dit(0), tiny_dit(1), tiny_dit(2), tiny_judge(3))


def test_sending_the_losses_back_is_the_trainers_student_update(batch):
    """Every weight's gradient and every norm at the output, to 1e-6 of the largest, from the same seed."""
    trainer, by_hand = make(), make()
    torch.manual_seed(0)
    output, metrics = trainer.student_backward(batch, TIMES, STEP)

    c = by_hand.config
    torch.manual_seed(0)
    mine = by_hand.edit(batch, TIMES)
    t = draw_dmd_time(len(mine))
    scores = dmd_scores(mine, batch.target_caption, by_hand.teacher, by_hand.fake, c.guidance, t, torch.randn_like(mine))
    losses = {
        "dmd": lambda x: dmd_loss(x, dmd_gradient(x, *scores)),
        "judge": lambda x: judge_loss(by_hand.judge, batch, x, gain_ramp(STEP, c.logit_gain_steps))[0],
        "nothing": lambda x: nothing_loss(x, batch.reference, batch.nothing),
    }
    gradients = exercises.SEND_BACK.reference(mine, losses, {"dmd": c.dmd_weight, "judge": c.judge_weight, "nothing": c.nothing_weight})

    assert torch.equal(mine.detach(), output)
    for name, g in gradients.items():
        assert float(g.flatten(1).norm(dim=1).mean() * 4) == pytest.approx(metrics[f"gradient_{name}"], rel=1e-5)
    scale = max(float(p.grad.abs().max()) for p in trainer.student.parameters() if p.grad is not None)
    assert scale > 0
    for a, b in zip(trainer.student.parameters(), by_hand.student.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert (a.grad - b.grad).abs().max() < 1e-6 * scale


def test_fake_loss_is_the_trainers_fake_update(batch):
    """The same loss and the same gradients of the fake from the same noise; none in the student."""
    trainer, by_hand = make(), make()
    torch.manual_seed(1)
    samples = trainer.edit(batch, TIMES)
    torch.manual_seed(2)
    loss = trainer.fake_backward(samples.detach(), trainer.caption(batch))
    torch.manual_seed(2)
    t = torch.rand(4).clamp(1e-3, 1 - 1e-3)
    mine = exercises.FAKE_LOSS.reference(by_hand.fake, samples, batch, t, torch.randn_like(samples))
    mine.backward()
    assert mine.item() == pytest.approx(loss, rel=1e-6)
    assert all(a.grad is b.grad is None or torch.equal(a.grad, b.grad) for a, b in zip(trainer.fake.parameters(), by_hand.fake.parameters(), strict=True))
    assert all(p.grad is None for p in trainer.student.parameters())
