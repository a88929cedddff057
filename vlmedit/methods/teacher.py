"""Stage 1: the text-to-image teacher, by flow matching on captioned pictures [arXiv:2209.03003].

Deviates from a plain recipe: x0-prediction inside the network (models/dit.py), loss in v; a head halfway says what each
patch will show, which teaches the words sooner (as REPA [arXiv:2410.06940] does with features of a frozen encoder).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator

from vlmedit.config import TeacherConfig
from vlmedit.data.batches import TEXT_LENGTH
from vlmedit.data.world import captioned_batch
from vlmedit.flow import interpolate, logit_normal_time, velocity_target
from vlmedit.networks.dit import DiT
from vlmedit.networks.judge import ground_loss
from vlmedit.training.engine import EMA, Optimizer, Run, Step
from vlmedit.world.scene import GROUND_CLASSES
from vlmedit.world.tokenizer import build_tokenizer


def drop_text(ids: torch.Tensor, share: float) -> torch.Tensor:
    """Empty a share of the texts (all padding), for guidance."""
    keep = torch.rand(len(ids), 1, device=ids.device) >= share
    return ids * keep


def train_teacher(config: TeacherConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per update; the averaged model is saved to `out/model` at the end."""
    run = Run(config, accelerator)
    torch.manual_seed(config.seed)
    fresh = lambda: DiT(side=config.side, vocab_size=len(build_tokenizer()), text_length=TEXT_LENGTH, ground_classes=GROUND_CLASSES)
    model = (DiT.from_pretrained(config.start) if config.start else fresh()).to(run.device)
    optimizer, ema = Optimizer(model, config), EMA(model, config.ema)
    run.register("model", model, optimizer, ema)
    for index in run.steps():
        batch = captioned_batch(config.batch, config.side, *run.key(index)).to(run.device)
        text = drop_text(batch.caption, config.text_dropout)
        t = logit_normal_time(config.batch, config.time_shift, run.device)
        eps = torch.randn_like(batch.image)
        with run.accelerator.autocast():
            v, seen = model(interpolate(batch.image, eps, t), t, text, with_ground=True)
            loss = (v - velocity_target(batch.image, eps)).square().mean()
            grounding = ground_loss(seen, batch.ground)
        (loss + config.ground_weight * grounding).backward()
        norm, fine = optimizer.step(index, run.accelerator)
        ema.update(model, index)
        run.metrics.update(loss=loss.item(), ground_loss=grounding.item(), gradient_norm=norm, skipped=float(not fine))
        yield run.done(index)
    model.load_state_dict(ema.shadow)
    if run.accelerator.is_main_process:
        model.save_pretrained(run.folder / "model")
