"""Flow: one set of conventions, its inverses, closed-form samplers, and agreement with diffusers."""

import subprocess
import sys

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from vlmedit import flow

TIMES = st.floats(0.01, 0.99)
SHIFTS = st.floats(0.2, 12.0)


def triple(seed: int = 0, batch: int = 5):
    """Data, noise (B, 3, 4, 4) and times (B,), all float64."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return draw(batch, 3, 4, 4), draw(batch, 3, 4, 4), torch.rand(batch, generator=g, dtype=torch.float64) * 0.98 + 0.01


# --- conventions and their inverses


@given(st.integers(0, 2**31))
def test_every_conversion_has_its_inverse(seed):
    """x_t and v give x0 and eps back; x0 gives v back: float64, to 1e-10 (division by t >= 0.01 costs digits)."""
    x0, eps, t = triple(seed)
    x, v = flow.interpolate(x0, eps, t), flow.velocity_target(x0, eps)
    close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    close(flow.to_x0(x, v, t), x0)
    close(flow.to_eps(x, v, t), eps)
    close(flow.to_velocity(x, x0, t), v)
    close(flow.interpolate(flow.to_x0(x, v, t), flow.to_eps(x, v, t), t), x)


def test_end_points_of_the_path():
    """t = 0 is data and t = 1 is noise, exactly; a float time means the same as a full tensor of it."""
    x0, eps, t = triple()
    assert torch.equal(flow.interpolate(x0, eps, 0.0), x0)
    assert torch.equal(flow.interpolate(x0, eps, 1.0), eps)
    assert torch.equal(flow.interpolate(x0, eps, 0.3), flow.interpolate(x0, eps, torch.full_like(t, 0.3)))


def test_velocity_is_the_path_s_derivative():
    """v is d x_t / d t by autograd, exactly."""
    x0, eps, _ = triple()
    _, derivative = torch.func.jvp(lambda t: flow.interpolate(x0, eps, t), (torch.tensor(0.4, dtype=torch.float64),), (torch.tensor(1.0, dtype=torch.float64),))
    torch.testing.assert_close(derivative, flow.velocity_target(x0, eps), atol=1e-14, rtol=0)


def test_times_belong_to_samples():
    """Each sample uses its own time: the batched call equals the calls one by one, exactly."""
    x0, eps, t = triple()
    for convert in (flow.interpolate, flow.to_x0, flow.to_eps, flow.to_velocity):
        alone = torch.cat([convert(x0[i : i + 1], eps[i : i + 1], t[i : i + 1]) for i in range(len(t))])
        assert torch.equal(convert(x0, eps, t), alone)


def test_guidance_end_points():
    """w = 1 is cond, w = 0 is uncond, w = 2 goes as far again, and the form is linear in w."""
    cond, uncond, _ = triple()
    torch.testing.assert_close(flow.guide(cond, uncond, 1.0), cond, atol=1e-15, rtol=0)
    assert torch.equal(flow.guide(cond, uncond, 0.0), uncond)
    torch.testing.assert_close(flow.guide(cond, uncond, 2.0) - cond, cond - uncond, atol=1e-14, rtol=0)
    assert torch.equal(flow.guide(cond, cond, 7.5), cond)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_guidance_scales_belong_to_rows(dtype):
    """A scale per row equals the calls one by one, exactly, whatever the rank; a graph reaches the scales."""
    cond, uncond, _ = (x.to(dtype) for x in triple())
    w = torch.tensor([0.0, 1.0, 2.0, 3.5, 7.5])
    for shape in ((5, 3, 4, 4), (5, 48), (5,)):
        c, u = (x.flatten()[: 5 * int(torch.tensor(shape[1:]).prod())].view(shape) for x in (cond, uncond))
        guided = flow.guide(c, u, w)
        assert guided.dtype == dtype and guided.shape == shape
        assert torch.equal(guided, torch.cat([flow.guide(c[i : i + 1], u[i : i + 1], float(w[i])) for i in range(5)]))
    w.requires_grad_()
    flow.guide(cond, uncond, w).float().sum().backward()
    tolerance = 0.2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(w.grad, (cond - uncond).float().flatten(1).sum(1), atol=tolerance, rtol=0)


# --- noise


def streams(kind: str):
    """No generator, one, a list of one, one for each of four rows, and more than there are rows."""
    count = {"none": 0, "one": 1, "alone": 1, "rows": 4, "spare": 6}[kind]
    made = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return None if kind == "none" else made[0] if kind == "one" else made


@pytest.mark.parametrize("kind", ("none", "one", "alone", "rows", "spare"))
@pytest.mark.parametrize("dtype", (None, torch.float64, torch.bfloat16))
def test_noise_is_what_diffusers_draws(kind, dtype):
    """Bit for bit, two draws of one stream, and the streams stand at the same place afterwards."""
    from diffusers.utils.torch_utils import randn_tensor

    drawn = []
    for draw in (flow.noise_like, randn_tensor):
        torch.manual_seed(3)
        stream = streams(kind)
        drawn.append([draw((4, 3, 5, 2), generator=stream, device=torch.device("cpu"), dtype=dtype) for _ in range(2)])
        drawn[-1].append(torch.randn(2, generator=stream[0] if isinstance(stream, list) else stream))
    ours, theirs = drawn
    assert ours[0].dtype == (dtype or torch.float32) and ours[0].shape == (4, 3, 5, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], ours[1])


def test_noise_of_a_row_does_not_depend_on_the_others():
    """With a generator each, a row's noise is the one it gets alone; too few generators are an error."""
    whole = flow.noise_like((4, 3, 2), streams("rows"))
    for row in range(4):
        assert torch.equal(whole[row : row + 1], flow.noise_like((1, 3, 2), torch.Generator().manual_seed(row)))
    with pytest.raises(IndexError):
        flow.noise_like((4, 3, 2), streams("rows")[:2])


def test_noise_for_another_device_is_drawn_on_the_cpu():
    """A generator of the CPU moves as it would for noise that stays there: a seed means one noise on every device."""
    stream = torch.Generator().manual_seed(1)
    assert flow.noise_like((2, 3), stream, device="meta").is_meta
    fresh = torch.Generator().manual_seed(1)
    torch.randn(2, 3, generator=fresh)
    assert torch.equal(stream.get_state(), fresh.get_state())


def test_conventions_need_torch_alone():
    """Importing the module loads none of the libraries of models."""
    libraries = "('diffusers', 'transformers', 'accelerate')"
    code = f"import sys, vlmedit.flow; print([m for m in {libraries} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr


# --- schedules


@given(TIMES, SHIFTS)
def test_shift_and_unshift_are_inverse(u, shift):
    """Both ways round, to 1e-12; shift(1/s) is the inverse too; shift 1 is the identity; larger shifts move towards noise."""
    assert flow.unshift_time(flow.shift_time(u, shift), shift) == pytest.approx(u, abs=1e-12)
    assert flow.shift_time(flow.unshift_time(u, shift), shift) == pytest.approx(u, abs=1e-12)
    assert flow.shift_time(flow.shift_time(u, shift), 1 / shift) == pytest.approx(u, abs=1e-12)
    assert flow.shift_time(u, 1.0) == u
    assert flow.shift_time(u, shift * 1.5) > flow.shift_time(u, shift)


@given(SHIFTS)
def test_shift_keeps_the_end_points(shift):
    """0 stays 0 and 1 stays 1."""
    assert flow.shift_time(0.0, shift) == 0 and flow.shift_time(1.0, shift) == pytest.approx(1, abs=1e-15)


def test_few_step_times_are_the_released_ones():
    """4 steps at shift 6 are [1, .9474, .8571, .6667] to four digits; unshifted they are quarters; 0 steps are refused."""
    assert [round(t, 4) for t in flow.few_step_times(4, 6.0)] == [1.0, 0.9474, 0.8571, 0.6667]
    assert flow.few_step_times(4) == (1.0, 0.75, 0.5, 0.25)
    assert flow.few_step_times(1, 6.0) == (1.0,)
    with pytest.raises(ValueError, match="steps is 0; a sampler needs at least 1"):
        flow.few_step_times(0)


@pytest.mark.parametrize("shift", (1.0, 3.0))
def test_training_times_are_logit_normal(shift):
    """Unshifted times are a logistic of a standard normal: mean 0 and deviation 1 of the logit, 4 standard errors of 1e5."""
    t = flow.logit_normal_time(100_000, shift, generator=torch.Generator().manual_seed(0)).double()
    assert 0 < t.min() and t.max() < 1
    logit = flow.unshift_time(t, shift).logit()
    assert abs(logit.mean()) < 4 / 100_000**0.5 and abs(logit.std() - 1) < 4 / 200_000**0.5


# --- losses


def test_flow_matching_loss_in_closed_form():
    """The true velocity costs 0; a velocity off by c costs c^2; the cost is per sample."""
    x0, eps, t = triple()
    exact = lambda x, t: flow.velocity_target(x0, eps)
    assert torch.equal(flow.flow_matching_loss(exact, x0, t, eps), torch.zeros(5, dtype=torch.float64))
    offset = torch.arange(5.0, dtype=torch.float64).view(5, 1, 1, 1)
    cost = flow.flow_matching_loss(lambda x, t: exact(x, t) + offset, x0, t, eps)
    torch.testing.assert_close(cost, offset.flatten() ** 2, atol=1e-12, rtol=0)


def test_loss_sees_the_interpolated_input():
    """The network is called with x_t and t, not with x0 or eps."""
    x0, eps, t = triple()
    seen = []
    flow.flow_matching_loss(lambda x, t: seen.append((x, t)) or x, x0, t, eps)
    assert torch.equal(seen[0][0], flow.interpolate(x0, eps, t)) and torch.equal(seen[0][1], t)


# --- samplers, against the Gaussian whose flow is known


def gaussian_velocity(mean: float, std: float):
    """E[eps - x0 | x_t] for x0 ~ N(mean, std^2): the exact marginal velocity."""

    def velocity(x, t):
        t = t.view(-1, *[1] * (x.ndim - 1))
        variance = (1 - t) ** 2 * std**2 + t**2
        rest = (x - (1 - t) * mean) / variance
        return t * rest - (mean + (1 - t) * std**2 * rest)

    return velocity


def test_euler_is_exact_for_a_straight_flow():
    """A point mass has straight paths: one Euler step and any number land on it, to 1e-12."""
    noise = torch.randn(64, 2, dtype=torch.float64)
    for steps in (1, 2, 7):
        out = flow.sample(gaussian_velocity(0.7, 0.0), noise, flow.few_step_times(steps, 3.0))
        torch.testing.assert_close(out, torch.full_like(out, 0.7), atol=1e-12, rtol=0)


def test_euler_converges_to_the_gaussian_s_exact_map():
    """The exact map is mean + std * noise. Euler's error falls in proportion to 1/steps: halving within 5 %, below 1e-3 at 2000."""
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1)
    exact = 0.7 + 0.5 * noise
    error = [(flow.sample(gaussian_velocity(0.7, 0.5), noise, flow.few_step_times(n)) - exact).abs().max().item() for n in (500, 1000, 2000)]
    assert error[2] < 1e-3
    assert error[0] / error[1] == pytest.approx(2, rel=0.05) and error[1] / error[2] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("sampler", flow.SAMPLERS)
def test_the_last_step_returns_x0(sampler):
    """From any t to 0 every sampler returns the x0 prediction whatever the noise, to 1e-12."""
    x0, eps, _ = triple()
    x = flow.interpolate(x0, eps, 0.6)
    out = flow.SAMPLERS[sampler](x, flow.velocity_target(x0, eps), 0.6, 0.0, torch.randn_like(x))
    torch.testing.assert_close(out, x0, atol=1e-12, rtol=0)


def test_corrector_end_points():
    """Without a step (s = t) the corrector returns x itself; renoise would not."""
    x0, eps, _ = triple()
    x, v, noise = flow.interpolate(x0, eps, 0.6), flow.velocity_target(x0, eps), torch.randn_like(x0)
    torch.testing.assert_close(flow.step_corrector(x, v, 0.6, 0.6, noise), x, atol=1e-7, rtol=0)  # sqrt of a rounding error
    assert (flow.step_renoise(x, v, 0.6, 0.6, noise) - x).abs().max() > 0.1


@pytest.mark.parametrize("t, s", ((1.0, 0.75), (0.9474, 0.8571), (0.5, 0.1)))
def test_corrector_and_renoise_keep_the_marginal(t, s):
    """With the true velocity both land on N((1 - s) x0, s^2): moments of 4e5 samples within 5 standard errors. The corrector
    keeps a share s/t of the old noise (correlation s/t), renoise keeps none."""
    n = 400_000
    eps, noise = torch.randn(2, n, dtype=torch.float64)
    x0 = torch.full_like(eps, 0.3)
    x, v = flow.interpolate(x0, eps, t), flow.velocity_target(x0, eps)
    for step, kept in ((flow.step_corrector, s / t), (flow.step_renoise, 0.0)):
        out = step(x, v, t, s, noise)
        assert abs(out.mean().item() - (1 - s) * 0.3) < 5 * s / n**0.5
        assert abs(out.var().item() / s**2 - 1) < 5 * (2 / n) ** 0.5
        correlation = torch.corrcoef(torch.stack((out, eps)))[0, 1].item()
        assert abs(correlation - kept) < 5 / n**0.5


def curved(x, t):
    """A nonlinear velocity that depends on place and time."""
    return torch.sin(3 * x) + t.view(-1, 1, 1, 1) * x.flip(-1)


@pytest.mark.parametrize("steps, shift", ((4, 6.0), (7, 1.0), (1, 3.0)))
@pytest.mark.parametrize("stochastic", (False, True))
def test_agreement_with_diffusers(steps, shift, stochastic):
    """Times, Euler and re-noising against FlowMatchEulerDiscreteScheduler with the same noise: 1e-5 in float32."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=stochastic)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    times = flow.few_step_times(steps, shift)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([*times, 0.0]), atol=1e-6, rtol=0)
    start = torch.randn(3, 3, 8, 8)
    theirs, generator = start, torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        v = curved(theirs, (t / 1000).expand(3))
        theirs = scheduler.step(v, t, theirs, generator=generator, return_dict=False)[0]
    ours = flow.sample(curved, start, times, "renoise" if stochastic else "euler", torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (ours - start).abs().mean() > 0.1


def test_set_timesteps_without_sigmas_is_another_schedule():
    """The trap of method.md 1.6 is real: without sigmas the last step is wasted near 0. So times are always passed."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    scheduler.set_timesteps(4)
    assert scheduler.sigmas[3] < 0.05 and flow.few_step_times(4, 6.0)[3] > 0.6


def test_sampling_is_reproducible_and_leaves_no_graph():
    """The same generator seed gives the same sample, another one another; no gradient is recorded."""
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    draw = lambda sampler, seed: flow.sample(curved, x, (1.0, 0.5), sampler, torch.Generator().manual_seed(seed))
    for sampler in ("renoise", "corrector"):
        assert torch.equal(draw(sampler, 0), draw(sampler, 0)) and not torch.equal(draw(sampler, 0), draw(sampler, 1))
        assert not draw(sampler, 0).requires_grad
    assert torch.equal(draw("euler", 0), draw("euler", 1))


def test_sampling_refuses_what_it_cannot_do():
    """Unknown samplers and times that do not fall are errors that show the value and the choices."""
    x = torch.randn(1, 1, 2, 2)
    with pytest.raises(ValueError, match="unknown sampler 'heun'; known: euler, renoise, corrector"):
        flow.sample(curved, x, (1.0,), "heun")
    for times in ((0.5, 1.0), (1.0, 1.0), (1.0, 0.0), (1.0, -0.1), ()):
        with pytest.raises(ValueError, match="times must fall strictly towards 0"):
            flow.sample(curved, x, times)
