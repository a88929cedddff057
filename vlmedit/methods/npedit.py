"""Stage 4: NP-Edit. No target image anywhere: a judge's yes and the teacher's manifold are all the student hears
[arXiv:2510.14978, Sec. 3; Algorithm 1].

Per update: unroll the student on (reference, instruction); at its output take the gradient of each loss by itself (DMD with
the target caption; the judge's two questions; distance to the reference where the instruction is "do nothing"); add them and
send the sum back through the unroll once. Then teach the fake score the student's new distribution.

Deviates from the released code: two fake-score updates on the student's own rollout instead of five on fresh ones
(`fake_updates`, `fake_rollouts`), smaller weights' scale (see config.py); each is a switch.

Its relatives are switches of the same update: `matching` and `gan_weight` (objectives.py), `reward` and how it is asked (rewards.py); without
DMD (`dmd_weight=0`) DRaFT-K, AlignProp, ReFL and R0 by `gradient_calls`, `truncate`, `pretrain_weight` and `anchor_weight`.

The same update runs real models (vlmedit/real): roles and judge are then theirs, and the flow lives in a codec's latents, which
the judge alone sees decoded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vlmedit.config import ConfigError, NPEditConfig
from vlmedit.data.world import TASKS, UnpairedBatch, rng_for, unpaired_batch
from vlmedit.equations.dmd import draw_dmd_time, fake_score_loss
from vlmedit.equations.judge_loss import gain_ramp
from vlmedit.equations.matching import OBJECTIVES, Setting, gan_loss, ratio_head, ratio_loss
from vlmedit.equations.rewards import REWARDS, Panel
from vlmedit.equations.unroll import draw_times, rollout
from vlmedit.flow import flow_matching_loss, logit_normal_time
from vlmedit.networks.codec import PixelCodec
from vlmedit.networks.dit import DiT
from vlmedit.networks.judge import JudgeModel
from vlmedit.protocols import Codec
from vlmedit.training.engine import EMA, Optimizer, Run, Step


def nothing_loss(output: Tensor, reference: Tensor, nothing: Tensor) -> Tensor:
    """Squared distance to the reference on "do nothing" rows, mean over the batch (method.md 1.2)."""
    return ((output - reference).square().flatten(1).mean(1) * nothing).mean()


def anchor_loss(model: nn.Module, start: list[Tensor]) -> Tensor:
    """Sum of squared distances of all trained weights to where they started. R0 [arXiv:2503.13070] trains on rewards and such a
    regularizer alone; its exact form is not released, this is the plainest one."""
    return sum((p - s).square().sum() for p, s in zip((p for p in model.parameters() if p.requires_grad), start, strict=True))


class NPEdit:
    """The roles and one update of each, without loop, logging or files. Outputs are the codec's latents, which in the miniature are pixels."""

    def __init__(self, config: NPEditConfig, student: DiT, fake: DiT, teacher: DiT, judge: JudgeModel, codec: Codec = PixelCodec(), second: JudgeModel | None = None):
        self.config, self.student, self.fake, self.codec = config, student, fake, codec
        self.teacher, self.judge = teacher.requires_grad_(False).eval(), judge.requires_grad_(False).eval()
        self.cpu: dict[str, float] = {}
        self.objective, self.reward = OBJECTIVES[config.matching], REWARDS[config.reward]
        others = (second.requires_grad_(False).eval(),) if second is not None else ()
        self.panel = Panel(
            self.judge, self.teacher, codec.decode, others, config.identity, config.answer_loss, config.wording, config.augment, config.teacher_draws, config.teacher_scale
        )
        self.ratio = self.objective.ratio or config.gan_weight > 0
        if self.ratio:  # the fake's patch head becomes a discriminator
            fake.ground = ratio_head(fake.config.width).to(fake.device)
        self.start = [p.detach().clone() for p in student.parameters() if p.requires_grad] if config.anchor_weight else None

    @contextmanager
    def clock(self, part: str):
        """Add the CPU-seconds of a block to `part`."""
        began = time.process_time()
        yield
        self.cpu[part] = self.cpu.get(part, 0.0) + time.process_time() - began

    def edit(self, batch: UnpairedBatch, times: tuple[float, ...]) -> Tensor:
        """Unroll the student: latents (B, C, H, W), with a graph when gradients are enabled."""
        text, reference = self.student.encode_text(batch.instruction), self.latents(batch.reference)
        held = self.student.hold_reference(reference, text)
        velocity = lambda x, t: self.student(x, t, text, held)
        noise = torch.randn_like(reference)
        return rollout(velocity, noise, times, self.config.renoise, self.gradient_calls(len(times))).float()

    def gradient_calls(self, calls: int) -> int | None:
        """Through how many of the last calls the gradient goes, None for all: DRaFT-K's fixed K [arXiv:2309.17400], or AlignProp's drawn
        anew per update, uniform up to all [arXiv:2310.03739]."""
        if self.config.truncate == "fixed" or not torch.is_grad_enabled():
            return self.config.gradient_calls
        return int(torch.randint(1, min(calls, self.config.gradient_calls or calls) + 1, ()))

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor:
        return self.codec.encode(pictures)

    def caption(self, batch: UnpairedBatch) -> Tensor:
        return batch.target_caption if self.config.target_caption else batch.reference_caption

    def output_gradients(self, batch: UnpairedBatch, output: Tensor, step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Weighted gradient of each loss at the (detached) output, and what was measured on the way."""
        c, metrics, gradients = self.config, {}, {}
        x = output.detach().requires_grad_(True)
        if c.dmd_weight:
            with self.clock("teacher"):
                t = draw_dmd_time(len(x), device=x.device)
                real = batch.reference, batch.reference_caption
                setting = Setting(self.teacher, self.fake, self.caption(batch), t, torch.randn_like(x), c.guidance, c.dmd_norm, *real)
                loss = c.dmd_weight * self.objective.loss(x, setting)
                if c.gan_weight:
                    loss = loss + c.gan_weight * gan_loss(x, setting)
                (gradients["dmd"],) = torch.autograd.grad(loss, x)
        if c.judge_weight:
            with self.clock("judge"):
                loss, right = self.reward(self.panel, batch, x, gain_ramp(step, c.gain_steps))
                (gradients["judge"],) = torch.autograd.grad(c.judge_weight * loss, x)
                metrics.update(judge_loss=loss.item(), p_edit=right[0].mean().item())
                if c.identity:
                    metrics["p_identity"] = right[1].mean().item()
        if c.nothing_weight and batch.nothing.any():
            loss = c.nothing_weight * nothing_loss(x, self.latents(batch.reference), batch.nothing)
            (gradients["nothing"],) = torch.autograd.grad(loss, x)
        metrics.update({f"gradient_{name}": g.flatten(1).norm(dim=1).mean().item() * len(x) for name, g in gradients.items()})
        return gradients, metrics

    def student_backward(self, batch: UnpairedBatch, times: tuple[float, ...], step: int) -> tuple[Tensor, dict[str, float]]:
        """Unroll, gradients at the output, one backward through the unroll. Returns the detached output."""
        with self.clock("student"):
            output = self.edit(batch, times)
        gradients, metrics = self.output_gradients(batch, output, step)
        with self.clock("student"):
            output.backward(sum(gradients.values()))
            for name, loss in self.regularizers(batch).items():
                loss.backward()
                metrics[name] = loss.item()
        return output.detach(), metrics

    def regularizers(self, batch: UnpairedBatch) -> dict[str, Tensor]:
        """What holds the student's weights rather than its pictures, weighted: distance to their start; and ReFL's second term, the loss
        the student was prepared with, here copying the reference under its caption [ImageReward, arXiv:2304.05977]."""
        c, losses = self.config, {}
        if c.anchor_weight:
            losses["anchor_loss"] = c.anchor_weight * anchor_loss(self.student, self.start)
        if c.pretrain_weight:
            reference = self.latents(batch.reference)
            text, t = self.student.encode_text(batch.reference_caption), logit_normal_time(len(reference), 3.0, reference.device)
            held = self.student.hold_reference(reference, text)
            loss = flow_matching_loss(lambda x, time: self.student(x, time, text, held), reference, t, torch.randn_like(reference)).mean()
            losses["pretrain_loss"] = c.pretrain_weight * loss
        return losses

    def fake_backward(self, samples: Tensor, text: Tensor, batch: UnpairedBatch | None = None) -> float:
        """One flow-matching backward of the fake score on student samples; where the objective needs a density ratio, also one of
        its discriminator, against the references of `batch`. Returns the flow-matching loss."""
        with self.clock("fake"):
            t = torch.rand(len(samples), device=samples.device).clamp(1e-3, 1 - 1e-3)
            loss = fake_score_loss(self.fake, samples, text, t, torch.randn_like(samples))
            total = loss
            if self.ratio:
                t, eps = draw_dmd_time(len(samples), device=samples.device), torch.randn_like(samples)
                told = ratio_loss(self.fake, samples, text, batch.reference, batch.reference_caption, t, eps)
                total = loss + self.config.ratio_weight * told
            total.backward()
        return loss.item()


def shares(config: NPEditConfig) -> dict[str, float]:
    """How often each edit type is drawn, relative to the others."""
    return {kind: share * (2 if kind in config.emphasis else 1) for kind, share in TASKS[config.task].items()}


def train_npedit(config: NPEditConfig, accelerator: Accelerator | None = None, update: Callable[..., NPEdit] = NPEdit) -> Iterator[Step]:
    """Yield a `Step` per student update, its pictures the first references and edits of the batch; the averaged
    student is saved to `out/model` at the end. The metric `calls` counts network calls of the student on one picture.
    `update` builds the roles' update, for a caller who adds to it (papers/moves.py)."""
    if config.second and not (Path(config.second) / "config.json").is_file():
        raise ConfigError(f"second is {config.second!r}, no folder with a judge; train one (vlmedit train judge) or leave it out")
    run = Run(config, accelerator)
    load = lambda folder: DiT.from_pretrained(folder).to(run.device)
    look = lambda folder: JudgeModel.from_pretrained(folder).to(run.device)
    roles = update(config, load(config.student), load(config.teacher), load(config.teacher), look(config.judge), second=look(config.second) if config.second else None)
    optimizer, fake_optimizer = Optimizer(roles.student, config), Optimizer(roles.fake, config, config.fake_lr)
    ema = EMA(roles.student, config.ema)
    run.register("model", roles.student, optimizer, ema)
    run.register("fake", roles.fake, fake_optimizer)
    draw = lambda *key: unpaired_batch(config.batch, config.side, *key, kinds=shares(config), pool=config.pool, settled=config.settled).to(run.device)
    for index in run.steps():
        roles.cpu.clear()
        with roles.clock("data"):
            batch = draw(*run.key(index))
        times = draw_times(rng_for("times", config.seed, index), config.calls, config.sampler_steps, config.sampler_shift)
        with run.accelerator.autocast():
            output, metrics = roles.student_backward(batch, times, index)
        with roles.clock("student"):
            norm, fine = optimizer.step(index, run.accelerator)
            ema.update(roles.student, index)
        samples, text, other = output, roles.caption(batch), batch
        updates = config.fake_updates if config.dmd_weight and roles.objective.fake else 0
        for k in range(updates):
            with run.accelerator.autocast():
                if config.fake_rollouts == "fresh":
                    other = draw(*run.key(index), "fake", k)
                    with torch.no_grad(), roles.clock("fake"):
                        samples, text = roles.edit(other, times), roles.caption(other)
                metrics["fake_loss"] = roles.fake_backward(samples, text, other)
            with roles.clock("fake"):
                fake_optimizer.step(index, run.accelerator)
        calls = config.batch * len(times) * (1 + (updates if config.fake_rollouts == "fresh" else 0))
        run.metrics.update(metrics, gradient_norm=norm, skipped=float(not fine), calls=calls)
        run.metrics.update({f"cpu_{part}": seconds for part, seconds in roles.cpu.items()})
        yield run.done(index, reference=batch.reference[:8], output=output[:8])
    roles.student.load_state_dict(ema.shadow)
    if run.accelerator.is_main_process:
        roles.student.save_pretrained(run.folder / "model")
