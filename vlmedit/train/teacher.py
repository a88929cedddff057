"""Stage 1: the text-to-image teacher, by flow matching on captioned pictures [arXiv:2209.03003].

Deviates from a plain recipe: x0-prediction inside the network (models/dit.py), loss in v.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator

from vlmedit.data import TEXT_LENGTH, captioned_batch
from vlmedit.flow import flow_matching_loss, logit_normal_time
from vlmedit.models.dit import DiT
from vlmedit.models.text import build_tokenizer
from vlmedit.train.config import TeacherConfig
from vlmedit.train.engine import EMA, Optimizer, Run, Step


def drop_text(ids: torch.Tensor, share: float) -> torch.Tensor:
    """Empty a share of the texts (all padding), for guidance."""
    keep = torch.rand(len(ids), 1, device=ids.device) >= share
    return ids * keep


def train_teacher(config: TeacherConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per update; the averaged model is saved to `out/model` at the end."""
    run = Run(config, accelerator)
    torch.manual_seed(config.seed)
    model = DiT(side=config.side, vocab_size=len(build_tokenizer()), text_length=TEXT_LENGTH).to(run.device)
    optimizer, ema = Optimizer(model, config), EMA(model, config.ema)
    run.register("model", model, optimizer, ema)
    for index in run.steps():
        batch = captioned_batch(config.batch, config.side, *run.key(index)).to(run.device)
        text = drop_text(batch.caption, config.text_dropout)
        t = logit_normal_time(config.batch, config.time_shift, run.device)
        eps = torch.randn_like(batch.image)
        with run.accelerator.autocast():
            loss = flow_matching_loss(lambda x, t: model(x, t, text), batch.image, t, eps).mean()
        loss.backward()
        norm, fine = optimizer.step(index, run.accelerator)
        ema.update(model, index)
        run.metrics.update(loss=loss.item(), gradient_norm=norm, skipped=float(not fine))
        yield run.done(index)
    model.load_state_dict(ema.shadow)
    if run.accelerator.is_main_process:
        model.save_pretrained(run.folder / "model")
