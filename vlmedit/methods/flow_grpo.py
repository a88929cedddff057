"""The reinforcement-learning rival: Flow-GRPO with NP-Edit's own judge as the reward [arXiv:2505.05470; arXiv:2510.14978 compares
itself with it]. Equations in vlmedit/equations/flow_grpo.py.

Per update: several samples of each request by the stochastic sampler, a reward for each (the mean of the judge's probabilities of the
two right answers), advantages within each request's group, and `inner` optimizer steps of the clipped objective on the same samples.
The judge is asked for numbers, never for a gradient. The KL term holds the student to its own start, which is a setting: the copy
warm start, or a student of paired SFT.

Deviates from the released code: all weights are trained, not LoRA, with Muon and AdamW; a group's samples are of one update, 4 requests of 8
samples where it has 48 of 24; `inner` steps see all samples, where it takes two steps on halves.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch
from accelerate import Accelerator
from torch import Tensor

from vlmedit.config import GRPOConfig
from vlmedit.data.batches import UnpairedBatch
from vlmedit.data.world import TASKS, unpaired_batch
from vlmedit.equations.flow_grpo import (
    POLICIES,
    Trajectory,
    clipped_objective,
    explore,
    group_advantage,
    log_probability,
    policy_kl,
    policy_means,
)
from vlmedit.equations.judge_loss import judge_loss
from vlmedit.flow import Velocity, few_step_times
from vlmedit.networks.dit import DiT
from vlmedit.networks.judge import JudgeModel
from vlmedit.training.engine import EMA, Optimizer, Run, Step


def repeated(batch: UnpairedBatch, times: int) -> UnpairedBatch:
    """Each request `times` times over, side by side."""
    tensors = {f.name: getattr(batch, f.name).repeat_interleave(times, 0) for f in fields(batch) if f.name != "types"}
    return UnpairedBatch(**tensors, types=tuple(t for t in batch.types for _ in range(times)))


class GRPO:
    """The roles and the parts of an update, without loop, logging or files."""

    def __init__(self, config: GRPOConfig, student: DiT, reference: DiT | None, judge: JudgeModel):
        self.config, self.student = config, student
        self.reference = reference.requires_grad_(False).eval() if reference is not None else None
        self.judge = judge.requires_grad_(False).eval()
        self.times = few_step_times(config.sampler_steps, config.sampler_shift)
        self.policy = POLICIES[config.policy]
        self.cpu: dict[str, float] = {}

    @contextmanager
    def clock(self, part: str):
        """Add the CPU-seconds of a block to `part`."""
        began = time.process_time()
        yield
        self.cpu[part] = self.cpu.get(part, 0.0) + time.process_time() - began

    def velocity(self, model: DiT, batch: UnpairedBatch) -> Velocity:
        text = model.encode_text(batch.instruction)
        cache = model.encode_reference(batch.reference, text) if model.config.reference_time == "clean" else batch.reference
        return lambda x, t: model(x, t, text, cache).float()

    def sample(self, batch: UnpairedBatch) -> Trajectory:
        with self.clock("sampling"), torch.no_grad():
            noise = torch.randn_like(batch.reference)
            return explore(self.velocity(self.student, batch), noise, self.times, self.config.noise_level, self.policy)

    @torch.no_grad()
    def reward(self, batch: UnpairedBatch, output: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Mean probability of the right answers, (B,), and what was measured on the way."""
        with self.clock("judge"):
            _, right = judge_loss(self.judge, batch, output)
        return right.mean(0), {"p_edit": right[0].mean().item(), "p_identity": right[1].mean().item()}

    def reference_means(self, batch: UnpairedBatch, trajectory: Trajectory) -> list[Tensor] | None:
        """What the reference policy would have done, or None where nothing holds the student to it."""
        if self.reference is None or not self.config.kl_weight:
            return None
        with self.clock("reference"), torch.no_grad():
            return policy_means(self.velocity(self.reference, batch), trajectory, self.config.noise_level, self.policy)[0]

    def backward(self, batch: UnpairedBatch, trajectory: Trajectory, advantage: Tensor, reference_means: list[Tensor] | None) -> dict[str, float]:
        """One backward of the clipped objective and the KL term, the mean over samples and random steps."""
        c = self.config
        with self.clock("student"):
            means, stds = policy_means(self.velocity(self.student, batch), trajectory, c.noise_level, self.policy)
            now = torch.stack([log_probability(x, m, std) for x, m, std in zip(trajectory.states[1:], means, stds)])
            before = torch.stack(trajectory.log_probs)
            loss = clipped_objective(now, before, advantage, c.ratio_clip).mean()
            metrics = {}
            if reference_means is not None:
                kl = torch.stack([policy_kl(m, r, std) for m, r, std in zip(means, reference_means, stds)]).mean()
                loss, metrics["kl"] = loss + c.kl_weight * kl, kl.item()
            loss.backward()
            off = (now.detach() - before).exp() - 1
        return {**metrics, "loss": loss.item(), "ratio_off": off.abs().mean().item(), "clipped": (off.abs() > c.ratio_clip).float().mean().item()}


def train_grpo(config: GRPOConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per update, its pictures the first references and samples; the averaged student is saved to `out/model` at the
    end. The metric `calls` counts network calls of the student on one picture, `reference_calls` those of the reference policy."""
    run = Run(config, accelerator)
    load = lambda: DiT.from_pretrained(config.student).to(run.device)
    roles = GRPO(config, load(), load() if config.kl_weight else None, JudgeModel.from_pretrained(config.judge).to(run.device))
    optimizer, ema = Optimizer(roles.student, config), EMA(roles.student, config.ema)
    run.register("model", roles.student, optimizer, ema)
    requests, random_steps = config.batch // config.group, config.sampler_steps - 1
    for index in run.steps():
        roles.cpu.clear()
        with roles.clock("data"):
            few = unpaired_batch(requests, config.side, *run.key(index), kinds=TASKS[config.task], pool=config.pool, settled=config.settled)
            batch = repeated(few, config.group).to(run.device)
        with run.accelerator.autocast():
            trajectory = roles.sample(batch)
            rewards, metrics = roles.reward(batch, trajectory.output)
            reference_means = roles.reference_means(batch, trajectory)
        advantage = group_advantage(rewards, config.group, config.advantage_clip, config.advantage_spread)
        skipped = 0.0
        for _ in range(config.inner):
            with run.accelerator.autocast():
                metrics.update(roles.backward(batch, trajectory, advantage, reference_means))
            with roles.clock("student"):
                metrics["gradient_norm"], fine = optimizer.step(index, run.accelerator)
            skipped = max(skipped, float(not fine))
        ema.update(roles.student, index)
        spread = rewards.view(-1, config.group).std(1, correction=0).mean().item()
        calls = config.batch * (config.sampler_steps + config.inner * random_steps)
        run.metrics.update(metrics, reward=rewards.mean().item(), reward_spread=spread, skipped=skipped, calls=calls)
        run.metrics["reference_calls"] = 0 if reference_means is None else config.batch * random_steps
        run.metrics.update({f"cpu_{part}": seconds for part, seconds in roles.cpu.items()})
        yield run.done(index, reference=batch.reference[:8], output=trajectory.output[:8])
    roles.student.load_state_dict(ema.shadow)
    if run.accelerator.is_main_process:
        roles.student.save_pretrained(run.folder / "model")
