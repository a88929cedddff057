"""The unroll: closed forms of straight flows, gradients against finite differences, one rule for training and sampling."""

import random
from collections import Counter

import pytest
import torch
from helpers.tiny_models import pictures, tiny_dit

from vlmedit.equations.unroll import CALLS, draw_times, rollout
from vlmedit.flow import few_step_times, sample
from vlmedit.teaching import exercises

PICTURE = (2, 1, 3, 3)


def net(weights, x, t):
    """A smooth nonlinear velocity of one parameter per call: depends on place, time and weight."""
    return torch.tanh(weights * x + t.view(-1, 1, 1, 1)) + weights * x.flip(-1)


def calls_of(weights):
    """A velocity whose k-th call uses the k-th weight, so that a call's gradient can be told from another's."""
    turn = iter(weights)
    return lambda x, t: net(next(turn), x, t)


def draw(seed: int = 0):
    return torch.randn(PICTURE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- closed forms


@pytest.mark.parametrize("times", ((1.0,), (1.0, 0.3), few_step_times(4, 6.0)))
def test_a_point_mass_is_reached_by_every_unroll(times):
    """Velocity (x - m) / t predicts x0 = m from anywhere: any number of calls, either noise, ends at m, to 1e-12."""
    m = draw(1)
    for renoise in ("fresh", "same"):
        out = rollout(lambda x, t: (x - m) / t.view(-1, 1, 1, 1), draw(), times, renoise)
        torch.testing.assert_close(out, m, atol=1e-12, rtol=0)


def test_a_constant_velocity_in_closed_form():
    """v = c: one call gives eps - c. Two calls with the same noise give eps - c again; with fresh noise (1 - t) eps + t eps' - c."""
    eps, c, t = draw(), torch.tensor(0.7, dtype=torch.float64), 0.3
    velocity = lambda x, time: c.expand_as(x)
    close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    close(rollout(velocity, eps, (1.0,)), eps - c)
    close(rollout(velocity, eps, (1.0, t), "same"), eps - c)
    torch.manual_seed(5)
    fresh = torch.randn_like(eps)
    torch.manual_seed(5)
    close(rollout(velocity, eps, (1.0, t), "fresh"), (1 - t) * eps + t * fresh - c)


def test_the_network_is_called_at_the_times_given():
    """Call k sees t_k for every sample, and as its input the noise itself at first, then (1 - t) x0 + t eps."""
    eps, seen = draw(), []
    rollout(lambda x, t: seen.append((x, t)) or 0.5 * x, eps, (1.0, 0.75, 0.25), "same")
    assert [t.tolist() for _, t in seen] == [[1.0] * 2, [0.75] * 2, [0.25] * 2]
    assert torch.equal(seen[0][0], eps)
    x0 = 0.5 * eps
    torch.testing.assert_close(seen[1][0], 0.25 * x0 + 0.75 * eps, atol=1e-12, rtol=0)


def test_the_whole_unroll_is_the_sampler():
    """All calls with fresh noise equal the re-noising sampler on the same stream, exactly: what is trained is what is sampled."""
    dit, noise, text = tiny_dit(), pictures(3), torch.randint(5, 40, (3, 6))
    velocity = lambda x, t: dit(x, t, text)
    times = few_step_times(4, 3.0)
    torch.manual_seed(7)
    with torch.no_grad():
        ours = rollout(velocity, noise, times)
    torch.manual_seed(7)
    assert torch.equal(ours, sample(velocity, noise, times, "renoise"))


def test_same_noise_is_deterministic_and_fresh_noise_is_not():
    """With the same noise the generator's state does not matter; with fresh noise it does; with one call neither draws."""
    velocity = lambda x, t: net(torch.tensor(0.8, dtype=x.dtype), x, t)
    twice = lambda times, renoise: [rollout(velocity, draw(), times, renoise) for _ in range(2)]
    a, b = twice((1.0, 0.5), "same")
    assert torch.equal(a, b)
    a, b = twice((1.0, 0.5), "fresh")
    assert (a - b).abs().mean() > 0.05
    a, b = twice((1.0,), "fresh")
    assert torch.equal(a, b)


# --- gradients


@pytest.mark.parametrize("renoise", ("same", "fresh"))
@pytest.mark.parametrize("times", ((1.0,), (1.0, 0.6)))
def test_gradient_against_finite_differences(times, renoise):
    """Through one and two calls, with respect to every call's weight and the noise: autograd equals central differences in float64."""

    def unrolled(noise, *weights):
        torch.manual_seed(3)  # the fresh noise is part of the function
        return rollout(calls_of(weights), noise, times, renoise)

    weights = [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in (0.9, -0.4)[: len(times)]]
    assert torch.autograd.gradcheck(unrolled, (draw().requires_grad_(), *weights), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("t", (0.25, 0.6))
def test_the_exercise_s_chain_rule_is_autograd_s(t):
    """`exercises.TWO_CALL_SLOPE`, by hand, equals what autograd finds through `rollout` of v = a x with fresh noise, to 1e-12."""
    for value in (-0.8, 0.3, 1.7):
        a, eps = torch.tensor(value, dtype=torch.float64, requires_grad=True), draw().flatten()
        torch.manual_seed(4)
        out = rollout(lambda x, time: a * x, eps, (1.0, t))
        slopes = torch.stack([torch.autograd.grad(x0, a, retain_graph=True)[0] for x0 in out])
        torch.manual_seed(4)
        by_hand = exercises.TWO_CALL_SLOPE.reference(value, eps, torch.randn_like(eps), t)
        torch.testing.assert_close(slopes, by_hand, atol=1e-12, rtol=0)


def test_truncation_cuts_the_early_calls():
    """Of three calls with own weights, the last K have a gradient and the others none; what remains equals the full gradient."""
    full = None
    for kept in (None, 3, 2, 1):
        torch.manual_seed(3)
        weights = [torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in (0.9, -0.4, 0.6)]
        out = rollout(calls_of(weights), draw(), (1.0, 0.7, 0.4), gradient_calls=kept)
        out.square().sum().backward()
        has = [w.grad is not None for w in weights]
        assert has == [i >= 3 - (kept or 3) for i in range(3)]
        full = full or [w.grad for w in weights]
        assert all(w.grad is None or torch.equal(w.grad, g) for w, g in zip(weights, full))


def test_truncated_gradient_in_closed_form():
    """v = c: the full derivative of two calls is -1 (both calls carry -(1 - t) and -t); of the last call alone it is -t.
    The value is the same."""
    t, values = 0.3, []
    for kept, slope in ((None, -1.0), (1, -t)):
        c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        out = rollout(lambda x, time: c.expand_as(x), draw(), (1.0, t), "same", kept)
        out.sum().backward()
        assert c.grad.item() == pytest.approx(slope * out.numel(), abs=1e-12)
        values.append(out.detach())
    assert torch.equal(*values)


def test_truncation_longer_than_the_unroll_is_the_whole():
    """A one-call unroll under gradient_calls=2 still carries its gradient."""
    c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    rollout(lambda x, t: c.expand_as(x), draw(), (1.0,), gradient_calls=2).sum().backward()
    assert c.grad.item() == -draw().numel()


@pytest.mark.parametrize("kept", (None, 1))
def test_no_graph_where_gradients_are_off(kept):
    """Under no_grad, as in fake-score updates, no call records a graph, whatever `gradient_calls` says; the mode comes back after."""
    c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        assert not rollout(lambda x, t: c.expand_as(x), draw(), (1.0, 0.5), gradient_calls=kept).requires_grad
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


# --- times


def test_times_lie_on_the_sampler_s_grid():
    """Whatever the mode, the first time is pure noise and the others are the sampler's own, falling."""
    rng = random.Random(0)
    for calls in CALLS:
        for _ in range(50):
            times = draw_times(rng, calls, 4, 6.0)
            assert times[0] == 1.0 and set(times) <= set(few_step_times(4, 6.0)) and list(times) == sorted(times, reverse=True)
            assert len(times) in {"one": (1,), "two": (2,), "mixed": (1, 2), "all": (4,)}[calls]


def test_a_quarter_of_mixed_unrolls_is_a_single_call():
    """As released: k uniform over the grid. 8000 draws, each of the four outcomes within 5 standard errors of a quarter."""
    rng = random.Random(0)
    counts = Counter(draw_times(rng, "mixed", 4, 6.0) for _ in range(8000))
    grid = few_step_times(4, 6.0)
    assert set(counts) == {grid[:1], *((grid[0], t) for t in grid[1:])}
    assert all(abs(n - 2000) < 5 * (8000 * 0.25 * 0.75) ** 0.5 for n in counts.values())


def test_two_calls_draw_the_second_time_uniformly():
    """Each of the three inner times a third of 6000, within 5 standard errors; the same generator draws the same times."""
    counts = Counter(draw_times(random.Random(i), "two")[1] for i in range(6000))
    assert set(counts) == set(few_step_times(4)[1:])
    assert all(abs(n - 2000) < 5 * (6000 * 2 / 9) ** 0.5 for n in counts.values())
    assert draw_times(random.Random(4), "two") == draw_times(random.Random(4), "two")


def test_errors_name_value_and_choices():
    with pytest.raises(ValueError, match="unknown unroll 'three'; known: one, two, mixed, all"):
        draw_times(random.Random(0), "three")
    with pytest.raises(ValueError, match="unknown renoise 'old'; known: fresh, same"):
        rollout(lambda x, t: x, draw(), (1.0,), "old")
    with pytest.raises(ValueError, match="gradient_calls is 0; at least the last call must carry a gradient"):
        rollout(lambda x, t: x, draw(), (1.0,), gradient_calls=0)
    with pytest.raises(ValueError, match="unroll 'two' needs at least 2 steps, got 1"):
        draw_times(random.Random(0), "two", 1)
