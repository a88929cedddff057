"""The unpaired one-step rival: CycleGAN-Turbo, with instructions in place of two domains [arXiv:2403.12036].

    L = cycle |G(G(y, c), c^-1) - y|_1 + gan softplus(-D(x_t, c*)) + nothing |G(y, c) - y|_1 [where c asks for nothing],  x = G(y, c)

CycleGAN-Turbo has two image domains, a generator for each way and a critic for each domain. Here one generator goes both ways, told by
the instruction, and one critic reads captions: real pictures are references with theirs. Neither a VLM nor a score: the only word
about the edit comes from the critic, and the only word about the rest from the cycle. Losses: vlmedit/equations/cycle.py.

Deviates from the released code: no LPIPS beside L1 (there is no feature network here); all weights instead of LoRA; the critic is the
teacher's weights with a linear head halfway, on noised pictures, as DMD2's, instead of CLIP's features; false captions teach it to read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

from vlmedit.config import CycleGANConfig
from vlmedit.data.cycles import CycleBatch, cycle_batch
from vlmedit.equations.cycle import adversarial_loss, copy_loss, critic_loss, cycle_loss
from vlmedit.equations.dmd import draw_dmd_time
from vlmedit.equations.matching import ratio_head
from vlmedit.equations.unroll import draw_times, rollout
from vlmedit.networks.dit import DiT
from vlmedit.seeds import rng_for
from vlmedit.training.engine import EMA, Optimizer, Run, Step


class CycleGAN:
    """Student, critic and one update of each, without loop, logging or files."""

    def __init__(self, config: CycleGANConfig, student: DiT, critic: DiT):
        self.config, self.student, self.critic = config, student, critic
        critic.ground = ratio_head(critic.config.width).to(critic.device)

    def edit(self, reference: Tensor, instruction: Tensor, times: tuple[float, ...]) -> Tensor:
        text = self.student.encode_text(instruction)
        held = self.student.hold_reference(reference, text)
        return rollout(lambda x, t: self.student(x, t, text, held), torch.randn_like(reference), times, self.config.renoise).float()

    def losses(self, batch: CycleBatch, output: Tensor, times: tuple[float, ...]) -> dict[str, Tensor]:
        """Each term, weighted, of the student's pictures `output`. The critic's weights are constants."""
        c, request = self.config, batch.request
        t, eps = draw_dmd_time(len(output), device=output.device), torch.randn_like(output)
        self.critic.requires_grad_(False)
        found = {"gan": c.gan_weight * adversarial_loss(self.critic, output, request.target_caption, t, eps)}
        self.critic.requires_grad_(True)
        if c.cycle_weight:
            back = self.edit(output, batch.inverse, times)
            found["cycle"] = c.cycle_weight * cycle_loss(back, request.reference, batch.reversible)
        if c.nothing_weight:
            found["nothing"] = c.nothing_weight * copy_loss(output, request.reference, request.nothing)
        return found

    def student_backward(self, batch: CycleBatch, times: tuple[float, ...]) -> tuple[Tensor, dict[str, float]]:
        """One backward of all terms. Returns the detached output."""
        output = self.edit(batch.request.reference, batch.request.instruction, times)
        found = self.losses(batch, output, times)
        sum(found.values()).backward()
        return output.detach(), {name: loss.item() for name, loss in found.items()}

    def critic_backward(self, batch: CycleBatch, output: Tensor) -> float:
        t, eps, r = draw_dmd_time(len(output), device=output.device), torch.randn_like(output), batch.request
        loss = critic_loss(self.critic, output, r.target_caption, r.reference, r.reference_caption, t, eps, self.config.mismatch)
        loss.backward()
        return loss.item()


def train_cyclegan(config: CycleGANConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per student update; the averaged student is saved to `out/model` at the end."""
    run = Run(config, accelerator)
    load = lambda folder: DiT.from_pretrained(folder).to(run.device)
    roles = CycleGAN(config, load(config.student), load(config.teacher))
    optimizer, ema = Optimizer(roles.student, config), EMA(roles.student, config.ema)
    critic_optimizer = Optimizer(roles.critic, config, config.critic_lr)
    run.register("model", roles.student, optimizer, ema)
    run.register("critic", roles.critic, critic_optimizer)
    for index in run.steps():
        batch = cycle_batch(config.batch, config.side, *run.key(index), pool=config.pool, settled=config.settled).to(run.device)
        times = draw_times(rng_for("times", config.seed, index), config.calls, config.sampler_steps, config.sampler_shift)
        with run.accelerator.autocast():
            output, metrics = roles.student_backward(batch, times)
        norm, fine = optimizer.step(index, run.accelerator)
        ema.update(roles.student, index)
        for _ in range(config.critic_updates):
            with run.accelerator.autocast():
                metrics["critic"] = roles.critic_backward(batch, output)
            critic_optimizer.step(index, run.accelerator)
        calls = config.batch * len(times) * (2 if config.cycle_weight else 1)
        run.metrics.update(metrics, gradient_norm=norm, skipped=float(not fine), calls=calls)
        yield run.done(index, reference=batch.request.reference[:8], output=output[:8])
    roles.student.load_state_dict(ema.shadow)
    if run.accelerator.is_main_process:
        roles.student.save_pretrained(run.folder / "model")
