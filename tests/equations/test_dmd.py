"""Distribution matching: the Gaussian whose scores are known, the sign in words, and mutants of every part."""

import pytest
import torch
from einops import rearrange
from helpers.tiny_models import pictures, tiny_dit

from vlmedit.equations.dmd import dmd_gradient, dmd_loss, dmd_scores, draw_dmd_time, fake_score_loss
from vlmedit.flow import flow_matching_loss, guide, interpolate, to_x0

TIMES = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_density(x_t, t, mean, std):
    """log N(x_t; (1 - t) mean, (1 - t)^2 std^2 + t^2): the noised Gaussian's, from torch.distributions."""
    t = t.view(-1, *[1] * (x_t.ndim - 1))
    return torch.distributions.Normal((1 - t) * mean, ((1 - t) ** 2 * std**2 + t**2).sqrt()).log_prob(x_t).sum()


def gaussian(mean, std):
    """A denoiser that knows N(mean, std^2): velocity from the score by Tweedie's formula, x0 = (x_t + t^2 score) / (1 - t)."""

    def velocity(x_t, t, text):
        with torch.enable_grad():
            leaf = x_t.detach().requires_grad_()
            (score,) = torch.autograd.grad(log_density(leaf, t, mean, std), leaf)
        t = t.view(-1, *[1] * (x_t.ndim - 1))
        return (x_t - (x_t + t**2 * score) / (1 - t)) / t

    return velocity


NO_TEXT = torch.ones(25, 3, dtype=torch.long)


# --- the Gaussian closed form


@pytest.mark.parametrize("student, teacher, std", ((0.5, -0.3, 0.4), (-1.0, 2.0, 0.7), (0.2, 0.1, 0.05)))
def test_gradient_is_the_gaussian_s_at_every_time(student, teacher, std):
    """Student N(m_s, s^2) and teacher N(m_t, s^2): x0_fake - x0_real = (m_s - m_t) t^2 / ((1 - t)^2 s^2 + t^2) at every pixel,
    and the gradient is that over the sample's mean |x - x0_real|: direction and magnitude at 25 times, to 1e-9."""
    x, eps = student + std * double(25, 1, 4, 4), double(25, 1, 4, 4, seed=1)
    real, fake = dmd_scores(x, NO_TEXT, gaussian(teacher, std), gaussian(student, std), 1.0, TIMES, eps)
    t = TIMES.view(-1, 1, 1, 1)
    variance = (1 - t) ** 2 * std**2 + t**2
    expected = ((student - teacher) * t**2 / variance).expand_as(x)
    torch.testing.assert_close(fake - real, expected, atol=1e-9, rtol=0)
    x_t = (1 - t) * x + t * eps
    posterior_mean = teacher + (1 - t) * std**2 / variance * (x_t - (1 - t) * teacher)
    scale = (x - posterior_mean).abs().mean((1, 2, 3), keepdim=True)
    gradient = dmd_gradient(x, real, fake)
    torch.testing.assert_close(gradient, expected / scale, atol=1e-9, rtol=1e-9)
    assert (gradient.sign() == (1 if student > teacher else -1)).all()


def test_gradient_is_the_kl_s_up_to_a_positive_factor():
    """With unequal widths too, x0_fake - x0_real is t^2 / (1 - t) times (score of the student - score of the teacher), the
    integrand of the gradient of KL(student || teacher): Eq. 7, scores from autograd, to 1e-9."""
    x, eps = double(25, 1, 4, 4), double(25, 1, 4, 4, seed=1)
    real, fake = dmd_scores(x, NO_TEXT, gaussian(-0.3, 0.8), gaussian(0.5, 0.2), 1.0, TIMES, eps)
    leaf = interpolate(x, eps, TIMES).requires_grad_()
    student, teacher = (torch.autograd.grad(log_density(leaf, TIMES, m, s), leaf)[0] for m, s in ((0.5, 0.2), (-0.3, 0.8)))
    t = TIMES.view(-1, 1, 1, 1)
    torch.testing.assert_close(fake - real, t**2 / (1 - t) * (student - teacher), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("norm", ("sample", "pixel"))
def test_descent_moves_the_student_to_the_teacher(norm):
    """A student that draws N(mu, .3^2), with a fake score that knows it exactly, descends from mu = 1.5 to the teacher's -0.5,
    within 0.03. With the sign flipped it runs away."""

    def end(sign: float, updates: int) -> float:
        torch.manual_seed(0)
        mu = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        for k in range(updates):
            x = mu + 0.3 * torch.randn(16, 1, 4, 4, dtype=torch.float64)
            t, eps = draw_dmd_time(16).double(), torch.randn(16, 1, 4, 4, dtype=torch.float64)
            scores = dmd_scores(x, torch.ones(16, 3, dtype=torch.long), gaussian(-0.5, 0.3), gaussian(mu.detach(), 0.3), 1.0, t, eps)
            (slope,) = torch.autograd.grad(dmd_loss(x, sign * dmd_gradient(x, *scores, norm)), mu)
            mu = (mu - 0.3 / (1 + k / 20) * slope).detach().requires_grad_()
        return mu.item()

    assert end(1.0, 80) == pytest.approx(-0.5, abs=0.03)
    assert end(-1.0, 10) > 2.5


# --- the surrogate


def test_surrogate_s_derivative_is_the_gradient():
    """d loss / d x = gradient / numel, to 1e-12; nothing flows into the gradient itself."""
    x, gradient = double(3, 2, 4, 4).requires_grad_(), double(3, 2, 4, 4, seed=1).requires_grad_()
    dmd_loss(x, gradient).backward()
    torch.testing.assert_close(x.grad, gradient.detach() / x.numel(), atol=1e-12, rtol=0)
    assert gradient.grad is None


def test_gradient_never_carries_a_graph():
    """Even where pictures and both predictions do; and what is not finite becomes finite."""
    x, real, fake = (double(2, 3, 4, 4, seed=i).requires_grad_() for i in range(3))
    for norm in ("sample", "pixel"):
        assert not dmd_gradient(x, real, fake, norm).requires_grad
    broken = fake.detach().clone()
    broken[0, 0, 0, 0] = float("nan")
    assert dmd_gradient(x, real, broken).isfinite().all()


def test_no_gradient_reaches_teacher_or_fake():
    """A student's picture with a graph through all three networks' arithmetic: the student's weights have a gradient, the others none."""
    student, teacher, fake = (tiny_dit(i) for i in range(3))
    noise, text, t = pictures(2), torch.randint(5, 40, (2, 6)), torch.tensor([0.3, 0.8])
    x = to_x0(noise, student(noise, torch.ones(2), text), 1.0)
    real, estimate = dmd_scores(x, text, teacher, fake, 2.0, t, torch.randn_like(x))
    dmd_loss(x, dmd_gradient(x, real, estimate)).backward()
    assert all(p.grad is None for model in (teacher, fake) for p in model.parameters())
    assert student.head[2].weight.grad.abs().max() > 0


# --- the normalizers


def by_hand(x, real, fake):
    """Eq. 7 over Eq. 8, sample by sample, in numpy."""
    x, real, fake = (v.detach().numpy() for v in (x, real, fake))
    return torch.tensor([((f - r) / abs(a - r).mean()).tolist() for a, r, f in zip(x, real, fake)], dtype=torch.float64)


MUTANTS = {
    "flipped sign": lambda x, real, fake: dmd_gradient(x, fake, real) * (x - fake).abs().mean((1, 2, 3), True) / (x - real).abs().mean((1, 2, 3), True),
    "batch-wide normalizer": lambda x, real, fake: (fake - real) / (x - real).abs().mean(),
    "no normalizer": lambda x, real, fake: fake - real,
    "normalized by the fake": lambda x, real, fake: (fake - real) / (x - fake).abs().mean((1, 2, 3), True),
    "sum, not mean": lambda x, real, fake: (fake - real) / (x - real).abs().sum((1, 2, 3), True),
    "per pixel": lambda x, real, fake: dmd_gradient(x, real, fake, "pixel"),
}


def three(batch: int):
    """Pictures, teacher's and fake's predictions, each sample at another distance from the teacher's."""
    distance = torch.arange(1.0, batch + 1, dtype=torch.float64).view(-1, 1, 1, 1)
    return double(batch, 3, 4, 4), double(batch, 3, 4, 4, seed=1) * distance, double(batch, 3, 4, 4, seed=2)


def test_normalizer_is_per_sample():
    """Equal to the definition written out in numpy, to 1e-12: so a sample's gradient does not depend on its neighbours."""
    x, real, fake = three(4)
    torch.testing.assert_close(dmd_gradient(x, real, fake), by_hand(x, real, fake), atol=1e-12, rtol=0)
    alone = torch.cat([dmd_gradient(x[i : i + 1], real[i : i + 1], fake[i : i + 1]) for i in range(4)])
    assert torch.equal(dmd_gradient(x, real, fake), alone)


@pytest.mark.parametrize("name", MUTANTS)
def test_known_mistakes_are_told_apart(name):
    """Each mutant is more than 1 % off for a batch of 4. The batch-wide normalizer is right for a batch of 1: one sample
    would not tell it."""
    off = lambda batch: ((MUTANTS[name](*three(batch)) - by_hand(*three(batch))).abs().mean() / by_hand(*three(batch)).abs().mean()).item()
    assert off(4) > 0.01
    assert (off(1) < 1e-12) == (name == "batch-wide normalizer")


def test_pixel_normalizer_is_the_released_code_s():
    """Recomputed as released (method.md 1.7): "(b c) ..." split with b, then mean over both leading axes of (b, 1, C, f, h, w),
    which leaves one weight per pixel, clamped from below."""
    x, real, fake = three(3)
    video = lambda v: v[:, :, None]  # (b, C, f, h, w)
    weight = rearrange((video(x) - video(real)).abs(), "(b c) ... -> b c ...", b=3).mean([1, 2]).clamp(min=1e-8)  # (b, f, h, w)
    assert weight.shape == (3, 1, 4, 4)
    torch.testing.assert_close(dmd_gradient(x, real, fake, "pixel"), (fake - real) / weight, atol=1e-12, rtol=0)


def test_normalizer_is_bounded_from_below():
    """Where the teacher agrees with the picture exactly, the gradient is (x0_fake - x0_real) / eps, not infinite."""
    x, _, fake = three(2)
    torch.testing.assert_close(dmd_gradient(x, x, fake, eps=1e-2), (fake - x) / 1e-2, atol=1e-12, rtol=0)


def test_unknown_normalizer():
    with pytest.raises(ValueError, match="unknown normalizer 'batch'; known: sample, pixel"):
        dmd_gradient(*three(1), norm="batch")


# --- the two scores


@pytest.mark.parametrize("norm", ("sample", "pixel"))
def test_a_fake_equal_to_the_teacher_gives_exactly_zero(norm):
    """Unguided, equal weights cancel to the bit; guided they do not."""
    teacher, fake = tiny_dit(), tiny_dit()
    x, text, t, eps = pictures(2), torch.randint(5, 40, (2, 6)), torch.tensor([0.3, 0.8]), pictures(2, 1)
    assert (dmd_gradient(x, *dmd_scores(x, text, teacher, fake, 1.0, t, eps), norm) == 0).all()
    assert (dmd_gradient(x, *dmd_scores(x, text, teacher, fake, 2.0, t, eps), norm) != 0).any()


def test_scores_are_the_networks_denoised_pictures():
    """Both predictions start from the same x_t; only the teacher is guided, against the empty caption; w = 1 asks it once."""
    teacher, fake = tiny_dit(1), tiny_dit(2)
    x, text, t, eps = pictures(3), torch.randint(5, 40, (3, 6)), torch.tensor([0.1, 0.5, 0.9]), pictures(3, 1)
    x_t, empty = interpolate(x, eps, t), torch.zeros_like(text)
    with torch.no_grad():
        expected_real = to_x0(x_t, guide(teacher(x_t, t, text), teacher(x_t, t, empty), 3.5), t)
        expected_fake = to_x0(x_t, fake(x_t, t, text), t)
    real, estimate = dmd_scores(x, text, teacher, fake, 3.5, t, eps)
    assert torch.equal(real, expected_real) and torch.equal(estimate, expected_fake)
    asked = []
    dmd_scores(x, text, lambda *a: asked.append(a) or teacher(*a), fake, 1.0, t, eps)
    assert len(asked) == 1 and torch.equal(asked[0][2], text)


def test_each_row_may_have_a_scale_of_its_own():
    """Row by row the scores are those of that row's scale; a row of scales asks for the unconditional score even where all are 1."""
    teacher, fake, scales = tiny_dit(1), tiny_dit(2), torch.tensor([1.0, 3.5, 7.5])
    x, text, t, eps = pictures(3), torch.randint(5, 40, (3, 6)), torch.tensor([0.1, 0.5, 0.9]), pictures(3, 1)
    real, _ = dmd_scores(x, text, teacher, fake, scales, t, eps)
    for row, scale in enumerate(scales.tolist()):
        torch.testing.assert_close(real[row], dmd_scores(x, text, teacher, fake, scale, t, eps)[0][row], atol=1e-5, rtol=0)
    asked = []
    dmd_scores(x, text, lambda *a: asked.append(a) or teacher(*a), fake, torch.ones(3), t, eps)
    assert [bool(a[2].any()) for a in asked] == [True, False]


def test_dmd_times_are_uniform_between_the_released_bounds():
    """0.02 to 0.98: bounds touched within 1e-3 by 20000 draws, mean and deviation within 5 standard errors."""
    t = draw_dmd_time(20_000)
    assert 0.02 <= t.min() < 0.021 and 0.979 < t.max() <= 0.98
    assert abs(t.mean() - 0.5) < 5 * 0.96 / 12**0.5 / 20_000**0.5 and abs(t.std() - 0.96 / 12**0.5) < 0.005


# --- the fake score


def test_fake_score_loss_is_flow_matching_on_detached_samples():
    """Its value is the flow-matching loss; the fake's weights get its gradient, the student that drew the samples none."""
    fake, text, t, eps = tiny_dit(), torch.randint(5, 40, (2, 6)), torch.tensor([0.3, 0.8]), pictures(2, 1)
    samples = pictures(2).requires_grad_()
    loss = fake_score_loss(fake, samples, text, t, eps)
    loss.backward()
    assert samples.grad is None and fake.head[2].weight.grad.abs().max() > 0
    with torch.no_grad():
        assert torch.equal(loss.detach(), flow_matching_loss(lambda x, time: fake(x, time, text), samples, t, eps).mean())


def test_fake_score_loss_is_least_for_the_student_s_own_distribution():
    """Of Gaussian denoisers, the one that knows the samples' mean and width has the least loss: so minimising it learns that score."""
    samples, eps, t = 0.4 + 0.3 * double(2000, 1, 2, 2), double(2000, 1, 2, 2, seed=1), torch.rand(2000, dtype=torch.float64) * 0.9 + 0.05
    loss = lambda mean, std: fake_score_loss(gaussian(mean, std), samples, NO_TEXT, t, eps).item()
    assert all(loss(0.4, 0.3) < loss(*other) for other in ((0.2, 0.3), (0.6, 0.3), (0.4, 0.15), (0.4, 0.6)))
