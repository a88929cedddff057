"""The unpaired rivals without a VLM: instructions undone in words, losses in closed form, and what a frozen model's direction is."""

import random
from dataclasses import fields

import pytest
import torch
from helpers.tiny_models import SIDE, pictures, tiny_dit
from safetensors.torch import load_file
from torch.nn import functional as F

from vlmedit.data import world as data
from vlmedit.data.batches import UnpairedBatch
from vlmedit.data.cycles import cycle_batch, inverse
from vlmedit.data.world import sample_example, unpaired_batch
from vlmedit.equations.cycle import adversarial_loss, copy_loss, critic_loss, cycle_loss, direction, prior_loss, route
from vlmedit.errors import ConfigError, ImpossibleEdit
from vlmedit.flow import interpolate, logit_normal_time, to_x0
from vlmedit.methods.bootstrap import Bootstrap, BootstrapConfig, train_bootstrap
from vlmedit.methods.cyclegan_turbo import CycleGANTurbo, CycleGANTurboConfig, train_cyclegan_turbo
from vlmedit.protocols import Phase
from vlmedit.world.edits import EDIT_TYPES, apply_edit, check_edit, side_reached
from vlmedit.world.language import caption, parse_instruction
from vlmedit.world.tokenizer import build_tokenizer

TWO = dict(calls="all", sampler_steps=2)  # an unroll at times 1 and 0.5
STUDENT = Phase("student", ("student",))
MEAN, STD = -0.3, 0.5  # of the real pictures


def text_of(row) -> str:
    return " ".join(build_tokenizer().convert_ids_to_tokens([i for i in row.tolist() if i]))


# --- undoing in words


def made(scene, edit, rng):
    """The scene after the edit; what is added finds its place in some try."""
    for _ in range(50):
        try:
            return apply_edit(scene, edit, rng)
        except ImpossibleEdit:
            continue
    pytest.fail(f"{edit} has no room")


@pytest.mark.parametrize("kind", EDIT_TYPES)
def test_the_inverse_leads_back(kind):
    """Forty random requests: the inverse is possible after the edit and brings back the reference's caption, with things at their places
    unless the edit had removed one; a move comes back to the side it started from, or has no inverse when it started from none."""
    rng, undone = random.Random(0), 0
    for _ in range(40):
        example = sample_example(rng, (kind,))
        after, back = made(example.scene, example.edit, rng), inverse(example.scene, example.edit)
        if back is None:
            start = example.scene.things[example.scene.find(example.edit.shape)]
            axis = ("left", "right") if example.edit.side in ("left", "right") else ("top", "bottom")
            assert kind == "move" and not any(side_reached(start, side) for side in axis)
            continue
        undone += 1
        check_edit(after, back)
        again = made(after, back, rng)
        words = lambda scene: sorted(caption(scene).split())
        assert words(again) == words(example.scene)
        if kind == "move":
            was, now = (s.things[s.find(back.shape)] for s in (example.scene, again))
            assert side_reached(was, back.side) and side_reached(now, back.side)
        elif kind != "remove":
            places = lambda scene: {t.shape: (t.x, t.y, t.size) for t in scene.things}
            assert places(again) == places(example.scene)
    assert undone >= (5 if kind == "move" else 40)


def test_a_batch_is_the_no_pair_path_s_with_an_inverse_in_words(monkeypatch):
    """The same requests as `unpaired_batch` gives for the same arguments, every tensor equal; one render call, of references; inverses that
    can be read and are there exactly where a row is reversible; fulfilled rows ask for nothing, and nothing is undone by nothing."""
    rendered = []
    plain = unpaired_batch(48, SIDE, "c", fulfilled_share=0.3)
    original = data.render
    monkeypatch.setattr(data, "render", lambda scenes, side: rendered.append(len(scenes)) or original(scenes, side))
    monkeypatch.setattr(data, "target_of", lambda *_: pytest.fail("a target was made"))
    batch = cycle_batch(48, SIDE, "c", fulfilled_share=0.3)
    for f in fields(UnpairedBatch):
        a, b = getattr(plain, f.name), getattr(batch.request, f.name)
        assert a == b if f.name == "types" else torch.equal(a, b), f.name
    assert rendered == [48] and len(batch) == 48
    for row, there, kind in zip(batch.inverse, batch.reversible, batch.request.types):
        assert bool(there) == bool(row.any())
        if there:
            undo = parse_instruction(text_of(row)).type
            assert undo == {"add": "remove", "remove": "add"}.get(kind, kind)
    assert 0 < (1 - batch.reversible).sum() < 12  # some moves
    assert torch.equal(cycle_batch(8, SIDE, "c", request_limit=3).request.reference, unpaired_batch(8, SIDE, "c", request_limit=3).reference)


# --- losses


def test_cycle_and_copy_losses_have_the_sign_as_their_slope():
    """Derivative: the sign of the difference over the number of all elements, on rows that count and exactly zero elsewhere."""
    a, y, rows = pictures(3).requires_grad_(), pictures(3, 1), torch.tensor([1.0, 0.0, 1.0])
    for loss in (cycle_loss, copy_loss):
        (slope,) = torch.autograd.grad(loss(a, y, rows), a)
        torch.testing.assert_close(slope, rows.view(3, 1, 1, 1) * (a.detach() - y).sign() / a.numel(), atol=1e-9, rtol=0)


def log_density(x, t, mean, std):
    return torch.distributions.Normal((1 - t) * mean, ((1 - t) ** 2 * std**2 + t**2) ** 0.5).log_prob(x)


class Critic:
    """Knows log r of one-pixel pictures of N(mean, std^2) against the real N(MEAN, STD^2), off by `tilt` times x_t; caption id 2 adds `wrong`."""

    def __init__(self, mean=0.8, std=0.4, tilt=0.0, wrong=0.0):
        self.mean, self.std, self.tilt, self.wrong = mean, std, tilt, wrong

    def __call__(self, x_t, t, text, with_ground=True):
        shaped = t.view(-1, 1, 1, 1)
        told = log_density(x_t, shaped, MEAN, STD) - log_density(x_t, shaped, self.mean, self.std) + self.tilt * x_t
        return None, (told + self.wrong * (text[:, :1] == 2).view(-1, 1, 1, 1)).flatten(1)[..., None]


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_adversary_s_gradient_is_the_score_difference():
    """-log sigmoid(log r) at one pixel: derivative -sigmoid(-log r) (1 - t) (score of the real - score of the student) / B, to 1e-6 (logits are float32)."""
    x, eps, t = (0.8 + 0.4 * double(6, 1, 1, 1)).requires_grad_(), double(6, 1, 1, 1, seed=1), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    (found,) = torch.autograd.grad(adversarial_loss(Critic(), x, torch.ones(6, 2, dtype=torch.long), t, eps), x)
    shaped = t.view(-1, 1, 1, 1)
    x_t = (1 - shaped) * x.detach() + shaped * eps
    score = lambda mean, std: -(x_t - (1 - shaped) * mean) / ((1 - shaped) ** 2 * std**2 + shaped**2)
    log_r = log_density(x_t, shaped, MEAN, STD) - log_density(x_t, shaped, 0.8, 0.4)
    torch.testing.assert_close(found, -(-log_r).sigmoid() * (1 - shaped) * (score(MEAN, STD) - score(0.8, 0.4)) / 6, atol=1e-6, rtol=0)


def test_the_critic_s_loss_is_least_at_the_true_ratio_and_teaches_it_to_read():
    """4000 pictures of each kind: a critic that knows both densities has a lower loss than one tilted either way. With false captions,
    scoring strange pairs lower pays, and does not without; the student's pictures get no gradient."""
    student, real = (0.8 + 0.4 * double(4000, 1, 1, 1)).requires_grad_(), MEAN + STD * double(4000, 1, 1, 1, seed=1)
    t, eps = torch.full((4000,), 0.4, dtype=torch.float64), double(4000, 1, 1, 1, seed=2)
    ones = torch.ones(4000, 3, dtype=torch.long)
    loss = lambda tilt: critic_loss(Critic(tilt=tilt), student, ones, real, ones, t, eps)
    assert loss(0.0) + 1e-3 < min(loss(0.3), loss(-0.3)) and not loss(0.0).requires_grad
    # captions 1 and 2 in turn: shown with the next row's, every picture is strange; here each second one gets a 2
    turn = torch.tensor([1, 1, 2] * 1333 + [1])[:, None].expand(-1, 3)
    read = lambda wrong, share: critic_loss(Critic(wrong=wrong), student, ones, real, turn, t, eps, share).item()
    assert read(-1.0, 1.0) - read(0.0, 1.0) < read(-1.0, 0.0) - read(0.0, 0.0)
    same = lambda share: critic_loss(Critic(), student, ones, real, ones, t, eps, share).item()
    assert same(1.0) == pytest.approx(F.softplus(-Critic()(interpolate(real, eps, t), t, ones)[1]).mean().item(), abs=1e-6)  # equal captions are never strange


def exact(mean, std):
    """The velocity of pictures N(mean, std^2)."""

    def velocity(x, t):
        t = t.view(-1, 1, 1, 1)
        gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
        return (x - mean - gain * (x - (1 - t) * mean)) / t

    return velocity


@pytest.mark.parametrize("t", (0.2, 0.6, 1.0))
def test_direction_on_gaussians_in_closed_form(t):
    """(m* - m) t^2 / V + (z - y) (1 - t)^2 s^2 / V: at z = y the frozen model's change of mind, and once z is y + (m* - m), exactly that,
    whatever the noise: a finished edit stays. To 1e-9; no graph."""
    y, eps, times = double(4, 1, 2, 2), double(4, 1, 2, 2, seed=1), torch.full((4,), t, dtype=torch.float64)
    v = (1 - t) ** 2 * 0.25 + t**2
    for gap in (0.0, 0.4, 0.9):
        z = (y + gap).requires_grad_()
        found = direction(exact(-0.2, 0.5), exact(0.7, 0.5), y, z, times, eps)
        torch.testing.assert_close(found, torch.full_like(y, 0.9 * t**2 / v + gap * (1 - t) ** 2 * 0.25 / v), atol=1e-9, rtol=0)
        assert not found.requires_grad
    torch.testing.assert_close(found, torch.full_like(y, 0.9), atol=1e-9, rtol=0)


def test_the_prior_pulls_towards_the_moved_reference():
    """2 (x - clamp(y + d)) / n per picture, to 1e-7."""
    x, y, d = pictures(3).requires_grad_(), pictures(3, 1), 0.5 * pictures(3, 2)
    (slope,) = torch.autograd.grad(prior_loss(x, y, d).sum(), x)
    torch.testing.assert_close(slope, 2 * (x.detach() - (y + d).clamp(-1, 1)) / x[0].numel(), atol=1e-7, rtol=0)


def test_routing_takes_one_s_value_and_the_other_s_gradient():
    clean, estimate = pictures(2).requires_grad_(), pictures(2, 1).requires_grad_()
    routed = route(clean, estimate)
    torch.testing.assert_close(routed, clean, atol=1e-6, rtol=0)
    first, second = torch.autograd.grad((routed * pictures(2, 2)).sum(), (clean, estimate), allow_unused=True)
    assert first is None and torch.equal(second, pictures(2, 2))


# --- one update of each


@pytest.fixture(scope="module")
def batch():
    """Four requests, one of them for nothing."""
    draws = (cycle_batch(4, SIDE, "update", k, kinds={"recolor": 1, "style": 1, "background": 1, "nothing": 1}) for k in range(100))
    return next(drawn for drawn in draws if drawn.request.nothing.sum() == 1)


def grown(dit):
    """A head that says something."""
    torch.nn.init.normal_(dit.ground.weight, std=0.3)
    return dit


def gan_roles(**given) -> CycleGANTurbo:
    roles = CycleGANTurbo(CycleGANTurboConfig.make("smoke", side=SIDE, precision="no", **given), tiny_dit(0), tiny_dit(1))
    grown(roles.critic)
    return roles


def test_cyclegan_s_gradient_is_that_of_its_definition(batch):
    """Recomputed from the same seed by plain calls: edit, adversary, edit back with the output as reference and with its graph, copy. The
    critic gets no gradient from it, and only the critic from its own backward."""
    roles, twin = (gan_roles(cycle_weight=0.7, nothing_weight=0.3, **TWO) for _ in range(2))
    torch.manual_seed(0)
    memory = {}
    metrics = roles.backward(STUDENT, batch, memory, 0)
    output = memory["output"]
    assert metrics.pop("calls") == 4 * 2 * 2  # there and back
    assert set(metrics) == {"gan", "cycle", "nothing"} and all(p.grad is None for p in roles.critic.parameters()) and not output.requires_grad

    request = batch.request

    def edit(reference, ids):
        text = twin.student.encode_text(ids)
        held = twin.student.encode_reference(reference, text)
        noise = torch.randn_like(reference)
        x = noise - twin.student(noise, torch.ones(4), text, held)
        x_t = 0.5 * x + 0.5 * torch.randn_like(x)
        return x_t - 0.5 * twin.student(x_t, torch.full((4,), 0.5), text, held)

    torch.manual_seed(0)
    mine = edit(request.reference, request.instruction)
    t, eps = 0.02 + 0.96 * torch.rand(4), torch.randn_like(mine)
    logit = twin.critic((1 - t.view(4, 1, 1, 1)) * mine + t.view(4, 1, 1, 1) * eps, t, request.target_caption, with_ground=True)[1].mean((1, 2))
    back = edit(mine, batch.inverse)
    rows = lambda pictures: pictures.abs().mean((1, 2, 3))
    loss = 0.5 * -logit.sigmoid().log().mean() + 0.7 * (rows(back - request.reference) * batch.reversible).mean() + 0.3 * (rows(mine - request.reference) * request.nothing).mean()
    loss.backward()
    assert sum(metrics.values()) == pytest.approx(loss.item(), abs=1e-5)
    largest = max(p.grad.abs().max() for p in twin.student.parameters() if p.grad is not None)
    for (name, a), b in zip(roles.student.named_parameters(), twin.student.parameters()):
        if b.grad is not None:
            assert (a.grad - b.grad).abs().max() < 1e-4 * largest, name
    roles.student.zero_grad(set_to_none=True)
    critic_metrics = roles.backward(Phase("critic", ("critic",)), batch, memory, 0)
    assert set(critic_metrics) == {"critic"}
    assert any(p.grad is not None for p in roles.critic.parameters()) and all(p.grad is None for p in roles.student.parameters())


def bootstrap_roles(**given) -> Bootstrap:
    return Bootstrap(BootstrapConfig.make("smoke", side=SIDE, precision="no", **given), tiny_dit(0), tiny_dit(0), tiny_dit(1))


def test_bootstrap_s_gradient_is_that_of_its_definition(batch):
    """The prior's by its closed form at the clean estimate; the cycle's at the estimate equals that at the clean edit it was routed from,
    which autograd gives for a leaf in its place. Rows where nothing is to be done are pulled to the reference alone."""
    roles = bootstrap_roles(cycle_weight=0.6, nothing_weight=0.5)
    torch.manual_seed(0)
    z = roles.pseudo_target(batch)
    idle = batch.request.nothing > 0
    assert not z.requires_grad and idle.any() and torch.equal(z[idle], batch.request.reference[idle]) and not torch.equal(z[~idle], batch.request.reference[~idle])
    t, eps = torch.tensor([0.3, 0.5, 0.7, 0.9]), torch.randn_like(z)
    leaf = roles.estimate(batch, z, t, eps).detach().requires_grad_()
    roles.estimate = lambda *_: leaf
    state = torch.get_rng_state()
    found = roles.losses(batch, z, t, eps)
    teacher, request = roles.teacher, batch.request
    y_t, z_t = interpolate(request.reference, eps, t), interpolate(z, eps, t)
    with torch.no_grad():
        plain = lambda x, text: to_x0(x, teacher(x, t, text), t)
        empty = torch.zeros_like(request.target_caption)
        guided = 2 * plain(z_t, request.target_caption) - plain(z_t, empty)
        goal = (request.reference + (guided - plain(y_t, request.reference_caption)) * (~idle).view(-1, 1, 1, 1)).clamp(-1, 1)
    weight = torch.where(idle, 0.5, 1.0).view(-1, 1, 1, 1)
    (pull,) = torch.autograd.grad(found["prior"] + found["nothing"], leaf)
    torch.testing.assert_close(pull, weight * 2 * (leaf.detach() - goal) / leaf.numel(), atol=1e-6, rtol=1e-3)
    (back,) = torch.autograd.grad(found["cycle"], leaf)
    torch.set_rng_state(state)
    edited = z.clone().requires_grad_()
    roles.student.zero_grad()
    s, noise = logit_normal_time(4, 3.0), torch.randn_like(z)
    v = roles.student(interpolate(request.reference, noise, s), s, batch.inverse, edited)
    loss = 0.6 * ((v - (noise - request.reference)).square().mean((1, 2, 3)) * batch.reversible).mean()
    torch.testing.assert_close(found["cycle"], loss, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(back, torch.autograd.grad(loss, edited)[0], atol=1e-7, rtol=1e-3)
    assert back.abs().max() > 0 and all(p.grad is None for m in (roles.teacher, roles.follower) for p in m.parameters())


def test_the_follower_follows():
    """After k steps from a student moved by d it has gone 1 - .9^k of the way."""
    roles = bootstrap_roles(target_decay=0.9)
    before = [p.clone() for p in roles.follower.parameters()]
    for p in roles.student.parameters():
        p.data += 1.0
    for index in range(3):
        roles.after(index)
    for a, b in zip(roles.follower.parameters(), before):
        torch.testing.assert_close(a, b + 1 - 0.9**3, atol=1e-5, rtol=0)


def test_both_lower_their_own_loss_on_one_batch(batch):
    """Twenty updates on the same requests, noise held fixed: the student's losses fall by a tenth, the critic's by a twentieth."""
    gan, boot = gan_roles(calls="one"), bootstrap_roles()
    z, t, eps = boot.pseudo_target(batch), torch.full((4,), 0.6), pictures(4, 9)

    def gan_loss():
        torch.manual_seed(1)
        metrics = gan.backward(STUDENT, batch, {}, 0)
        return sum(metrics[name] for name in ("gan", "cycle", "nothing"))

    def boot_loss():
        torch.manual_seed(1)
        loss = sum(boot.losses(batch, z, t, eps).values())
        loss.backward()
        return loss.item()

    def critic_loss_now():
        torch.manual_seed(1)
        return gan.critic_backward(batch, pictures(4, 7))

    for model, value, share in ((gan.student, gan_loss, 0.9), (boot.student, boot_loss, 0.9), (gan.critic, critic_loss_now, 0.95)):
        optimizer, first = torch.optim.Adam(model.parameters(), 2e-3), None
        for _ in range(20):
            optimizer.zero_grad()
            now = value()
            first = first if first is not None else now
            optimizer.step()
        assert value() < share * first


# --- the stages


@pytest.mark.parametrize("stage", ("cyclegan_turbo", "bootstrap"))
def test_a_killed_run_resumes_to_the_same_weights(folder, tmp_path, stage):
    """Three updates: finite figures, calls counted; killed after two, the run ends in the straight run's weights, bit for bit."""
    config, train = {"cyclegan_turbo": (CycleGANTurboConfig, train_cyclegan_turbo), "bootstrap": (BootstrapConfig, train_bootstrap)}[stage]
    made = lambda name: config.make("smoke", teacher=str(folder / "teacher"), student=str(folder / "student"), side=SIDE, precision="no", steps=3, out=str(tmp_path / name))
    steps = list(train(made("straight")))
    assert [s.index for s in steps] == [1, 2, 3] and not any(s.skipped for s in steps)
    assert all(torch.isfinite(torch.tensor(float(v))) for s in steps for v in s.metrics.values())
    assert all(s.metrics["calls"] in ((8, 16) if stage == "cyclegan_turbo" else (4 * 6,)) for s in steps) and steps[0].pictures["output"].shape == (4, 3, SIDE, SIDE)
    run = train(made("killed"))
    next(run), next(run)
    run.close()
    list(train(made("killed")))
    for name in ("model/diffusion_pytorch_model", "checkpoint/" + ("critic" if stage == "cyclegan_turbo" else "follower")):
        a, b = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("straight", "killed"))
        assert all(torch.equal(a[k], b[k]) for k in a), name
    start = load_file(folder / "student" / "diffusion_pytorch_model.safetensors")
    assert not torch.equal(start["head.2.weight"], a["head.2.weight"])


def test_bad_settings_are_named():
    bad = {
        "gan_weight is 0; without it copying is the best answer": (CycleGANTurboConfig, dict(gan_weight=0)),
        "mismatch is 2; it is a share": (CycleGANTurboConfig, dict(mismatch=2)),
        "calls is 'thrice'; known: one": (CycleGANTurboConfig, dict(calls="thrice")),
        "critic_updates is 0": (CycleGANTurboConfig, dict(critic_updates=0)),
        "cycle_weight is -1; it must be at least 0": (BootstrapConfig, dict(cycle_weight=-1)),
        "prior_weight is 0; without it copying": (BootstrapConfig, dict(prior_weight=0)),
        "target_decay is 1.0; it must lie in": (BootstrapConfig, dict(target_decay=1.0)),
    }
    for message, (config, given) in bad.items():
        with pytest.raises(ConfigError, match=message):
            config.make("smoke", **given)
