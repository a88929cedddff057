"""Who is asked about an edit and how: the teacher as classifier in closed form on Gaussians, other words, two judges, and what holds the
weights when nobody matches distributions."""

from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import SIDE, pictures, requests, tiny_dit, tiny_judge
from torch import nn

from vlmedit.equations.judge_loss import judge_loss
from vlmedit.equations.matching import gan_loss
from vlmedit.equations.rewards import (
    LEVELS,
    REWARDS,
    SHIFT,
    WORDINGS,
    Panel,
    TeacherJudge,
    augmented,
    denoising_error,
    moved,
    reworded,
)
from vlmedit.errors import ConfigError
from vlmedit.flow import flow_matching_loss, interpolate, logit_normal_time, velocity_target
from vlmedit.methods import npedit as trainer
from vlmedit.methods.npedit import NPEdit, NPEditConfig, train_npedit
from vlmedit.world.tokenizer import build_tokenizer

TWO = (1.0, 0.5)


class Known(nn.Module):
    """The exact denoiser of N(mean of the caption, std^2); a caption's first id chooses the mean."""

    def __init__(self, means=(-0.6, 0.9), std=0.4):
        super().__init__()
        self.means, self.std = torch.tensor(means, dtype=torch.float64), std

    def forward(self, x_t, t, text):
        t, mean = t.view(-1, 1, 1, 1), self.means[text[:, 0]].view(-1, 1, 1, 1)
        gain = (1 - t) * self.std**2 / ((1 - t) ** 2 * self.std**2 + t**2)
        return (x_t - mean - gain * (x_t - (1 - t) * mean)) / t


def words(ids) -> list[str]:
    return [" ".join(build_tokenizer().convert_ids_to_tokens([i for i in row if i])) for row in ids.tolist()]


# --- the teacher as a judge


@pytest.mark.parametrize("t", (0.2, 0.5, 0.8))
def test_denoising_errors_on_gaussians_in_closed_form(t):
    """Over noise +1 and -1, whose mean square is one: ((m - x) t / V)^2 + ((1 - t) s^2 / V)^2 with V = (1 - t)^2 s^2 + t^2, so that the
    difference between two captions is ((m_s - x)^2 - (m_t - x)^2) (t / V)^2 and its derivative 2 (m_t - m_s) (t / V)^2, wherever x is. 1e-9."""
    x = torch.tensor([-2.0, 0.1, 1.3], dtype=torch.float64).view(3, 1, 1, 1).requires_grad_()
    times, teacher = torch.full((3,), t, dtype=torch.float64), Known()
    captions = torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2, dtype=torch.long)
    errors = [sum(denoising_error(teacher, x, text, times, sign * torch.ones_like(x)) for sign in (1.0, -1.0)) / 2 for text in captions]
    v, (source, target) = (1 - t) ** 2 * 0.16 + t**2, (-0.6, 0.9)
    flat = x.detach().flatten()
    torch.testing.assert_close(errors[0].detach(), ((source - flat) * t / v) ** 2 + ((1 - t) * 0.16 / v) ** 2, atol=1e-9, rtol=0)
    difference = errors[0] - errors[1]
    torch.testing.assert_close(difference.detach(), ((source - flat) ** 2 - (target - flat) ** 2) * (t / v) ** 2, atol=1e-9, rtol=0)
    (slope,) = torch.autograd.grad(difference.sum(), x)
    torch.testing.assert_close(slope.flatten(), torch.full((3,), 2 * (target - source) * (t / v) ** 2, dtype=torch.float64), atol=1e-9, rtol=0)


def test_the_margin_is_the_scaled_mean_difference_of_errors():
    """Recomputed draw by draw from the same seed: one level in each part of the range, the same noise for both captions; scale 7."""
    teacher, x, batch = tiny_dit(1), pictures(3), requests("recolor", "add", "style")
    torch.manual_seed(4)
    found = TeacherJudge(teacher, 3, 7.0).margin(x, batch.reference_caption, batch.target_caption)
    torch.manual_seed(4)
    total, (low, high) = 0, LEVELS
    for k in range(3):
        t = low + (high - low) * (k + torch.rand(3)) / 3
        eps = torch.randn_like(x)
        assert (t >= low + (high - low) * k / 3).all() and (t <= low + (high - low) * (k + 1) / 3).all()
        error = lambda text: (teacher(interpolate(x, eps, t), t, text) - velocity_target(x, eps)).square().mean((1, 2, 3))
        total = total + error(batch.reference_caption) - error(batch.target_caption)
    torch.testing.assert_close(found, 7 * total / 3, atol=1e-5, rtol=1e-5)
    assert found.abs().min() > 0


def test_equal_captions_leave_the_teacher_without_an_opinion():
    """A move has one caption before and after: the margin is exactly 0, p one half, and no gradient but rounding reaches the picture."""
    x, batch = pictures(2).requires_grad_(), requests("move", "nothing")
    loss, p = TeacherJudge(tiny_dit(1)).loss(x, batch)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert (p == 0.5).all() and gradient.abs().max() < 1e-6


def panel(**given) -> Panel:
    return Panel(tiny_judge(3), tiny_dit(2).requires_grad_(False), lambda x: x, **given)


def test_the_teacher_asks_a_vlm_about_the_rest_alone():
    """With identity: half the teacher's loss and half the judge's identity loss, each recomputed; the edit question is not asked. Without:
    the teacher's alone, and a judge that raises is never called."""
    batch, x, who = requests("recolor", "remove", "background"), pictures(3), panel()
    torch.manual_seed(0)
    loss, right = REWARDS["teacher"](who, batch, x, 0.4)
    torch.manual_seed(0)
    edit, p = TeacherJudge(who.teacher).loss(x, batch, 0.4)
    margin = who.judge.yes_no_margin(batch.identity_question, torch.stack((batch.reference, x.clamp(-1, 1)), 1))
    torch.testing.assert_close(loss, (edit.mean() + nn.functional.softplus(-0.4 * margin).mean()) / 2, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(right, torch.stack((p, margin.sigmoid())), atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    alone, only = REWARDS["teacher"](replace(who, judge=None, identity=False), batch, x, 0.4)
    assert torch.equal(alone, edit.mean()) and only.shape == (1, 3)


# --- how judges are asked


def test_a_wording_changes_the_words_before_the_instruction_and_nothing_else():
    """"was this done : make ..." becomes "done : make ..."; a removal's questions, which are made otherwise, stay as they are."""
    batch = requests("recolor", "remove", "move")
    for name, (edit, identity) in WORDINGS.items():
        new = reworded(batch, name)
        for old, mine, begins, was in zip((batch.edit_question, batch.identity_question), (new.edit_question, new.identity_question), (edit, identity), WORDINGS["schooled"]):
            for a, b, kind in zip(words(old), words(mine), batch.types):
                assert b == (a if kind == "remove" else f"{begins} {a.removeprefix(was).strip()}".strip()), name
        assert new.reference is batch.reference and torch.equal(new.edit_answer, batch.edit_answer)
        assert (new.edit_question < len(build_tokenizer())).all() and not (new.edit_question == build_tokenizer().unk_token_id).any()
    with pytest.raises(ValueError, match="unknown wording 'polite'; known: schooled, short"):
        reworded(batch, "polite")


def test_augmentation_moves_both_pictures_alike(monkeypatch):
    """Without speckle: both are shifted by one and the same whole number of pixels, edges repeated, which numpy's edge padding confirms;
    with it, each has noise of its own. The gradient reaches the output."""
    import numpy as np

    monkeypatch.setattr("vlmedit.equations.rewards.SPECKLE", 0.0)
    a, b, seen = pictures(2), pictures(2, 1).requires_grad_(), set()
    for seed in range(12):
        torch.manual_seed(seed)
        dy, dx = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
        torch.manual_seed(seed)
        for mine, whole in zip(augmented(a, b), (a, b.detach())):
            padded = np.pad(whole.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
            assert np.array_equal(mine.detach().numpy(), padded[..., 2 - dy : 2 - dy + SIDE, 2 - dx : 2 - dx + SIDE])
        seen.add((dy, dx))
    assert len(seen) > 6 and torch.equal(moved(a, 0, 0), a)
    monkeypatch.setattr("vlmedit.equations.rewards.SPECKLE", 0.1)
    first, second = augmented(a, a)
    assert 0.1 < (first - second).std() < 0.2 and torch.autograd.grad(augmented(a, b)[1].sum(), b)[0].abs().sum() > 0


def test_two_judges_are_the_mean_of_their_losses():
    """And one judge asked twice is that judge, to the bit."""
    batch, x, other = requests("recolor", "remove", "background"), pictures(3), tiny_judge(8)
    one, two = (judge_loss(j, batch, x, 0.7) for j in (panel().judge, other))
    loss, right = REWARDS["judge"](panel(others=(other,)), batch, x, 0.7)
    torch.testing.assert_close(loss, (one[0] + two[0]) / 2, atol=1e-6, rtol=0)
    torch.testing.assert_close(right, (one[1] + two[1]) / 2, atol=1e-6, rtol=0)
    assert not torch.isclose(one[0], two[0])
    assert torch.equal(REWARDS["judge"](panel(others=(panel().judge,)), batch, x, 0.7)[0], one[0])


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_is_lowered_by_descent_on_the_pictures(name):
    """Thirty steps along the normalized gradient lower the loss by a twentieth, noise held fixed; no weight gets a gradient."""
    batch, x, who = requests("recolor", "add", "background"), pictures(3), panel(teacher_scale=500.0)

    def loss(pictures):
        torch.manual_seed(0)
        return REWARDS[name](who, batch, pictures, 1.0)[0]

    start = loss(x).item()
    for _ in range(30):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x), x)
        x = x - 0.3 * gradient / gradient.norm()
    assert loss(x) < 0.95 * start and all(p.grad is None for m in (who.judge, who.teacher) for p in m.parameters())


# --- in the trainer


def roles(**given) -> NPEdit:
    config = NPEditConfig.make("smoke", **{"side": SIDE, "batch": 3, "precision": "no", **given})
    return NPEdit(config, tiny_dit(0), tiny_dit(1), tiny_dit(2), tiny_judge(3))


def gradients(model) -> list:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def backward(all_roles, batch) -> list:
    torch.manual_seed(0)
    all_roles.student.zero_grad()
    all_roles.student_backward(batch, TWO, 50)
    return gradients(all_roles.student)


def test_the_anchor_pulls_back_to_the_start():
    """Weights moved by a known step d: the gradient is the unanchored one plus 2 w d, to 1e-5; at the start it is the unanchored one."""
    batch = requests("recolor", "move", "style")
    free, held = roles(dmd_weight=0.0), roles(dmd_weight=0.0, anchor_weight=0.3)
    for a, b in zip(backward(free, batch), backward(held, batch)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    steps = [0.01 * torch.randn_like(p) for p in free.student.parameters()]
    for model in (free, held):
        for p, d in zip(model.student.parameters(), steps):
            p.data += d
    for a, b, d in zip(backward(free, batch), backward(held, batch), steps):
        torch.testing.assert_close(b, a + 2 * 0.3 * d, atol=1e-5, rtol=1e-4)


def test_refl_s_second_term_is_the_loss_of_copying():
    """Recomputed: flow matching to the reference, given itself and its own caption; the gradient is that of the sum. To 1e-5."""
    batch = requests("recolor", "move", "style")
    alone, both = roles(dmd_weight=0.0), roles(dmd_weight=0.0, pretrain_weight=0.7)
    without = backward(alone, batch)
    state = torch.get_rng_state()
    found = backward(both, batch)
    torch.set_rng_state(state)
    alone.student.zero_grad()
    t, eps = logit_normal_time(3, 3.0), torch.randn_like(batch.reference)
    text = alone.student.encode_text(batch.reference_caption)
    cache = alone.student.encode_reference(batch.reference, text)
    (0.7 * flow_matching_loss(lambda x, time: alone.student(x, time, text, cache), batch.reference, t, eps).mean()).backward()
    for a, b, c in zip(without, gradients(alone.student), found):
        torch.testing.assert_close(c, a + b, atol=1e-5, rtol=1e-4)


def test_truncation_is_fixed_or_drawn():
    """DRaFT-K takes K calls, AlignProp 1 to all of them equally often, never more than `gradient_calls`; without a graph nothing is drawn."""
    assert roles().gradient_calls(4) is None and roles(gradient_calls=2).gradient_calls(4) == 2
    drawn = [roles_.gradient_calls(4) for roles_ in [roles(truncate="random")] for _ in range(400)]
    counts = [drawn.count(k) for k in (1, 2, 3, 4)]
    assert sum(counts) == 400 and min(counts) > 70  # 100 each, standard deviation 9
    assert {roles_.gradient_calls(4) for roles_ in [roles(truncate="random", gradient_calls=2)] for _ in range(40)} == {1, 2}
    state = torch.get_rng_state()
    with torch.no_grad():
        roles(truncate="random").gradient_calls(4)
    untouched = torch.get_rng_state()
    torch.set_rng_state(state)
    roles()  # the same draws for weights alone
    assert torch.equal(untouched, torch.get_rng_state())


def test_draft_1_has_the_gradient_of_the_last_call_alone():
    """All four calls, gradient in the last: the student's gradient is that of one call from the very same noised third picture."""
    batch, one = requests("recolor", "add", "style"), roles(dmd_weight=0.0, gradient_calls=1)
    times = (1.0, 0.75, 0.5, 0.25)
    torch.manual_seed(0)
    one.edit(batch, times).square().mean().backward()
    found, twin = gradients(one.student), roles(dmd_weight=0.0)
    torch.manual_seed(0)
    text = twin.student.encode_text(batch.instruction)
    held = twin.student.encode_reference(batch.reference, text)
    call = lambda x, t: x - t * twin.student(x, torch.full((3,), t), text, held)
    noise = torch.randn_like(batch.reference)
    x = noise
    for i, t in enumerate(times):
        if i:
            x = (1 - t) * x + t * torch.randn_like(x)
        with torch.set_grad_enabled(t == 0.25):
            x = call(x, t)
    x.square().mean().backward()
    for a, b in zip(found, gradients(twin.student)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_the_gan_term_is_added_to_the_pull():
    """The gradient at the output with DMD2's term minus that without is its weight times autograd's of the loss. To 1e-7."""
    batch, x = requests("recolor", "add", "style"), pictures(3, 5)
    plain, more = roles(), roles(gan_weight=0.4)
    for model in (plain, more):
        model.fake.ground = nn.Linear(32, 1)
        nn.init.constant_(model.fake.ground.weight, 0.1)
    pull = lambda model: (torch.manual_seed(1), model.output_gradients(batch, x, 0)[0]["dmd"])[1]
    torch.manual_seed(1)
    t, eps, leaf = trainer.draw_dmd_time(3), torch.randn_like(x), x.clone().requires_grad_()
    s = trainer.MatchingContext(more.teacher, more.fake, batch.target_caption, t, eps)
    (wanted,) = torch.autograd.grad(gan_loss(leaf, s), leaf)
    torch.testing.assert_close(pull(more) - pull(plain), 0.4 * wanted, atol=1e-7, rtol=1e-3)
    assert wanted.abs().max() > 1e-6


ARMS = {
    "teacher": dict(reward="teacher"),
    "teacher alone": dict(reward="teacher", identity=False),
    "ReFL": dict(dmd_weight=0.0, gradient_calls=1, pretrain_weight=1.0),
    "AlignProp": dict(dmd_weight=0.0, calls="all", truncate="random"),
    "R0": dict(dmd_weight=0.0, anchor_weight=0.1),
    "GAN term": dict(gan_weight=0.5),
    "asking": dict(judge=("judge", "judge"), wording="turned", augment=True),
}


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_makes_two_updates(folder, tmp_path, name):
    places = {k: str(folder / k) for k in ("teacher", "student", "judge")}
    given = {k: tuple(str(folder / place) for place in v) if k == "judge" else v for k, v in ARMS[name].items()}
    config = NPEditConfig.make("smoke", **{**places, **given}, side=SIDE, batch=3, precision="no", out=str(tmp_path / "run"))
    steps = list(train_npedit(config))
    assert [s.index for s in steps] == [1, 2] and not any(s.skipped for s in steps)
    assert all(torch.isfinite(torch.tensor(v)) for s in steps for v in s.metrics.values()) and steps[0].metrics["gradient_judge"] > 0
    if name == "R0":
        assert steps[0].metrics["anchor_loss"] == 0 < steps[1].metrics["anchor_loss"]


@pytest.mark.parametrize("name", ("ReFL", "AlignProp", "R0", "asking"))
def test_every_reward_without_dmd_pleases_its_judge_more(folder, tmp_path, name):
    """Twelve updates on one batch with the same draws each time: what the update lowers falls, and the judge is more pleased."""
    config = NPEditConfig.make("smoke", **{**ARMS[name], "judge": "judge", "dmd_weight": 0.0}, judge_weight=1.0, nothing_weight=0.0, logit_gain_steps=1, side=SIDE, precision="no", out=str(tmp_path))
    student, judge, batch = tiny_dit(1), tiny_judge(3), requests("recolor", "style", "background", "remove")
    roles = NPEdit(config, student, tiny_dit(0), tiny_dit(0), judge)
    optimizer, losses = torch.optim.Adam(student.parameters(), 2e-3), []
    for _ in range(12):
        torch.manual_seed(0)
        _, metrics = roles.student_backward(batch, (1.0, 0.5) if config.calls == "mixed" else (1.0, 0.75, 0.5, 0.25), 5)
        losses.append((sum(metrics.get(k, 0.0) for k in ("judge_loss", "anchor_loss", "pretrain_loss")), metrics["judge_loss"]))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1][0] < losses[0][0] - 1e-3 and losses[-1][1] < losses[0][1] - 1e-3


def test_bad_settings_are_named(folder, tmp_path):
    bad = {
        "reward is 'guess'; known: judge, teacher": dict(reward="guess"),
        "wording is 'polite'; known: schooled, short": dict(wording="polite"),
        "truncate is 'often'; known: fixed, random": dict(truncate="often"),
        "anchor_weight is -1; it must be at least 0": dict(anchor_weight=-1),
        "gan_weight is 0.5; its discriminator is a head of the fake score": dict(gan_weight=0.5, dmd_weight=0.0),
        "gan_weight is 0.1; its": dict(gan_weight=0.1, matching="mmd"),
        "a second judge belongs to reward 'judge', and reward is 'teacher'": dict(judge=("a", "b"), reward="teacher"),
        "augment is True; it belongs to reward 'judge'": dict(augment=True, reward="teacher"),
        "judge is empty; name at least one": dict(judge=()),
        "teacher_draws is 0": dict(teacher_draws=0),
    }
    for message, given in bad.items():
        with pytest.raises(ConfigError, match=message):
            NPEditConfig.make("smoke", **given)
    places = {k: str(folder / k) for k in ("teacher", "student", "judge")}
    with pytest.raises(ConfigError, match="judge is '.*nowhere', no folder with a judge"):
        next(train_npedit(NPEditConfig.make("smoke", **{**places, "judge": (places["judge"], str(tmp_path / "nowhere"))}, side=SIDE, precision="no", out=str(tmp_path / "run"))))
