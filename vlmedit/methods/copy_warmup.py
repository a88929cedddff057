"""Stage 3: the copy warm-up. Flow matching whose target is the reference itself, so that training starts from identity
[arXiv:2510.14978, Sec. 4; npedit zimage_instruct_refcopy.yaml].

Deviates from the released recipe: half the texts are instructions, half the reference's caption (there: captions only); and
before copying, the text encoder learns to read instructions, words alone: every token state must tell the edit type and the
words of each slot. A real backbone's text encoder has read before; the miniature's has seen captions only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from vlmedit.config import WarmupConfig
from vlmedit.data.world import SLOTS, reading_batch, unpaired_batch
from vlmedit.flow import flow_matching_loss, logit_normal_time
from vlmedit.methods.teacher import drop_text
from vlmedit.networks.dit import DiT
from vlmedit.networks.text import TextEncoder
from vlmedit.training.engine import EMA, Optimizer, Run, Step


def reading_loss(encoder: TextEncoder, heads: nn.Linear, ids: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every slot from every token state; labels (B, slots)."""
    states = encoder(ids)  # (B, L, d)
    parts = heads(states).float().split([len(words) + 1 for words in SLOTS.values()], -1)
    wanted = labels[:, None].expand(-1, states.shape[1], -1)
    return torch.stack([F.cross_entropy(p.flatten(0, 1), wanted[..., i].flatten()) for i, p in enumerate(parts)]).mean()


def train_warmup(config: WarmupConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per update; the averaged student is saved to `out/model` at the end."""
    run = Run(config, accelerator)
    torch.manual_seed(config.seed)  # of the heads' initial weights
    student = DiT.from_pretrained(config.teacher).to(run.device)
    optimizer, ema = Optimizer(student, config), EMA(student, config.ema)
    heads = nn.Linear(student.config.width, sum(len(words) + 1 for words in SLOTS.values())).to(run.device)
    heads_optimizer = Optimizer(heads, config)
    run.register("model", student, optimizer, ema)
    run.register("heads", heads, heads_optimizer)
    for index in run.steps():
        if index < config.reading_steps:
            ids, labels = (part.to(run.device) for part in reading_batch(config.reading_batch, *run.key(index)))
            with run.accelerator.autocast():
                loss = reading_loss(student.text, heads, ids, labels)
            loss.backward()
            norm, fine = optimizer.step(index, run.accelerator)
            heads_optimizer.step(index, run.accelerator)
            ema.update(student, index)
            run.metrics.update(reading_loss=loss.item(), gradient_norm=norm, skipped=float(not fine))
            yield run.done(index)
            continue
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
