"""Flow-GRPO: its random steps keep the flow's marginals, its objective is REINFORCE's at the first step and goes no further than it
should, and the trainer moves the student alone, towards reward, and resumes exactly."""

import math
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import SIDE, requests, tiny_dit, tiny_judge
from safetensors.torch import load_file
from torch.distributions import Independent, Normal, kl_divergence

from vlmedit.equations.flow_grpo import (
    POLICIES,
    clipped_objective,
    euler_policy,
    explore,
    exponential_policy,
    group_advantage,
    log_probability,
    policy_kl,
    policy_means,
)
from vlmedit.equations.judge_loss import judge_loss
from vlmedit.errors import ConfigError
from vlmedit.flow import few_step_times, interpolate, step_euler, step_renoise
from vlmedit.methods import find
from vlmedit.methods.flow_grpo import FlowGRPO, FlowGRPOConfig, repeated, train_flow_grpo
from vlmedit.networks.dit import DiT

MEAN, WIDTH = 1.5, 0.6  # of the Gaussian data


def moments(t: float) -> tuple[float, float]:
    """Mean and variance of x_t: what the flow's ODE has at time t."""
    return (1 - t) * MEAN, ((1 - t) * WIDTH) ** 2 + t**2


def gaussian_velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    """E[eps - x0 | x_t = x] in closed form."""
    mean, variance = moments(t)
    return -MEAN + (t - (1 - t) * WIDTH**2) / variance * (x - mean)


def carried(policy, a: float, times) -> list[tuple[float, float]]:
    """Mean and variance of x after each random step, exactly: every step is linear in x."""
    mean, variance = moments(times[0])
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    out = []
    for t, s in zip(times, times[1:]):
        (low, std), (high, _) = (policy(x, gaussian_velocity(x, t), t, s, a) for x in (zero, one))
        slope = float(high - low)
        mean, variance = slope * mean + float(low), slope**2 * variance + std**2
        out.append((mean, variance))
    return out


def worst(policy, a: float, steps: int, top: float = 0.95) -> float:
    """Largest error of mean and variance on the way from `top` to .02."""
    times = [top + (0.02 - top) * i / steps for i in range(steps + 1)]
    return max(max(abs(m - moments(t)[0]), abs(v - moments(t)[1])) for (m, v), t in zip(carried(policy, a, times), times[1:]))


# --- the random step


@pytest.mark.parametrize("a", (0.3, 0.7, 1.2))
@pytest.mark.parametrize("name", POLICIES)
def test_random_steps_keep_the_marginals_of_the_ode(name, a):
    """Moments carried exactly through the steps on a Gaussian: at every time the ODE's, with an error that falls in proportion to the
    step (to 6e-3 at 800 steps); with the noise but without the drift that pays for it, the variance is far off."""
    coarse, fine = worst(POLICIES[name], a, 200), worst(POLICIES[name], a, 800)
    assert fine < 6e-3 and 3 < coarse / fine < 5.5
    unpaid = lambda x, v, t, s, noise: (step_euler(x, v, t, s), POLICIES[name](x, v, t, s, noise)[1])
    assert worst(unpaid, a, 800) > 10 * fine


@pytest.mark.parametrize("name", POLICIES)
def test_samples_from_pure_noise_have_the_datas_moments(name):
    """`explore` itself, 40,000 samples, 60 steps from t = 1: mean and variance to .03 of the data's."""
    times = few_step_times(60)
    velocity = lambda x, t: gaussian_velocity(x, float(t[0]))
    done = explore(velocity, torch.randn(40_000, 1), times, 0.7, POLICIES[name])
    assert abs(float(done.output.mean()) - MEAN) < 0.03 and abs(float(done.output.var()) - WIDTH**2) < 0.03
    middle = done.states[30]
    assert abs(float(middle.mean()) - moments(0.5)[0]) < 0.03 and abs(float(middle.var()) - moments(0.5)[1]) < 0.03


def test_in_few_steps_only_the_exponential_step_leaves_the_right_noise():
    """Where the clean picture is known, x_s must be (1 - s) x0 + s eps. In closed form, over every step of a 4-step sampler: the
    exponential step has exactly noise s, the paper's has more, in the first three steps by a tenth and more."""
    x0, eps = torch.tensor([[0.7]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    times = few_step_times(4)
    for t, s in zip(times, times[1:]):
        for policy in (euler_policy, exponential_policy):
            mean = lambda e: policy(interpolate(x0, e, t), e - x0, t, s, 0.7)[0]
            std = policy(x0, x0, t, s, 0.7)[1]
            assert float(mean(0 * eps) - (1 - s) * x0) == pytest.approx(0, abs=1e-12)
            noise = math.hypot(float(mean(eps) - mean(0 * eps)), std)
            assert noise == pytest.approx(s, abs=1e-12) if policy is exponential_policy else noise > 1.1 * s


def test_limits_of_the_policies():
    """No noise is the flow's Euler step; endless noise, for the exponential step, the re-noising sampler; small steps agree: their
    difference falls with the square of the step."""
    x, v, noise = torch.randn(3, 2, 4, 4).double().unbind(0)
    for t, s in ((1.0, 0.75), (0.6, 0.2)):
        for policy in POLICIES.values():
            mean, std = policy(x, v, t, s, 0.0)
            torch.testing.assert_close(mean, step_euler(x, v, t, s))
            assert std == 0
        mean, std = exponential_policy(x, v, t, s, math.inf)
        torch.testing.assert_close(mean + std * noise, step_renoise(x, v, t, s, noise))
    apart = []
    for h in (0.02, 0.01):
        (a, std_a), (b, std_b) = (policy(x, v, 0.6, 0.6 - h, 0.7) for policy in POLICIES.values())
        apart.append(float((a - b).abs().max()))
        assert abs(std_a - std_b) < 0.05 * std_a
    assert 3.5 < apart[0] / apart[1] < 4.5


def test_log_probability_and_kl_are_the_gaussians():
    """Against torch.distributions, divided by the number of elements; the sample carries no gradient, the mean does."""
    sample, mean, other = torch.randn(3, 4, 3, 5, 5, requires_grad=True).unbind(0)
    p, q = (Independent(Normal(m, 0.3), 3) for m in (mean, other))
    torch.testing.assert_close(log_probability(sample, mean, 0.3), p.log_prob(sample) / 75)
    torch.testing.assert_close(policy_kl(mean, other, 0.3), kl_divergence(p, q) / 75)
    assert (policy_kl(mean, mean, 0.3) == 0).all()
    mean, sample = mean.detach().requires_grad_(), sample.detach().requires_grad_()
    log_probability(sample, mean, 0.3).sum().backward()
    assert sample.grad is None
    torch.testing.assert_close(mean.grad, (sample.detach() - mean.detach()) / 0.3**2 / 75)


def test_a_trajectory_is_told_the_way_it_went():
    """T states, T - 1 random steps, each log-probability that of the step; the means of the same velocity give ratio 1; the last step
    is Euler's, to 0; no graph is left."""
    weight = torch.randn(2, 2, requires_grad=True)
    velocity = lambda x, t: x @ weight + t[:, None]
    done = explore(velocity, torch.randn(5, 2), (1.0, 0.6, 0.3), 0.7, euler_policy)
    assert len(done.states) == 3 and len(done.log_probs) == 2 and not done.output.requires_grad
    means, stds = policy_means(velocity, done, 0.7, euler_policy)
    for i, (mean, std) in enumerate(zip(means, stds)):
        assert mean.requires_grad
        torch.testing.assert_close(log_probability(done.states[i + 1], mean, std), done.log_probs[i])
        z = (done.states[i + 1] - mean) / std
        assert 0.2 < float(z.detach().square().mean()) < 3
    torch.testing.assert_close(done.output, (done.states[2] - 0.3 * velocity(done.states[2], torch.full((5,), 0.3))).detach())


# --- advantage and objective


def test_advantages_are_of_each_group_alone():
    """Zero for equal rewards, mean 0 and deviation 1 elsewhere; one group's rewards do not touch another's advantages; shifting and
    scaling a group changes nothing; over the batch's deviation the groups keep their own spread."""
    rewards = torch.tensor([0.5, 0.5, 0.5, 0.1, 0.4, 0.9, 0.2, 0.3, 0.1])
    got = group_advantage(rewards, 3)
    assert (got[:3] == 0).all()
    for rows in (got[3:6], got[6:]):
        assert abs(float(rows.mean())) < 1e-6 and float(rows.std(correction=0)) == pytest.approx(1, abs=2e-3)
    other = torch.cat((rewards[:6], 7 * rewards[6:] - 2))
    torch.testing.assert_close(group_advantage(other, 3), got, atol=2e-3, rtol=0)
    torch.testing.assert_close(group_advantage(other, 3)[:6], got[:6])
    wide = group_advantage(rewards, 3, spread="batch")
    torch.testing.assert_close(wide[3:6], (rewards[3:6] - rewards[3:6].mean()) / (rewards.std(correction=0) + 1e-4))
    outlier = torch.cat((torch.zeros(99), torch.ones(1)))
    assert float(group_advantage(outlier, 100).max()) == 5.0 and float(group_advantage(outlier, 100, clip=20).max()) > 9
    for wrong in (2, 1):
        with pytest.raises(ValueError, match="groups of"):
            group_advantage(rewards, wrong)
    with pytest.raises(ValueError, match="unknown spread 'all'"):
        group_advantage(rewards, 3, spread="all")


@pytest.mark.parametrize("advantage", (1.5, -1.5))
@pytest.mark.parametrize("off", (-0.5, -0.1, 0.1, 0.5))
def test_the_objective_is_flat_only_beyond_its_own_edge(advantage, off):
    """Of the ratio's eight places (below and above the band, inside; good and bad samples) the gradient is -A rho, except where the
    ratio has already gone too far the way the advantage asks: there it is exactly zero."""
    old = torch.tensor([0.3])
    now = (old + off).requires_grad_()
    loss = clipped_objective(now, old, torch.tensor([advantage]), 0.2)
    (slope,) = torch.autograd.grad(loss.sum(), now)
    rho = math.exp(off)
    too_far = rho > 1.2 if advantage > 0 else rho < 0.8
    assert float(slope) == pytest.approx(0 if too_far else -advantage * rho, abs=1e-6)
    edge = 1.2 if advantage > 0 else 0.8
    assert float(loss.detach()) == pytest.approx(-advantage * (edge if too_far else rho), abs=1e-6)


# --- the trainer's parts


def configuration(**overrides) -> FlowGRPOConfig:
    return FlowGRPOConfig.make("smoke", **{"side": SIDE, "batch": 4, "group": 2, "precision": "no", **overrides})


@pytest.fixture
def batch():
    return repeated(requests("recolor", "remove"), 2)


def roles(**overrides) -> FlowGRPO:
    return FlowGRPO(configuration(**overrides), tiny_dit(0), tiny_dit(0), tiny_judge(3))


def test_repeated_requests_are_neighbors():
    few = requests("recolor", "remove")
    many = repeated(few, 3)
    assert len(many) == 6 and many.types == ("recolor",) * 3 + ("remove",) * 3
    assert torch.equal(many.reference[2], few.reference[0]) and torch.equal(many.edit_question[3], few.edit_question[1])


@pytest.mark.parametrize("policy", POLICIES)
def test_the_first_step_is_reinforce(batch, policy):
    """At the first inner step every ratio is 1, nothing is clipped, the KL to the start is 0, and the student's gradient is that of
    - mean A log p, computed here step by step in another form, to 1e-4 of the largest."""
    all_roles = roles(policy=policy, sampler_steps=3)
    trajectory = all_roles.sample(batch)
    advantage = torch.tensor([1.0, -1.0, 0.5, -2.0])
    metrics = all_roles.policy_backward(batch, trajectory, advantage, all_roles.reference_means(batch, trajectory))
    assert metrics["ratio_off"] < 1e-5 and metrics["clipped"] == 0 and metrics["kl"] < 1e-8

    other = tiny_dit(0)
    total = 0.0
    for x, after, t, s in zip(trajectory.states, trajectory.states[1:], all_roles.times, all_roles.times[1:]):
        v = other(x, torch.full((4,), t), batch.instruction, batch.reference)
        mean, std = POLICIES[policy](x, v, t, s, all_roles.config.noise_level)
        total = total - (advantage * Normal(mean, std).log_prob(after).mean((1, 2, 3))).mean() / 2
    total.backward()
    scale = max(p.grad.abs().max() for p in other.parameters() if p.grad is not None)
    assert scale > 0
    for (name, a), b in zip(all_roles.student.named_parameters(), other.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert (a.grad - b.grad).abs().max() < 1e-4 * scale, name


def test_only_the_student_learns_and_the_judge_only_gives_numbers(batch):
    """Reference policy and judge are frozen and have no gradient; the reward has no graph, lies in [0, 1] and is the mean of the two
    probabilities of the right answers; equal rewards move nobody."""
    all_roles = roles()
    trajectory = all_roles.sample(batch)
    rewards, metrics = all_roles.reward(batch, trajectory.output)
    assert not rewards.requires_grad and rewards.shape == (4,) and ((0 <= rewards) & (rewards <= 1)).all()
    _, right = judge_loss(all_roles.judge, batch, trajectory.output)
    torch.testing.assert_close(rewards, (right[0] + right[1]) / 2)
    assert metrics["p_edit"] == pytest.approx(float(right[0].mean()))
    means = all_roles.reference_means(batch, trajectory)
    all_roles.policy_backward(batch, trajectory, group_advantage(torch.full((4,), 0.3), 2), means)
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-7 for p in all_roles.student.parameters())
    all_roles.policy_backward(batch, trajectory, group_advantage(rewards, 2), means)
    assert any(p.grad is not None and float(p.grad.abs().max()) > 1e-7 for p in all_roles.student.parameters())
    for frozen in (all_roles.reference, all_roles.judge):
        assert not frozen.training and all(p.grad is None and not p.requires_grad for p in frozen.parameters())


def test_the_kl_term_pulls_back_to_the_start(batch):
    """A student that has moved away, told nothing by the rewards: one step against the gradient of the KL term lessens the KL."""
    all_roles = FlowGRPO(configuration(kl_weight=1.0), tiny_dit(1), tiny_dit(0), tiny_judge(3))
    trajectory = all_roles.sample(batch)
    means = all_roles.reference_means(batch, trajectory)
    before = all_roles.policy_backward(batch, trajectory, torch.zeros(4), means)
    assert before["kl"] > 1e-6 and before["loss"] == pytest.approx(before["kl"], rel=1e-4)
    with torch.no_grad():
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in all_roles.student.parameters() if p.grad is not None))
        for p in all_roles.student.parameters():
            if p.grad is not None:
                p -= 1e-3 * p.grad / norm
                p.grad = None
    assert all_roles.policy_backward(batch, trajectory, torch.zeros(4), means)["kl"] < before["kl"]


@pytest.mark.parametrize("policy", POLICIES)
def test_reward_rises_on_a_problem_with_a_known_answer(policy):
    """A 2-D flow that makes a standard Gaussian, paid for samples near (1, -1): two hundred updates of this module's functions shift
    it there, to .4 in each axis, and the mean reward rises by .8 or more; with the advantages' sign flipped it runs away."""
    target = torch.tensor([1.0, -1.0])

    def train(sign: float) -> tuple[torch.Tensor, list[float]]:
        torch.manual_seed(0)
        shift = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.Adam([shift], 0.05)
        velocity = lambda x, t: (2 * t[:, None] - 1) / ((1 - t[:, None]) ** 2 + t[:, None] ** 2) * x - shift
        history = []
        for _ in range(200 if sign > 0 else 50):
            done = explore(velocity, torch.randn(32, 2), few_step_times(4), 0.7, POLICIES[policy])
            rewards = -(done.output - target).square().sum(1)
            history.append(float(rewards.mean()))
            means, stds = policy_means(velocity, done, 0.7, POLICIES[policy])
            now = torch.stack([log_probability(x, m, s) for x, m, s in zip(done.states[1:], means, stds)])
            loss = clipped_objective(now, torch.stack(done.log_probs), sign * group_advantage(rewards, 8), 0.2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return shift.detach(), history

    (at, right), (away, wrong) = train(1.0), train(-1.0)
    assert (at - target).abs().max() < 0.4 and sum(right[-20:]) / 20 > sum(right[:10]) / 10 + 0.8
    assert (away - target).norm() > target.norm() + 1 and sum(wrong[-10:]) / 10 < sum(wrong[:10]) / 10 - 1


# --- the loop


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_dit(0).save_pretrained(folder / "student")
    tiny_judge(3).save_pretrained(folder / "judge")
    return folder


def loop(saved: Path, out: Path, **overrides) -> FlowGRPOConfig:
    return configuration(**{"student": str(saved / "student"), "judge": str(saved / "judge"), "out": str(out), "steps": 3, "save_every": 1, **overrides})


def measured(steps) -> list[dict]:
    return [{k: v for k, v in s.metrics.items() if not k.startswith(("cpu", "seconds"))} for s in steps]


def test_a_stopped_run_resumes_to_the_same_bits(saved, tmp_path):
    """Four updates in one go; three, a stop, and the rest, which repeats the third, since only the second was saved: equal weights, averages
    and metrics, bit for bit. Start and judge stay."""
    before = {p: p.read_bytes() for p in saved.rglob("*.safetensors")}
    straight = list(train_flow_grpo(loop(saved, tmp_path / "straight", steps=4, save_every=2)))
    run = train_flow_grpo(loop(saved, tmp_path / "stopped", steps=4, save_every=2))
    first = [next(run), next(run), next(run)]
    run.close()
    rest = list(train_flow_grpo(loop(saved, tmp_path / "stopped", steps=4, save_every=2)))
    assert [s.index for s in rest] == [3, 4] and measured(first) == measured(straight[:3]) and measured(rest) == measured(straight[2:])
    for name in ("model/diffusion_pytorch_model", "checkpoint/student", "checkpoint/student.ema"):
        a, b = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("straight", "stopped"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    start = load_file(saved / "student" / "diffusion_pytorch_model.safetensors")
    now = load_file(tmp_path / "straight" / "checkpoint" / "student.safetensors")
    assert any(not torch.equal(now[k], start[k]) for k in start)
    assert all(p.read_bytes() == content for p, content in before.items())
    assert DiT.from_pretrained(tmp_path / "straight" / "model").config.side == SIDE


def test_metrics_count_calls_and_say_what_happened(saved, tmp_path):
    """Calls: every sample meets the student once per time and once per random step and inner step; the reference once per random step,
    or never without a KL term. The second inner step is off the first's policy."""
    (step,) = train_flow_grpo(loop(saved, tmp_path / "a", steps=1, inner=2, sampler_steps=4, batch=4))
    assert step.metrics["calls"] == 4 * (4 + 2 * 3) and step.metrics["reference_calls"] == 4 * 3
    assert step.metrics["ratio_off"] > 0 and 0 <= step.metrics["reward"] <= 1 and step.metrics["reward_spread"] > 0
    assert {"p_edit", "p_identity", "kl", "clipped", "gradient_norm", "cpu_student", "cpu_judge", "cpu_reference", "cpu_sampling"} <= set(step.metrics)
    assert set(step.pictures) == {"reference", "output"} and not step.skipped
    (step,) = train_flow_grpo(loop(saved, tmp_path / "b", steps=1, kl_weight=0.0, inner=1, sampler_steps=2))
    assert step.metrics["calls"] == 4 * 3 and step.metrics["reference_calls"] == 0 and "kl" not in step.metrics


def test_the_method_is_found():
    assert find("flow_grpo") == (FlowGRPOConfig, train_flow_grpo)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (dict(batch=6, group=4), "batch is 6 and group 4"),
        (dict(group=1), "at least 2 samples"),
        (dict(sampler_steps=1), "sampler_steps is 1"),
        (dict(inner=0), "inner is 0"),
        (dict(noise_level=0.0), "noise_level is 0.0"),
        (dict(policy="eular"), "policy is 'eular'; known: euler, exponential"),
        (dict(advantage_spread="all"), "known: group, batch"),
        (dict(task="paint"), "task is 'paint'"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(setting, told):
    with pytest.raises(ConfigError, match=told):
        configuration(**setting)
