"""Stage 3: the copy warm-up. Flow matching whose target is the reference itself, so that training starts from identity
[arXiv:2510.14978, Sec. 4; npedit zimage_instruct_refcopy.yaml].

Deviates from the released recipe: half the texts are instructions, half the reference's caption (there: captions only),
because the miniature's text encoder has not read instructions before.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator

from vlmedit.data import unpaired_batch
from vlmedit.flow import flow_matching_loss, logit_normal_time
from vlmedit.models.dit import DiT
from vlmedit.train.config import WarmupConfig
from vlmedit.train.engine import EMA, Optimizer, Run, Step
from vlmedit.train.teacher import drop_text


def train_warmup(config: WarmupConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per update; the averaged student is saved to `out/model` at the end."""
    run = Run(config, accelerator)
    student = DiT.from_pretrained(config.teacher).to(run.device)
    optimizer, ema = Optimizer(student, config), EMA(student, config.ema)
    run.register("model", student, optimizer, ema)
    for index in run.steps():
        batch = unpaired_batch(config.batch, config.side, *run.key(index)).to(run.device)
        as_instruction = torch.rand(config.batch, 1, device=run.device) < 0.5
        text = drop_text(torch.where(as_instruction, batch.instruction, batch.reference_caption), config.text_dropout)
        t = logit_normal_time(config.batch, config.time_shift, run.device)
        eps = torch.randn_like(batch.reference)
        with run.accelerator.autocast():
            velocity = lambda x, time: student(x, time, text, batch.reference)
            loss = flow_matching_loss(velocity, batch.reference, t, eps).mean()
        loss.backward()
        norm, fine = optimizer.step(index, run.accelerator)
        ema.update(student, index)
        run.metrics.update(loss=loss.item(), gradient_norm=norm, skipped=float(not fine))
        yield run.done(index)
    student.load_state_dict(ema.shadow)
    if run.accelerator.is_main_process:
        student.save_pretrained(run.folder / "model")
