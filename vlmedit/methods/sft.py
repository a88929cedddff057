"""The paired rival: supervised flow matching towards the exact target image [InstructPix2Pix, arXiv:2211.09800, Eq. 1, as velocities:
arXiv:2209.03003, Eq. 1]. It sees what NP-Edit never does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from vlmedit.config import TrainConfig
from vlmedit.data.batches import PairedBatch
from vlmedit.data.world import WorldData
from vlmedit.flow import flow_matching_loss, logit_normal_time
from vlmedit.methods._base import Base, load_dit
from vlmedit.networks.dit import DiT
from vlmedit.protocols import Phase, Trained
from vlmedit.training.run import Step, begin
from vlmedit.training.trainer import train


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """The paired rival: flow matching towards the exact target, from the same warm start and for as many updates."""

    out: str = "runs/sft"
    student: str = "runs/copy_warmup/model"
    steps: int = 1200
    batch: int = 32
    lr: float = 1.5e-3
    warmup: int = 20
    final_lr: float = 0.1
    ema: float = 0.99
    time_shift: float = 3.0


class SFT(Base):
    """Flow matching towards the target."""

    batch = PairedBatch

    def __init__(self, config: SFTConfig, student: DiT):
        super().__init__({"student": Trained(student, ema=config.ema)})
        self.config, self.student = config, student

    def backward(self, phase: Phase, batch: PairedBatch, memory: dict, index: int) -> dict[str, float | int]:
        loss = paired_loss(self.student, batch, self.config.time_shift)
        loss.backward()
        return {"loss": loss.item(), "calls": len(batch)}


def paired_loss(student: DiT, batch: PairedBatch, shift: float) -> torch.Tensor:
    """Flow matching of the target under instruction and reference, at shifted logit-normal times: a scalar."""
    t = logit_normal_time(len(batch), shift, batch.target.device)
    eps = torch.randn_like(batch.target)
    return flow_matching_loss(lambda x, time: student(x, time, batch.instruction, batch.reference), batch.target, t, eps).mean()


def train_sft(config: SFTConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per update; the averaged student is saved to `out/model` at the end."""
    accelerator = begin(config, accelerator)
    yield from train(SFT(config, load_dit(config.student, accelerator.device)), WorldData(config), config, accelerator)
