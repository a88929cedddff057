"""The teacher distilled to few steps by DMD alone: text to image, no reference, no judge
[arXiv:2311.18828; multi-step as DMD2, arXiv:2405.14867].

Deviates from DMD2: no GAN term; each update unrolls one or two calls on the sampler's grid, as NP-Edit does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from vlmedit.config import TrainConfig
from vlmedit.data.batches import CaptionedBatch
from vlmedit.data.world import WorldData
from vlmedit.equations.dmd import NORMS, dmd_gradient, dmd_loss, dmd_scores, draw_dmd_time, fake_score_loss
from vlmedit.equations.unroll import draw_times, rollout
from vlmedit.methods._base import Base, load_dit
from vlmedit.networks.dit import DiT
from vlmedit.protocols import Phase, Trained
from vlmedit.seeds import rng_for
from vlmedit.training.run import Step, begin
from vlmedit.training.trainer import train


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """Few-step text-to-image by DMD alone, from the teacher's weights [arXiv:2311.18828, arXiv:2405.14867]."""

    out: str = "runs/distill"
    teacher: str = "runs/teacher/model"
    steps: int = 800
    batch: int = 32
    lr: float = 1.0e-3
    fake_lr: float = 1.0e-3
    betas: tuple[float, float] = (0.5, 0.98)
    weight_decay: float = 0.0
    warmup: int = 20
    final_lr: float = 0.1
    ema: float = 0.99
    guidance: float = 2.0
    dmd_norm: str = "sample"
    fake_updates: int = 3
    sampler_steps: int = 4
    sampler_shift: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        self.check_choices(dmd_norm=NORMS)


class Distill(Base):
    """The student's unroll under DMD's gradient, then the fake score on its pictures."""

    def __init__(self, config: DistillConfig, student: DiT, fake: DiT, teacher: DiT):
        super().__init__({"student": Trained(student, ema=config.ema), "fake": Trained(fake, config.fake_lr)}, {"teacher": teacher})
        self.config, self.student, self.fake, self.teacher = config, student, fake, teacher

    def phases(self, index: int) -> Iterator[Phase]:
        yield Phase("student", ("student",), CaptionedBatch)
        yield from (Phase("fake", ("fake",)) for _ in range(self.config.fake_updates))

    def backward(self, phase: Phase, batch: CaptionedBatch, memory: dict, index: int) -> dict[str, float | int]:
        text = batch.caption
        if phase.name == "fake":
            output = memory["output"]
            t = torch.rand(len(output), device=output.device).clamp(1e-3, 1 - 1e-3)
            loss = fake_score_loss(self.fake, output, text, t, torch.randn_like(output))
            loss.backward()
            return {"fake_loss": loss.item()}
        output = self.draw(batch, index)
        t = draw_dmd_time(len(output), device=output.device)
        eps = torch.randn_like(output)
        real, fake = dmd_scores(output, text, self.teacher, self.fake, self.config.guidance, t, eps)
        dmd_loss(output, dmd_gradient(output, real, fake, self.config.dmd_norm)).backward()
        memory["output"] = output.detach()
        return {}

    def draw(self, batch: CaptionedBatch, index: int) -> Tensor:
        """The student's pictures (B, 3, S, S) of an update's captions, with a graph."""
        c = self.config
        times = draw_times(rng_for("times", c.seed, index), "mixed", c.sampler_steps, c.sampler_shift)
        noise = torch.randn(batch.image.shape, device=batch.image.device)
        states = self.student.encode_text(batch.caption)
        return rollout(lambda x, t: self.student(x, t, states), noise, times).float()

    def pictures(self, batch: CaptionedBatch, memory: dict) -> dict[str, Tensor]:
        return {"output": memory["output"]}


def train_distill(config: DistillConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per update; the averaged few-step model is saved to `out/model` at the end."""
    accelerator = begin(config, accelerator)
    student, fake, teacher = (load_dit(config.teacher, accelerator.device) for _ in range(3))
    yield from train(Distill(config, student, fake, teacher), WorldData(config), config, accelerator)
