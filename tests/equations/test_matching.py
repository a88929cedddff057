"""Distribution-matching objectives against their definitions on Gaussians: exact by quadrature, gradients by autograd, in float64."""

import numpy as np
import pytest
import torch
from helpers.tiny_models import SIDE, pictures, requests, tiny_dit, tiny_judge
from safetensors.torch import load_file

from vlmedit.equations.dmd import dmd_gradient, dmd_loss, dmd_scores
from vlmedit.equations.matching import (
    OBJECTIVES,
    MatchingContext,
    estimates,
    features,
    gan_loss,
    js_weight,
    kernel,
    log_ratio,
    mmd_loss,
    mmd_squared,
    pseudo_huber_loss,
    ratio_head,
    ratio_loss,
    sid_loss,
    squared_distances,
)  # fmt: skip
from vlmedit.errors import ConfigError
from vlmedit.flow import interpolate, to_x0
from vlmedit.methods.npedit import NPEdit, NPEditConfig, train_npedit

MEAN, STD = -0.3, 0.5  # the teacher's Gaussian
STUDENTS = ((0.8, 0.4), (-1.0, 0.7), (-0.3, 0.2))  # mean and standard deviation
LEVELS = (0.2, 0.5, 0.8)


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal_grid(nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and weights with sum w f(z) = E f(z) of a standard normal z, exact for polynomials of degree below 2 `nodes`."""
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.tensor(z), torch.tensor(w / w.sum())


def variance(t, std):
    return (1 - t) ** 2 * std**2 + t**2


def clean(x_t, t, mean, std):
    """E[x | x_t] of x ~ N(mean, std^2)."""
    return mean + (1 - t) * std**2 / variance(t, std) * (x_t - (1 - t) * mean)


def learnt(student):
    """The student's mean and standard deviation as leaves."""
    return tuple(torch.tensor(p, dtype=torch.float64, requires_grad=True) for p in student)


def samples(mean, std, t, nodes):
    """x and x_t of a student on a grid of (its noise, the added noise), and the weights."""
    z, w = normal_grid(nodes)
    x = (mean + std * z)[:, None].expand(-1, nodes)
    return x, (1 - t) * x + t * z[None], w[:, None] * w[None]


def slopes(value, leaves):
    return torch.stack(torch.autograd.grad(value, leaves))


# --- SiD


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("t", LEVELS)
def test_sid_at_one_half_is_half_the_fisher_divergence(student, t):
    """With a fake score that knows the student exactly, and frozen, the gradient of the loss with respect to the student's mean and
    width is half that of J = E|mu_r(x_t) - mu_student(x_t)|^2, whose own dependence on the student autograd follows. To 1e-9."""
    leaves = learnt(student)
    _, x_t, w = samples(*leaves, t, 8)
    exact = (w * (clean(x_t, t, MEAN, STD) - clean(x_t, t, *leaves)).square()).sum()
    x, x_t, w = samples(*leaves, t, 8)
    loss = lambda alpha: sum(
        wi * sid_loss(a.view(1), r.view(1), f.view(1), alpha, normalized=False)
        for wi, a, r, f in zip(w.flatten(), x.flatten(), clean(x_t, t, MEAN, STD).flatten(), clean(x_t, t, *student).flatten())
    )
    wanted = slopes(exact, leaves)
    half, one = loss(0.5), loss(1.0)
    found = [torch.stack(torch.autograd.grad(value, leaves, retain_graph=True)) for value in (half, one)]
    torch.testing.assert_close(found[0], wanted / 2, atol=1e-9, rtol=1e-9)
    assert (found[1] - wanted / 2).abs().max() > 1e-6  # the paper's alpha is not the exact one


def test_sid_is_written_as_released():
    """sum of (mu_r - mu_f) ((mu_r - x) - a (mu_r - mu_f)) over a constant |x - mu_r| per sample; its normalizer carries no gradient."""
    x, real, fake = (double(3, 2, 4, 4, seed=i).requires_grad_() for i in range(3))
    by_hand = 0.0
    for a, r, f in zip(x, real, fake):
        by_hand = by_hand + ((r - f) * ((r - a) - 1.2 * (r - f))).sum() / (a - r).abs().mean().detach() / x.numel()
    found = sid_loss(x, real, fake, 1.2)
    torch.testing.assert_close(found, by_hand, atol=1e-12, rtol=0)
    for a, b in zip(torch.autograd.grad(found, (x, real, fake), retain_graph=True), torch.autograd.grad(by_hand, (x, real, fake))):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


# --- score divergence with a pseudo-Huber distance


@pytest.mark.parametrize("student", STUDENTS[:2])
@pytest.mark.parametrize("t", LEVELS)
def test_pseudo_huber_is_the_gradient_of_the_score_divergence(student, t, k=0.5):
    """E[sqrt(D^2 + k^2) - k] over the student's own noised pictures, held fixed, D = mu_student - mu_r: the derivative through
    mu_student alone equals that of the loss through the pictures alone. To 1e-6 (the integrand is no polynomial)."""
    leaves = learnt(student)
    x, x_t, w = samples(*student, t, 60)
    x_t = torch.as_tensor(x_t)
    gap = clean(x_t, t, *leaves) - clean(x_t, t, MEAN, STD)
    wanted = slopes((w * ((gap.square() + k * k).sqrt() - k)).sum(), leaves)
    x, x_t, w = samples(*leaves, t, 60)
    column = lambda v: v.reshape(-1, 1)
    real, fake = column(clean(x_t, t, MEAN, STD)), column(clean(x_t, t, *student))
    each = [pseudo_huber_loss(a[None], r[None], f[None], k) for a, r, f in zip(column(x), real, fake)]
    torch.testing.assert_close(slopes((w.flatten() * torch.stack(each)).sum(), leaves), wanted, atol=1e-6, rtol=1e-6)
    assert wanted.abs().max() > 0.01


def test_pseudo_huber_is_bounded_where_the_gap_is_not():
    """Estimates a thousand times as far apart: the loss's derivative at x grows by less than a factor 1.01, from k = 0.02 on."""
    x, real, fake = (double(2, 3, 4, 4, seed=i) for i in range(3))

    def pull(scale):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(pseudo_huber_loss(leaf, real, real + scale * (fake - real)), leaf)[0].norm()

    assert pull(1000.0) < 1.01 * pull(1.0) and pull(1.0) > 0.1


# --- f-distill


def density(x, mean, std):
    return torch.distributions.Normal(mean, std).log_prob(x).exp()


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("t", LEVELS)
def test_weighted_scores_are_the_gradient_of_jensen_shannon(student, t):
    """The integral of q f(p / q) at level t, f(r) = r log r - (r + 1) log((r + 1) / 2), on a fine grid of x_t: its derivative
    equals E_q[h(r) (score of q - score of p) dx_t] with h of `js_weight`. To 1e-6."""
    leaves = learnt(student)
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    p = density(grid, (1 - t) * MEAN, variance(t, STD) ** 0.5)
    q = density(grid, (1 - t) * leaves[0], variance(t, leaves[1]) ** 0.5)
    mix = ((p + q) / 2).clamp(min=1e-300)
    safe = lambda v: v.clamp(min=1e-300).log()
    divergence = torch.trapezoid(p * (safe(p) - mix.log()) + q * (safe(q) - mix.log()), grid)
    wanted = slopes(divergence, leaves)

    z, w = normal_grid(200)
    x_t = (1 - t) * leaves[0] + variance(t, leaves[1]).sqrt() * z  # the same law as x_t of a noised sample
    points = x_t.detach().requires_grad_()
    log_p = torch.distributions.Normal((1 - t) * MEAN, variance(t, STD) ** 0.5).log_prob(points)
    log_q = torch.distributions.Normal((1 - t) * student[0], variance(t, student[1]) ** 0.5).log_prob(points)
    (score_p,), (score_q,) = torch.autograd.grad(log_p.sum(), points), torch.autograd.grad(log_q.sum(), points)
    weight = js_weight((log_p - log_q).detach())
    found = slopes((w * weight * (score_q - score_p) * x_t).sum(), leaves)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_js_weight_is_f_s_second_derivative_times_r_squared():
    r = torch.tensor([0.01, 0.3, 1.0, 4.0, 100.0], dtype=torch.float64, requires_grad=True)
    f = (r * r.log() - (r + 1) * ((r + 1) / 2).log()).sum()
    (first,) = torch.autograd.grad(f, r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(js_weight(r.detach().log()), second * r.detach() ** 2, atol=1e-12, rtol=1e-9)


class Knowing:
    """A fake that knows the student N(mean, std^2) and the log ratio to the teacher's Gaussian, off by `tilt` times x_t."""

    def __init__(self, mean, std, tilt=0.0):
        self.mean, self.std, self.tilt = mean, std, tilt

    def __call__(self, x_t, t, text, with_ground=False):
        shaped = t.view(-1, 1, 1, 1)
        v = (x_t - clean(x_t, shaped, self.mean, self.std)) / shaped
        log = lambda mean, std: torch.distributions.Normal((1 - shaped) * mean, variance(shaped, std) ** 0.5).log_prob(x_t)
        told = (log(MEAN, STD) - log(self.mean, self.std) + self.tilt * x_t).flatten(1)[..., None]
        return (v, told) if with_ground else v


def gaussian_setting(x, mean=0.8, std=0.4, seed=5):
    t = torch.linspace(0.05, 0.95, len(x), dtype=torch.float64)
    text = torch.ones(len(x), 3, dtype=torch.long)
    return MatchingContext(Knowing(MEAN, STD), Knowing(mean, std), text, t, double(*x.shape, seed=seed))


def test_f_js_is_dmd_weighted_per_sample():
    """The derivative at x is the DMD gradient times r / (1 + r) over its mean over the batch, over the number of elements; 1e-12."""
    x = (0.8 + 0.4 * double(7, 1, 1, 1)).requires_grad_()
    s = gaussian_setting(x)
    (found,) = torch.autograd.grad(OBJECTIVES["f-js"].loss(x, s), x)
    x_t = interpolate(x.detach(), s.eps, s.t)
    weight = log_ratio(s.fake, x_t, s.t, s.text)[0].sigmoid()
    pull = dmd_gradient(x, *dmd_scores(x, s.text, s.teacher, s.fake, 1.0, s.t, s.eps))
    torch.testing.assert_close(found, (weight / weight.mean()).view(-1, 1, 1, 1) * pull / x.numel(), atol=1e-12, rtol=0)
    assert weight.std() > 0.05


def test_ratio_loss_is_least_at_the_true_ratio():
    """Pictures of one pixel, 4000 of the student's and of the teacher's: the discriminator that knows both densities has a lower
    loss than one tilted either way; and the student's samples get no gradient."""
    student, real = (0.8 + 0.4 * double(4000, 1, 1, 1)).requires_grad_(), MEAN + STD * double(4000, 1, 1, 1, seed=1)
    t = torch.full((4000,), 0.4, dtype=torch.float64)
    text, eps = torch.ones(4000, 3, dtype=torch.long), double(4000, 1, 1, 1, seed=2)
    loss = lambda tilt: ratio_loss(Knowing(0.8, 0.4, tilt), student, text, real, text, t, eps)
    assert loss(0.0) + 1e-3 < min(loss(0.3), loss(-0.3)) and not loss(0.0).requires_grad


def test_the_gan_term_s_gradient_is_the_score_difference_weighted():
    """-log sigmoid(log r) of pictures of one pixel: the derivative is -(1 - t) (score of the teacher - score of the student) / (1 + r), over
    the batch's size, to 1e-6 (logits are float32); and it points where DMD's points."""
    x = (0.8 + 0.4 * double(7, 1, 1, 1)).requires_grad_()
    s = gaussian_setting(x)
    (found,) = torch.autograd.grad(gan_loss(x, s), x)
    t, points = s.t.view(-1, 1, 1, 1), interpolate(x.detach(), s.eps, s.t)
    score = lambda mean, std: -(points - (1 - t) * mean) / variance(t, std)
    log = lambda mean, std: torch.distributions.Normal((1 - t) * mean, variance(t, std) ** 0.5).log_prob(points)
    ratio = (log(MEAN, STD) - log(0.8, 0.4)).exp()
    wanted = -(1 - t) * (score(MEAN, STD) - score(0.8, 0.4)) / (1 + ratio) / 7
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    pull = dmd_gradient(x, *dmd_scores(x, s.text, s.teacher, s.fake, 1.0, s.t, s.eps))
    assert torch.equal(found.sign(), pull.sign())


# --- MMD


def test_mmd_on_gaussians_is_the_closed_form_s_value_and_slope():
    """E k(x, y) = sqrt(h / (h + s^2)) exp(-m^2 / (2 (h + s^2))) for x - y ~ N(m, s^2): mean of 300 unbiased estimates from 40
    samples, and of their derivatives by the student's mean and width, within 5 standard errors; and those are small."""
    widths, leaves = (0.5, 2.0), learnt((0.9, 0.4))

    def expected(m, s2):
        return sum((h / (h + s2)) ** 0.5 * torch.exp(-(m**2) / (2 * (h + s2))) for h in widths) / len(widths)

    mean, std = leaves
    value = expected(mean * 0, 2 * std**2) + expected(mean * 0, torch.tensor(2 * STD**2)) - 2 * expected(mean - MEAN, std**2 + STD**2)
    wanted = torch.cat((value.view(1), slopes(value, leaves))).detach()  # 40 against 40 below
    rows = []
    for seed in range(300):
        x, y = mean + std * double(40, 1, seed=2 * seed), MEAN + STD * double(40, 1, seed=2 * seed + 1)
        k = lambda a, b: kernel(squared_distances(a, b), widths)
        found = mmd_squared(k(x, x), k(x, y), k(y, y))
        rows.append(torch.cat((found.view(1), slopes(found, leaves))).detach())
    rows = torch.stack(rows)
    error = rows.std(0) / len(rows) ** 0.5
    assert ((rows.mean(0) - wanted).abs() < 5 * error).all() and (error < 0.1 * wanted.abs().max()).all()


def test_mmd_compares_pairs_of_picture_and_caption():
    """The same pictures and the same captions, paired otherwise, are another distribution: shuffled captions raise the discrepancy.
    And the gradient reaches the pictures."""
    words = torch.cat((torch.zeros(20, 3), torch.ones(20, 3)))
    draw = lambda seed: words[:, :1] * 3 + torch.randn(40, 4, generator=torch.Generator().manual_seed(seed))
    real, student = draw(0), draw(1).requires_grad_()
    right, wrong = mmd_loss(student, words, real, words), mmd_loss(student, words.flip(0), real, words)
    assert wrong > right + 0.1
    assert torch.autograd.grad(wrong, student)[0].flatten(1).norm(dim=1).min() > 0


# --- what all have in common


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n != "mmd"])
def test_descent_moves_the_student_to_the_teacher(name):
    """A student N(mu, .5^2) with an exact fake score descends from 0.9 to the teacher's -0.3, within 0.06; the mutant with the sign
    flipped is farther away than it was."""

    def end(sign, updates, mu=0.9):
        for k in range(updates):
            leaf = torch.tensor(mu, dtype=torch.float64, requires_grad=True)
            x = leaf + STD * double(64, 1, 1, 1, seed=10 * k)
            s = gaussian_setting(x, mu, STD, seed=10 * k + 1)
            (slope,) = torch.autograd.grad(sign * OBJECTIVES[name].loss(x, s), leaf)
            mu = (leaf - 0.3 / (1 + k / 20) * slope).item()
        return mu

    assert end(1.0, 120) == pytest.approx(MEAN, abs=0.06)
    assert end(-1.0, 10) > 1.0


def test_mmd_descent_moves_features_to_the_real_ones():
    """Pictures' features, all free, descend until their mean is the real ones' within 0.3, from 2 away; captions are all alike."""
    real, words = double(64, 4), torch.zeros(64, 2, dtype=torch.float64)
    points = (double(64, 4, seed=1) + 2.0).requires_grad_()
    optimizer = torch.optim.Adam([points], 0.1)
    for _ in range(150):
        optimizer.zero_grad()
        mmd_loss(points, words, real, words).backward()
        optimizer.step()
    assert (points.mean(0) - real.mean(0)).abs().max() < 0.3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_the_pictures_get_a_gradient(name):
    """Of real networks: finite and not zero at x; no weight of teacher or fake holds a gradient afterwards."""
    teacher, fake = tiny_dit(1).requires_grad_(False), tiny_dit(2)
    if OBJECTIVES[name].ratio:
        fake.ground = ratio_head(fake.config.width)
        torch.nn.init.normal_(fake.ground.weight)  # an untaught discriminator has no gradient yet
    batch, x = requests("recolor", "remove", "move"), pictures(3, 5).requires_grad_()
    s = MatchingContext(teacher, fake, batch.target_caption, torch.tensor([0.3, 0.6, 0.9]), pictures(3, 6), 2.0, "sample", batch.reference, batch.reference_caption)
    (gradient,) = torch.autograd.grad(OBJECTIVES[name].loss(x, s), x)
    assert gradient.isfinite().all() and gradient.flatten(1).norm(dim=1).min() > 0
    assert all(p.grad is None for m in (teacher, fake) for p in m.parameters())


def test_estimates_are_dmd_s_and_keep_the_graph():
    """The same two pictures as `dmd_scores`, to 1e-6, but depending on x; guidance reaches the teacher alone."""
    teacher, fake = tiny_dit(1), tiny_dit(2)
    x, text = pictures(2).requires_grad_(), torch.randint(5, 40, (2, 6))
    s = MatchingContext(teacher, fake, text, torch.tensor([0.3, 0.8]), pictures(2, 1), 3.0)
    mine, theirs = estimates(x, s), dmd_scores(x, text, teacher, fake, 3.0, s.t, s.eps)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        assert a.requires_grad and not b.requires_grad
    x_t = interpolate(x, s.eps, s.t)
    torch.testing.assert_close(mine[1], to_x0(x_t, fake(x_t, s.t, text), s.t))


def test_the_default_is_dmd_to_the_bit():
    """The registry's "dmd" is the surrogate of the DMD gradient: value and derivative equal bit for bit."""
    x = pictures(3, 5).requires_grad_()
    s = MatchingContext(tiny_dit(1), tiny_dit(2), torch.randint(5, 40, (3, 6)), torch.tensor([0.3, 0.6, 0.9]), pictures(3, 6), 2.0)
    a = torch.autograd.grad(OBJECTIVES["dmd"].loss(x, s), x)[0]
    b = torch.autograd.grad(dmd_loss(x, dmd_gradient(x, *dmd_scores(x, s.text, s.teacher, s.fake, 2.0, s.t, s.eps))), x)[0]
    assert torch.equal(a, b) and NPEditConfig.make("laptop").matching == "dmd"


def test_features_do_not_read_the_caption():
    """A picture's features are the same whatever its caption; the caption's are the words', and neither is constant."""
    teacher, text = tiny_dit(1), torch.randint(5, 40, (2, 6))
    s = MatchingContext(teacher, None, text, torch.tensor([0.3, 0.8]), pictures(2, 1))
    (a, words), (b, others) = features(s, pictures(2), text), features(s, pictures(2), text.flip(0))
    assert torch.equal(a, b) and torch.equal(words, others.flip(0)) and not torch.equal(words[0], words[1]) and not torch.equal(a[0], a[1])


# --- in the trainer


def configuration(out, folder, **overrides) -> NPEditConfig:
    places = dict(teacher=str(folder / "teacher"), judge=str(folder / "judge"), student=str(folder / "student"), out=str(out))
    return NPEditConfig.make("smoke", **{**places, "side": SIDE, "batch": 3, "precision": "no", "steps": 2, **overrides})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains(folder, tmp_path, name):
    """Two updates: finite figures, a pull of its own (an adversary's once it has learnt), a changed student; the fake learns unless nobody asks it, and the
    discriminator learns where there is one."""
    steps = list(train_npedit(configuration(tmp_path / "run", folder, matching=name)))
    assert [s.index for s in steps] == [1, 2] and all(np.isfinite(v) for s in steps for v in s.metrics.values())
    assert steps[name == "gan"].metrics["gradient_dmd"] > 0 and not steps[0].skipped and steps[0].metrics["calls"] in (3, 6)
    assert ("fake_loss" in steps[0].metrics) == OBJECTIVES[name].fake
    fake = load_file(tmp_path / "run" / "checkpoint" / "fake.safetensors")
    assert (fake["ground.weight"].shape[0] == 1 and fake["ground.weight"].abs().max() > 0) == OBJECTIVES[name].ratio
    same = torch.equal(fake["head.2.weight"], load_file(folder / "teacher" / "diffusion_pytorch_model.safetensors")["head.2.weight"])
    assert same == (not OBJECTIVES[name].fake)
    start = load_file(folder / "student" / "diffusion_pytorch_model.safetensors")
    model = load_file(tmp_path / "run" / "model" / "diffusion_pytorch_model.safetensors")
    assert not torch.equal(start["head.2.weight"], model["head.2.weight"])


def test_the_discriminator_resumes_with_the_fake(folder, tmp_path):
    """A run with a density ratio, killed in the middle, ends in the straight run's weights, bit for bit."""
    straight = configuration(tmp_path / "straight", folder, matching="f-js", steps=3)
    list(train_npedit(straight))
    killed = configuration(tmp_path / "killed", folder, matching="f-js", steps=3)
    run = train_npedit(killed)
    next(run), next(run)
    run.close()
    list(train_npedit(killed))
    for name in ("model/diffusion_pytorch_model", "checkpoint/fake"):
        a, b = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("straight", "killed"))
        assert all(torch.equal(a[k], b[k]) for k in a), name


def test_the_discriminator_sees_references_and_student_pictures(folder, tmp_path):
    """Its cross-entropy falls when only it is trained: 40 updates of the fake on fixed pictures bring the loss below log 4 by 0.05."""
    config = configuration(tmp_path / "run", folder, matching="f-js", ratio_weight=1.0)
    roles = NPEdit(config, tiny_dit(0), tiny_dit(1), tiny_dit(2), tiny_judge(3))
    batch = requests("recolor", "remove", "move", "style")
    optimizer, outputs = torch.optim.Adam(roles.fake.parameters(), 3e-3), pictures(4, 7)
    t, eps = torch.full((4,), 0.3), pictures(4, 8)
    loss = lambda: ratio_loss(roles.fake, outputs, batch.target_caption, batch.reference, batch.reference_caption, t, eps).item()
    assert loss() == pytest.approx(2 * np.log(2), abs=1e-6)
    for _ in range(40):
        roles.fake_backward(outputs, batch.target_caption, batch)
        optimizer.step()
        optimizer.zero_grad()
    assert loss() < 2 * np.log(2) - 0.05


@pytest.mark.parametrize("name", ("dmd_norm", "calls", "renoise", "answer_loss"))
def test_words_that_mean_nothing_are_refused_before_training(name):
    with pytest.raises(ConfigError, match=f"{name} is 'thrice'; known: "):
        NPEditConfig.make("smoke", **{name: "thrice"})


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match="matching is 'kl'; known: dmd, f-js, sid, pseudo-huber, mmd, gan"):
        NPEditConfig.make("smoke", matching="kl")
    with pytest.raises(ConfigError, match="batch is 1; matching 'mmd' compares pictures with each other: it must be at least 2"):
        NPEditConfig.make("smoke", matching="mmd", batch=1)
