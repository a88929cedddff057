"""The paired rival: supervised flow matching towards the exact target image [InstructPix2Pix, arXiv:2211.09800, Eq. 1, as velocities:
arXiv:2209.03003, Eq. 1]. It sees what NP-Edit never does."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator

from vlmedit.config import SFTConfig
from vlmedit.data.world import paired_batch
from vlmedit.flow import flow_matching_loss, logit_normal_time
from vlmedit.networks.dit import DiT
from vlmedit.training.engine import EMA, Optimizer, Run, Step


def train_sft(config: SFTConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per update; the averaged student is saved to `out/model` at the end."""
    run = Run(config, accelerator)
    student = DiT.from_pretrained(config.student).to(run.device)
    optimizer, ema = Optimizer(student, config), EMA(student, config.ema)
    run.register("model", student, optimizer, ema)
    for index in run.steps():
        batch = paired_batch(config.batch, config.side, *run.key(index)).to(run.device)
        t = logit_normal_time(config.batch, config.time_shift, run.device)
        eps = torch.randn_like(batch.target)
        with run.accelerator.autocast():
            velocity = lambda x, time: student(x, time, batch.instruction, batch.reference)
            loss = flow_matching_loss(velocity, batch.target, t, eps).mean()
        loss.backward()
        norm, fine = optimizer.step(index, run.accelerator)
        ema.update(student, index)
        run.metrics.update(loss=loss.item(), gradient_norm=norm, skipped=float(not fine), calls=config.batch)
        yield run.done(index)
    student.load_state_dict(ema.shadow)
    if run.accelerator.is_main_process:
        student.save_pretrained(run.folder / "model")
