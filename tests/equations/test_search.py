"""Search under a frozen loss: closed forms on linear and quadratic losses, each sample by itself, nothing leaves its ball."""

import math

import pytest
import torch
from scipy import stats

from vlmedit.equations.search import ascend, norm_penalty, optimise_noise, optimise_pixels, resample, size, steer
from vlmedit.flow import sample

SHAPE = (5, 3, 4, 4)


def draw(seed: int = 0, shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(direction):
    """A loss whose gradient is the same everywhere, another one for each sample."""
    return lambda x: (x * direction).flatten(1).sum(1)


# --- one step


def test_a_step_has_the_given_length_along_each_sample_s_gradient():
    """From the center and inside the ball: length 0.3 whatever the gradient's own, 1000 times as long for one sample as for another."""
    gradient = draw() * torch.logspace(-1, 2, 5, dtype=torch.float64).view(-1, 1, 1, 1)
    step = ascend(torch.zeros(SHAPE, dtype=torch.float64), gradient, 0.3, 1.0)
    torch.testing.assert_close(size(step).flatten(), torch.full((5,), 0.3, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close((step * gradient).flatten(1).sum(1), 0.3 * gradient.flatten(1).norm(dim=1), atol=1e-9, rtol=1e-12)


def test_a_step_ends_in_the_ball_and_a_short_one_is_not_stretched():
    """Radii of 0.1 to 2 for steps of length 1: the norm is the smaller of the two, the direction stays."""
    radius = torch.tensor([0.1, 0.5, 0.999, 1.5, 2.0], dtype=torch.float64)
    step = ascend(torch.zeros(SHAPE, dtype=torch.float64), draw(), 1.0, radius)
    torch.testing.assert_close(size(step).flatten(), radius.clamp(max=1), atol=1e-12, rtol=0)
    torch.testing.assert_close(step / size(step), draw() / size(draw()), atol=1e-12, rtol=0)


def test_a_gradient_of_zero_moves_nothing():
    delta = draw(1) * 0.01
    assert torch.equal(ascend(delta, torch.zeros(SHAPE, dtype=torch.float64), 0.3, 10.0), delta)


# --- pixels


def test_on_a_linear_loss_the_walk_is_straight():
    """After k steps of 0.2 from a picture in the middle of the range: k 0.2 against the gradient, at most the radius; the loss falls by it."""
    direction, start = draw(2), 0.1 * draw().clamp(-1, 1)
    length = direction.flatten(1).norm(dim=1)
    values = []
    for step in optimise_pixels(linear(direction), start, radius=0.7, steps=5, length=0.2):
        gone = min(0.2 * step.index, 0.7)
        torch.testing.assert_close(step.x, -gone * direction / size(direction), atol=1e-12, rtol=0)
        torch.testing.assert_close(step.loss, linear(direction)(start) - gone * length, atol=1e-12, rtol=0)
        assert not step.x.requires_grad and not step.pictures.requires_grad and not step.loss.requires_grad
        values.append(step.loss)
    assert len(values) == 6


def test_pictures_stay_in_range_and_in_the_ball():
    """From pictures at the edge of [-1, 1]: clamped, and no farther from the start than the radius, to 1e-9."""
    start = draw().clamp(-1, 1)
    for step in optimise_pixels(linear(draw(3)), start, radius=2.0, steps=8, length=0.5):
        assert step.pictures.abs().max() <= 1
        assert (size(step.pictures - start) <= 2.0 + 1e-9).all()


# --- the norm's density


def test_the_penalty_is_the_chi_density_s():
    """Differences of the penalty equal differences of -log chi(d) of the norm, to 1e-9: the constant alone is left out."""
    noise = draw() * torch.tensor([0.3, 0.8, 1.0, 1.3, 3.0], dtype=torch.float64).view(-1, 1, 1, 1)
    exact = -torch.tensor(stats.chi(48).logpdf(noise.flatten(1).norm(dim=1).numpy()))
    gap = norm_penalty(noise) - exact
    torch.testing.assert_close(gap, gap[:1].expand(5), atol=1e-9, rtol=0)


def test_descent_on_the_penalty_finds_the_typical_norm():
    """With nothing else to please, noise shrunk to a tenth and noise blown up tenfold both come to sqrt(d - 1), to 1e-3, and only their norm changes."""
    start = draw() * torch.tensor([0.1, 0.5, 1.0, 2.0, 10.0], dtype=torch.float64).view(-1, 1, 1, 1)
    steps = list(optimise_noise(lambda z: z, lambda x: 0 * x.flatten(1).sum(1), start, steps=400, lr=0.5, momentum=0.5, clip=2.0, weight=1.0))
    end = steps[-1].x
    torch.testing.assert_close(size(end).flatten(), torch.full((5,), math.sqrt(47), dtype=torch.float64), atol=1e-3, rtol=0)
    torch.testing.assert_close(end / size(end), start / size(start), atol=1e-9, rtol=0)


# --- noise


def test_noise_is_found_whose_picture_is_the_wanted_one():
    """G(z) = A z and a squared distance: the loss falls below a thousandth; the generator's picture belongs to the noise of the same record."""
    matrix = torch.eye(48, dtype=torch.float64) + 0.02 * draw(4, (48, 48))
    wanted = draw(5)
    generate = lambda z: (z.flatten(1) @ matrix).view(SHAPE)
    loss = lambda x: (x - wanted).flatten(1).square().sum(1)
    steps = list(optimise_noise(generate, loss, draw(), steps=300, lr=0.05, clip=10.0, weight=0.0))
    assert len(steps) == 301 and torch.equal(steps[0].x, draw())
    assert (steps[-1].loss < 1e-3 * steps[0].loss).all()
    for step in steps[::100]:
        torch.testing.assert_close(generate(step.x), step.pictures, atol=1e-12, rtol=0)
        torch.testing.assert_close(loss(step.pictures), step.loss, atol=1e-12, rtol=0)


def test_nesterov_with_clipping_in_closed_form():
    """A linear loss with gradient longer than the clip: every clipped gradient is the unit vector times 0.1, so the k-th update of
    Nesterov's rule is lr 0.1 (g_1 + ...): after two steps -lr 0.1 ((1 + m) + (1 + m + m^2)) u."""
    direction, m, lr = draw(6), 0.9, 5.0
    end = list(optimise_noise(lambda z: z, linear(direction), draw(), steps=2, lr=lr, momentum=m, clip=0.1, weight=0.0))[-1].x
    unit = direction / size(direction)
    expected = draw() - lr * 0.1 * ((1 + m) + (1 + m + m * m)) * unit
    torch.testing.assert_close(end, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("which", ("pixels", "noise"))
def test_a_sample_s_search_does_not_depend_on_its_batch(which):
    """The last record of a batch of five equals that of each sample alone, to 1e-12, though their gradients differ a thousandfold."""
    scale = torch.logspace(-1, 2, 5, dtype=torch.float64)

    def run(rows):
        loss = lambda x: scale[rows] * (x - draw(7)[rows]).flatten(1).square().sum(1).sqrt()
        if which == "pixels":
            return list(optimise_pixels(loss, 0.2 * draw()[rows], 1.0, 6, 0.3))[-1].x
        return list(optimise_noise(lambda z: torch.tanh(z), loss, draw()[rows], 6))[-1].x

    together = run(list(range(5)))
    for i in range(5):
        torch.testing.assert_close(run([i])[0], together[i], atol=1e-12, rtol=0)


def test_the_caller_s_noise_is_left_alone():
    noise, kept = draw(), draw()
    list(optimise_noise(torch.tanh, linear(draw(8)), noise, 3))
    assert torch.equal(noise, kept) and not noise.requires_grad


# --- steering samples


def toy(batch: int, seed: int = 0):
    """A flow to each row's own place, and noise to start from."""
    goal = draw(seed + 50, (batch, 3, 4, 4))
    return lambda x, t: (x - goal[: len(x)]) / t.view(-1, 1, 1, 1) * 0.7, draw(seed, (batch, 3, 4, 4))


TIMES = (1.0, 0.75, 0.5, 0.25)


@pytest.mark.parametrize("sampler", ("renoise", "euler", "corrector"))
def test_one_particle_is_plain_sampling(sampler):
    """The same bits as `flow.sample` from the same generator, and the judge is never asked."""
    velocity, noise = toy(5)
    refuse = lambda pictures: pytest.fail("asked for a reward")
    generator = lambda: torch.Generator().manual_seed(3)
    found = steer(velocity, refuse, noise, TIMES, 1, 2.0, sampler, generator())
    assert torch.equal(found, sample(velocity, noise, TIMES, sampler, generator()))


@pytest.mark.parametrize("times, strength", (((1.0,), 1.0), (TIMES, 0.0)))
def test_one_step_or_no_strength_is_best_of_n(times, strength):
    """Of each group of four plain samples the one with the highest reward, whatever the strength at one step."""
    velocity, noise = toy(12)
    generator = lambda: torch.Generator().manual_seed(3)
    reward = lambda pictures: pictures[:, 0, 0, 0]
    plain = sample(velocity, noise, times, "renoise", generator())
    rows = reward(plain).view(3, 4).argmax(1) + 4 * torch.arange(3)
    assert torch.equal(steer(velocity, reward, noise, times, 4, strength, "renoise", generator()), plain[rows])


def test_survivors_are_drawn_by_their_weights():
    """30,000 draws of four particles with weights 1 : 2 : 3 : 4: each share within 5 standard errors; never from another group."""
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0]).log().repeat(7500)
    rows = resample(weights, 4, torch.Generator().manual_seed(0))
    assert torch.equal(rows // 4, torch.arange(30_000) // 4)
    shares = torch.bincount(rows % 4) / 30_000
    assert ((shares - torch.tensor([0.1, 0.2, 0.3, 0.4])).abs() < 5 * 0.5 / 30_000**0.5).all()


def test_weights_are_gains_of_reward_between_steps(monkeypatch):
    """The potential is strength (r now - r before), r before of the survivor's own past, 0 at the first step; none at the last."""
    from vlmedit.equations import search as module

    velocity, noise = toy(4)
    asked, weights = [], []
    monkeypatch.setattr(module, "resample", lambda w, n, g: weights.append(w.clone()) or torch.tensor([1, 1, 0, 3]))
    reward = lambda pictures: asked.append(pictures.mean((1, 2, 3))) or asked[-1]
    steer(velocity, reward, noise, TIMES, 4, 2.0, "renoise", torch.Generator().manual_seed(0))
    assert len(weights) == 3 and len(asked) == 4
    torch.testing.assert_close(weights[0], 2 * asked[0])
    torch.testing.assert_close(weights[1], 2 * (asked[1] - asked[0][torch.tensor([1, 1, 0, 3])]))


def test_steering_tilts_the_samples_by_the_reward():
    """A flow that ends at random at -1 or 1 (one pixel, by the noise), reward 1 for 1: the best of eight is 1 nearly always, a plain
    sample half the time; every group has its own best."""
    velocity = lambda x, t: (x - x.sign()) / t.view(-1, 1, 1, 1)
    noise = draw(7, (8 * 100, 1, 1, 1))
    reward = lambda pictures: pictures.flatten(1).sum(1)
    best = steer(velocity, reward, noise, TIMES, 8, 1.0, "euler")
    plain = steer(velocity, reward, noise[:100], TIMES, 1, 1.0, "euler")
    assert best.shape == (100, 1, 1, 1) and best.mean() > 0.95 and abs(plain.mean()) < 0.5


def test_broken_groups_are_refused():
    with pytest.raises(ValueError, match="5 rows of noise in groups of 2 particles; all groups must be whole"):
        steer(*toy(5)[:1], None, toy(5)[1], TIMES, 2)
