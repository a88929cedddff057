"""Stage 1: the text-to-image teacher, by flow matching on captioned pictures [arXiv:2209.03003].

Deviates from a plain recipe: x0-prediction inside the network (networks/dit.py), loss in v; a head halfway says what each
patch will show, which teaches the words sooner (as REPA [arXiv:2410.06940] does with features of a frozen encoder).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from vlmedit.config import TrainConfig
from vlmedit.data.batches import TEXT_LENGTH, CaptionedBatch
from vlmedit.data.world import WorldData
from vlmedit.flow import interpolate, logit_normal_time, velocity_target
from vlmedit.methods._base import Base, drop_text, load_dit
from vlmedit.networks.dit import DiT
from vlmedit.networks.judge import ground_loss
from vlmedit.protocols import Phase, Trained
from vlmedit.training.run import Step, begin
from vlmedit.training.trainer import train
from vlmedit.world.scene import GROUND_CLASSES
from vlmedit.world.tokenizer import build_tokenizer


@dataclass(frozen=True)
class TeacherConfig(TrainConfig):
    """Text-to-image flow matching."""

    out: str = "runs/teacher"
    steps: int = 7000
    text_dropout: float = 0.1  # share of empty captions, for guidance [R warm-up]
    time_shift: float = 2.0  # of the logit-normal training times
    ground_weight: float = 0.1  # of predicting what each patch shows, from halfway (REPA's idea, arXiv:2410.06940) [X]
    start: str | None = None  # weights to go on from; None is random

    @classmethod
    def tiers(cls):
        return {**super().tiers(), "gpu": dict(side=64, batch=256, steps=60_000)}


class Teacher(Base):
    """Flow matching of captioned pictures, and the patches' words."""

    batch, result = CaptionedBatch, "teacher"

    def __init__(self, config: TeacherConfig, model: DiT):
        super().__init__({"teacher": Trained(model, ema=config.ema)})
        self.config, self.model = config, model

    def backward(self, phase: Phase, batch: CaptionedBatch, memory: dict, index: int) -> dict[str, float | int]:
        text = drop_text(batch.caption, self.config.text_dropout)
        t = logit_normal_time(len(batch), self.config.time_shift, batch.image.device)
        eps = torch.randn_like(batch.image)
        v, seen = self.model(interpolate(batch.image, eps, t), t, text, with_ground=True)
        loss = (v - velocity_target(batch.image, eps)).square().mean()
        grounding = ground_loss(seen, batch.ground)
        (loss + self.config.ground_weight * grounding).backward()
        return {"loss": loss.item(), "ground_loss": grounding.item()}


def train_teacher(config: TeacherConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per update; the averaged model is saved to `out/model` at the end."""
    accelerator = begin(config, accelerator)
    torch.manual_seed(config.seed)  # of the initial weights
    fresh = lambda: DiT(side=config.side, vocab_size=len(build_tokenizer()), text_length=TEXT_LENGTH, ground_classes=GROUND_CLASSES)
    model = load_dit(config.start, accelerator.device) if config.start else fresh().to(accelerator.device)
    yield from train(Teacher(config, model), WorldData(config), config, accelerator)
