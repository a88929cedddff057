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

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from accelerate import Accelerator
from torch import Tensor

from vlmedit.config import TrainConfig
from vlmedit.data.batches import UnpairedBatch
from vlmedit.data.world import WorldData
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
from vlmedit.errors import ConfigError
from vlmedit.flow import Velocity, few_step_times
from vlmedit.methods._base import Base, load_dit
from vlmedit.networks.dit import DiT
from vlmedit.networks.judge import JudgeModel
from vlmedit.protocols import Phase, Trained
from vlmedit.training.run import Step, begin
from vlmedit.training.trainer import train


@dataclass(frozen=True)
class FlowGRPOConfig(TrainConfig):
    """Flow-GRPO with NP-Edit's judge as the reward [arXiv:2505.05470; R here: its released config/grpo.py]. `student` is where it starts:
    the copy warm start, or the model of an SFT run."""

    world = {"side": 32, "task": "edit", "fulfilled_share": 0.2, "request_limit": None}  # as NPEditConfig's: the same requests

    out: str = "runs/flow_grpo"
    judge: str = "runs/judge/model"
    student: str = "runs/copy_warmup/model"
    steps: int = 800
    batch: int = 32  # samples per update and process: requests times `group`; R: 48 x 24
    group: int = 8  # samples of one request; R: 24
    lr: float = 1e-4  # [X]: at 3e-4 a paired student loses sharpness before it earns anything; R: 3e-4, of LoRA weights
    betas: tuple[float, float] = (0.9, 0.99)  # R: (0.9, 0.999)
    weight_decay: float = 0.0  # R: 1e-4
    warmup: int = 20
    final_lr: float = 0.1  # R: 1, no schedule
    clip: float = 1.0  # gradient norm [R]
    ema: float = 0.99
    policy: str = "exponential"  # or "euler", the paper's, which needs more steps than a few: see vlmedit/equations/flow_grpo.py
    noise_level: float = 0.7  # a in sigma = a sqrt(t / (1 - t)) [R]
    sampler_steps: int = 4  # while training; R: 10, of 40 in use
    sampler_shift: float = 1.0
    inner: int = 2  # optimizer steps on the same samples; R: 2, on a half each
    ratio_clip: float = 1e-4  # of the ratio of mean log-probabilities [R]
    kl_weight: float = 0.04  # of the KL to the start [R]; 0 loads no reference policy
    advantage_clip: float = 5.0  # standard deviations [R]
    advantage_spread: str = "group"  # whose standard deviation: the paper's group, or "batch" [R]

    def __post_init__(self):
        super().__post_init__()
        if self.group < 2 or self.batch % self.group:
            raise ConfigError(f"batch is {self.batch} and group {self.group}; a group needs at least 2 samples, and the batch whole groups")
        if self.sampler_steps < 2:
            raise ConfigError(f"sampler_steps is {self.sampler_steps}; the last step is not random, so there must be at least 2")
        self.check_counts("inner")
        if self.noise_level <= 0:
            raise ConfigError(f"noise_level is {self.noise_level}; without noise there is nothing to compare: it must be positive")
        self.check_choices(policy=("euler", "exponential"), advantage_spread=("group", "batch"))

    @classmethod
    def tiers(cls):
        base = super().tiers()
        return {**base, "smoke": {**base["smoke"], "group": 2}, "gpu": dict(side=64, batch=1152, group=24, sampler_steps=10)}


def repeated(batch: UnpairedBatch, times: int) -> UnpairedBatch:
    """Each request `times` times over, side by side."""
    tensors = {f.name: getattr(batch, f.name).repeat_interleave(times, 0) for f in fields(batch) if f.name != "types"}
    return UnpairedBatch(**tensors, types=tuple(t for t in batch.types for _ in range(times)))


class FlowGRPO(Base):
    """A rollout that is rewarded, then `inner` steps of the clipped objective on it. The reference policy is there when `kl_weight` is."""

    def __init__(self, config: FlowGRPOConfig, student: DiT, reference: DiT | None, judge: JudgeModel):
        frozen = {"judge": judge} | ({"reference": reference} if reference is not None else {})
        super().__init__({"student": Trained(student, ema=config.ema)}, frozen)
        self.config, self.student, self.reference, self.judge = config, student, reference, judge
        self.times = few_step_times(config.sampler_steps, config.sampler_shift)
        self.policy = POLICIES[config.policy]

    def phases(self, index: int) -> Iterator[Phase]:
        yield Phase("rollout", batch=UnpairedBatch, size=self.config.batch // self.config.group)
        yield from (Phase("student", ("student",)) for _ in range(self.config.inner))

    def backward(self, phase: Phase, batch: UnpairedBatch, memory: dict, index: int) -> dict[str, float | int]:
        if phase.name == "rollout":
            return self.rollout(repeated(batch, self.config.group), memory)
        return self.policy_backward(memory["batch"], memory["trajectory"], memory["advantage"], memory["reference_means"])

    def rollout(self, batch: UnpairedBatch, memory: dict) -> dict[str, float | int]:
        """Sample, reward, and what the reference policy would have done, into the update's memory."""
        c = self.config
        trajectory = self.sample(batch)
        rewards, metrics = self.reward(batch, trajectory.output)
        means = self.reference_means(batch, trajectory)
        memory.update(batch=batch, trajectory=trajectory, reference_means=means)
        memory["advantage"] = group_advantage(rewards, c.group, c.advantage_clip, c.advantage_spread)
        random_steps = c.sampler_steps - 1
        spread = rewards.view(-1, c.group).std(1, correction=0).mean().item()
        calls = len(batch) * (c.sampler_steps + c.inner * random_steps)
        asked = 0 if means is None else len(batch) * random_steps
        return {**metrics, "reward": rewards.mean().item(), "reward_spread": spread, "calls": calls, "reference_calls": asked}

    def velocity(self, model: DiT, batch: UnpairedBatch) -> Velocity:
        text = model.encode_text(batch.instruction)
        cache = model.encode_reference(batch.reference, text) if model.config.reference_time == "clean" else batch.reference
        return lambda x, t: model(x, t, text, cache).float()

    def sample(self, batch: UnpairedBatch) -> Trajectory:
        with self.part("sampling"), torch.no_grad():
            noise = torch.randn_like(batch.reference)
            return explore(self.velocity(self.student, batch), noise, self.times, self.config.noise_level, self.policy)

    @torch.no_grad()
    def reward(self, batch: UnpairedBatch, output: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Mean probability of the right answers, (B,), and what was measured on the way."""
        with self.part("judge"):
            _, right = judge_loss(self.judge, batch, output)
        return right.mean(0), {"p_edit": right[0].mean().item(), "p_identity": right[1].mean().item()}

    def reference_means(self, batch: UnpairedBatch, trajectory: Trajectory) -> list[Tensor] | None:
        """What the reference policy would have done, or None where nothing holds the student to it."""
        if self.reference is None or not self.config.kl_weight:
            return None
        with self.part("reference"), torch.no_grad():
            return policy_means(self.velocity(self.reference, batch), trajectory, self.config.noise_level, self.policy)[0]

    def policy_backward(self, batch: UnpairedBatch, trajectory: Trajectory, advantage: Tensor, reference_means: list[Tensor] | None) -> dict[str, float]:
        """One backward of the clipped objective and the KL term, the mean over samples and random steps."""
        c = self.config
        with self.part("student"):
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

    def pictures(self, batch: UnpairedBatch, memory: dict) -> dict[str, Tensor]:
        return {"reference": memory["batch"].reference, "output": memory["trajectory"].output}


def train_flow_grpo(config: FlowGRPOConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per update, its pictures the first references and samples; the averaged student is saved to `out/model` at the
    end. The metric `calls` counts network calls of the student on one picture, `reference_calls` those of the reference policy."""
    accelerator = begin(config, accelerator)
    load = lambda: load_dit(config.student, accelerator.device)
    method = FlowGRPO(config, load(), load() if config.kl_weight else None, JudgeModel.from_pretrained(config.judge).to(accelerator.device))
    yield from train(method, WorldData(config), config, accelerator)
