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
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from vlmedit.data.cycles import CycleBatch, cycle_draw
from vlmedit.data.world import WorldData
from vlmedit.equations.cycle import adversarial_loss, copy_loss, critic_loss, cycle_loss
from vlmedit.equations.dmd import draw_dmd_time
from vlmedit.equations.matching import ratio_head
from vlmedit.equations.unroll import CALLS, RENOISE, draw_times, rollout
from vlmedit.errors import ConfigError
from vlmedit.methods._base import Base, load_dit
from vlmedit.methods._cycle import CycleConfig
from vlmedit.networks.dit import DiT
from vlmedit.protocols import Phase, Trained
from vlmedit.seeds import rng_for
from vlmedit.training.run import Step, begin
from vlmedit.training.trainer import train


@dataclass(frozen=True)
class CycleGANTurboConfig(CycleConfig):
    """CycleGAN-Turbo, its two domains being captions [arXiv:2403.12036; R here: its released train_cyclegan_turbo.py]."""

    out: str = "runs/cyclegan_turbo"
    gan_weight: float = 0.5  # R: 0.5
    critic_lr: float = 1e-3
    critic_updates: int = 1  # per student update [R]
    mismatch: float = 0.5  # share of the critic's references shown with another one's caption, as false [GAN-CLS, arXiv:1605.05396]; R: 0
    calls: str = "mixed"  # in the unroll; R: one
    sampler_steps: int = 4
    sampler_shift: float = 1.0
    renoise: str = "fresh"

    def __post_init__(self):
        super().__post_init__()
        if self.gan_weight <= 0:
            raise ConfigError(f"gan_weight is {self.gan_weight}; without it copying is the best answer: it must be positive")
        self.check_counts("critic_updates")
        self.check_choices(calls=CALLS, renoise=RENOISE)


class CycleGANTurbo(Base):
    """The student's three losses, then the critic's."""

    def __init__(self, config: CycleGANTurboConfig, student: DiT, critic: DiT):
        critic.ground = ratio_head(critic.config.width).to(critic.device)
        super().__init__({"student": Trained(student, ema=config.ema), "critic": Trained(critic, config.critic_lr)})
        self.config, self.student, self.critic = config, student, critic

    def phases(self, index: int) -> Iterator[Phase]:
        yield Phase("student", ("student",), CycleBatch)
        yield from (Phase("critic", ("critic",)) for _ in range(self.config.critic_updates))

    def backward(self, phase: Phase, batch: CycleBatch, memory: dict, index: int) -> dict[str, float | int]:
        if phase.name == "critic":
            return {"critic": self.critic_backward(batch, memory["output"])}
        c, request = self.config, batch.request
        times = draw_times(rng_for("times", c.seed, index), c.calls, c.sampler_steps, c.sampler_shift)
        output = self.edit(request.reference, request.instruction, times)
        found = self.losses(batch, output, times)
        sum(found.values()).backward()
        memory["output"] = output.detach()
        calls = len(output) * len(times) * (2 if c.cycle_weight else 1)
        return {name: loss.item() for name, loss in found.items()} | {"calls": calls}

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

    def critic_backward(self, batch: CycleBatch, output: Tensor) -> float:
        t, eps, r = draw_dmd_time(len(output), device=output.device), torch.randn_like(output), batch.request
        loss = critic_loss(self.critic, output, r.target_caption, r.reference, r.reference_caption, t, eps, self.config.mismatch)
        loss.backward()
        return loss.item()

    def pictures(self, batch: CycleBatch, memory: dict) -> dict[str, Tensor]:
        return {"reference": batch.request.reference, "output": memory["output"]}


def train_cyclegan_turbo(config: CycleGANTurboConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per student update; the averaged student is saved to `out/model` at the end."""
    accelerator = begin(config, accelerator)
    method = CycleGANTurbo(config, load_dit(config.student, accelerator.device), load_dit(config.teacher, accelerator.device))
    yield from train(method, WorldData(config, {CycleBatch: cycle_draw(config.data)}), config, accelerator)
