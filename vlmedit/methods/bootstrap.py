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

import torch
from accelerate import Accelerator
from torch import Tensor

from vlmedit.config import BootstrapConfig
from vlmedit.data.cycles import CycleBatch, cycle_batch
from vlmedit.equations.cycle import direction, prior_loss, route
from vlmedit.equations.training_free import guided
from vlmedit.flow import few_step_times, flow_matching_loss, interpolate, logit_normal_time, sample, to_x0
from vlmedit.networks.dit import DiT
from vlmedit.training.engine import EMA, Optimizer, Run, Step


class Bootstrap:
    """Student, its average and the frozen model, and one update, without loop, logging or files."""

    def __init__(self, config: BootstrapConfig, student: DiT, follower: DiT, teacher: DiT):
        self.config, self.student = config, student
        self.follower, self.teacher = follower.requires_grad_(False).eval(), teacher.requires_grad_(False).eval()

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
    def follow(self) -> None:
        """The follower's weights move towards the student's."""
        for mine, theirs in zip(self.follower.parameters(), self.student.parameters(), strict=True):
            mine.lerp_(theirs, 1 - self.config.follow)


def train_bootstrap(config: BootstrapConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per update; the averaged student is saved to `out/model` at the end. `calls` counts the student's and its follower's."""
    run = Run(config, accelerator)
    load = lambda folder: DiT.from_pretrained(folder).to(run.device)
    roles = Bootstrap(config, load(config.student), load(config.student), load(config.teacher))
    optimizer, ema = Optimizer(roles.student, config), EMA(roles.student, config.ema)
    run.register("model", roles.student, optimizer, ema)
    run.register("follower", roles.follower)
    for index in run.steps():
        batch = cycle_batch(config.batch, config.side, *run.key(index), pool=config.pool, settled=config.settled).to(run.device)
        t, eps = logit_normal_time(config.batch, config.time_shift, run.device), torch.randn_like(batch.request.reference)
        with run.accelerator.autocast():
            z = roles.pseudo_target(batch)
            found = roles.losses(batch, z, t, eps)
        sum(found.values()).backward()
        norm, fine = optimizer.step(index, run.accelerator)
        ema.update(roles.student, index)
        roles.follow()
        calls = config.batch * (config.sampler_steps + 1 + bool(config.cycle_weight))
        run.metrics.update({k: v.item() for k, v in found.items()}, gradient_norm=norm, skipped=float(not fine), calls=calls)
        yield run.done(index, reference=batch.request.reference[:8], output=z[:8])
    roles.student.load_state_dict(ema.shadow)
    if run.accelerator.is_main_process:
        roles.student.save_pretrained(run.folder / "model")
