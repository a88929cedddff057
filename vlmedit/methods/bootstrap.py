"""The unpaired rival that asks nobody but the frozen model: Bootstrap Your Generator [arXiv:2606.03911].

Per update: an average of the student's past edits the reference in a few steps, without a graph, z = G_ema(y, c); the student sees it
noised, z_t, and makes a clean estimate x = z_t - t v_theta(z_t, t, y, c). Two losses:

    prior   |y + (mu(z_t, c*) - mu(y_t, c_y)) - x|^2         the direction in which the frozen text-to-image model would change y
    cycle   |v_theta(y_s, s, route(z, x), c^-1) - (eps' - y)|^2   undo it: given the edit as reference, find the way back to y

The cycle needs a clean edit, the student is trained at noisy states: `route` gives the cycle the value of z and sends its gradient to x.

Deviates: written from the abstract and the project page, not from the article's equations, so the forms of both losses are our reading
of "aligning the edit direction with the base model" and "straight through": the direction is in clean estimates, squared error, guided;
the reverse pass is one flow-matching step with a graph. Rows where nothing is to be done have the reference as pseudo-target.
Losses: vlmedit/equations/cycle.py. Shapes: pictures (B, 3, S, S).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from vlmedit.data.cycles import CycleBatch, cycle_draw
from vlmedit.data.world import WorldData
from vlmedit.equations.cycle import direction, prior_loss, route
from vlmedit.equations.training_free import guided
from vlmedit.errors import ConfigError
from vlmedit.flow import few_step_times, flow_matching_loss, interpolate, logit_normal_time, sample, to_x0
from vlmedit.methods._base import Base, load_dit
from vlmedit.methods._cycle import CycleConfig
from vlmedit.networks.dit import DiT
from vlmedit.protocols import Phase, Trained
from vlmedit.training.run import Step, begin
from vlmedit.training.trainer import train


@dataclass(frozen=True)
class BootstrapConfig(CycleConfig):
    """Bootstrap Your Generator: the frozen model's direction of change, and a cycle [arXiv:2606.03911; the settings are ours]."""

    out: str = "runs/bootstrap"
    prior_weight: float = 1.0
    guidance: float = 2.0  # of the target caption in the direction of change
    sampler_steps: int = 4  # of the pseudo-target
    sampler_shift: float = 1.0
    time_shift: float = 3.0  # of the noisy states that are trained, as SFT's
    target_decay: float = 0.99  # decay of the average that makes pseudo-targets

    def __post_init__(self):
        super().__post_init__()
        if self.prior_weight <= 0:
            raise ConfigError(f"prior_weight is {self.prior_weight}; without it copying is the best answer: it must be positive")
        if not 0 <= self.target_decay < 1:
            raise ConfigError(f"target_decay is {self.target_decay}; it must lie in [0, 1)")


class Bootstrap(Base):
    """Student, its average and the frozen model."""

    batch = CycleBatch

    def __init__(self, config: BootstrapConfig, student: DiT, follower: DiT, teacher: DiT):
        frozen = {"teacher": teacher, "follower": follower}
        super().__init__({"student": Trained(student, ema=config.ema)}, frozen, kept={"follower": follower})
        self.config, self.student, self.follower, self.teacher = config, student, follower, teacher

    def backward(self, phase: Phase, batch: CycleBatch, memory: dict, index: int) -> dict[str, float | int]:
        c, reference = self.config, batch.request.reference
        t, eps = logit_normal_time(len(reference), c.time_shift, reference.device), torch.randn_like(reference)
        memory["output"] = z = self.pseudo_target(batch)
        found = self.losses(batch, z, t, eps)
        sum(found.values()).backward()
        calls = len(reference) * (c.sampler_steps + 1 + bool(c.cycle_weight))
        return {name: loss.item() for name, loss in found.items()} | {"calls": calls}

    @torch.no_grad()
    def pseudo_target(self, batch: CycleBatch) -> Tensor:
        """What the follower makes of the request; the reference where nothing is to be done."""
        request, c = batch.request, self.config
        text = self.follower.encode_text(request.instruction)
        held = self.follower.hold_reference(request.reference, text)
        noise, times = torch.randn_like(request.reference), few_step_times(c.sampler_steps, c.sampler_shift)
        z = sample(lambda x, t: self.follower(x, t, text, held), noise, times, "renoise").float().clamp(-1, 1)
        return torch.where(request.nothing.view(-1, 1, 1, 1) > 0, request.reference, z)

    def estimate(self, batch: CycleBatch, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The student's clean estimate from the noised pseudo-target."""
        z_t, request = interpolate(z, eps, t), batch.request
        return to_x0(z_t, self.student(z_t, t, request.instruction, request.reference), t).float()

    def losses(self, batch: CycleBatch, z: Tensor, t: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """Each term, weighted: a dict of scalars."""
        c, request = self.config, batch.request
        x = self.estimate(batch, z, t, eps)
        flows = guided(self.teacher, request.reference_caption), guided(self.teacher, request.target_caption, c.guidance)
        towards = direction(*flows, request.reference, z, t, eps) * (1 - request.nothing).view(-1, 1, 1, 1)
        each = prior_loss(x, request.reference, towards)
        found = {"prior": c.prior_weight * (each * (1 - request.nothing)).mean()}
        if c.nothing_weight:
            found["nothing"] = c.nothing_weight * (each * request.nothing).mean()
        if c.cycle_weight:
            s, noise = logit_normal_time(len(z), c.time_shift, z.device), torch.randn_like(z)
            edited = route(z, x)
            back = flow_matching_loss(lambda y, time: self.student(y, time, batch.inverse, edited), request.reference, s, noise)
            found["cycle"] = c.cycle_weight * (back * batch.reversible).mean()
        return found

    @torch.no_grad()
    def after(self, index: int) -> None:
        """The follower's weights move towards the student's."""
        for mine, theirs in zip(self.follower.parameters(), self.student.parameters(), strict=True):
            mine.lerp_(theirs, 1 - self.config.target_decay)

    def pictures(self, batch: CycleBatch, memory: dict) -> dict[str, Tensor]:
        return {"reference": batch.request.reference, "output": memory["output"]}


def train_bootstrap(config: BootstrapConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per update; the averaged student is saved to `out/model` at the end. `calls` counts the student's and its follower's."""
    accelerator = begin(config, accelerator)
    load = lambda place: load_dit(place, accelerator.device)
    method = Bootstrap(config, load(config.student), load(config.student), load(config.teacher))
    yield from train(method, WorldData(config, {CycleBatch: cycle_draw(config.data)}), config, accelerator)
