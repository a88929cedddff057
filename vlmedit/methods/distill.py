"""The teacher distilled to few steps by DMD alone: text to image, no reference, no judge
[arXiv:2311.18828; multi-step as DMD2, arXiv:2405.14867].

Deviates from DMD2: no GAN term; each update unrolls one or two calls on the sampler's grid, as NP-Edit does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator

from vlmedit.config import DistillConfig
from vlmedit.data.world import captioned_batch
from vlmedit.equations.dmd import dmd_gradient, dmd_loss, dmd_scores, draw_dmd_time, fake_score_loss
from vlmedit.equations.unroll import draw_times, rollout
from vlmedit.networks.dit import DiT
from vlmedit.seeds import rng_for
from vlmedit.training.engine import EMA, Optimizer, Run, Step


def train_distill(config: DistillConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per update; the averaged few-step model is saved to `out/model` at the end."""
    run = Run(config, accelerator)
    load = lambda: DiT.from_pretrained(config.teacher).to(run.device)
    student, fake, teacher = load(), load(), load().requires_grad_(False).eval()
    optimizer, fake_optimizer, ema = Optimizer(student, config), Optimizer(fake, config, config.fake_lr), EMA(student, config.ema)
    run.register("model", student, optimizer, ema)
    run.register("fake", fake, fake_optimizer)
    for index in run.steps():
        text = captioned_batch(config.batch, config.side, *run.key(index)).caption.to(run.device)
        times = draw_times(rng_for("times", config.seed, index), "mixed", config.sampler_steps, config.sampler_shift)
        noise = torch.randn(config.batch, 3, config.side, config.side, device=run.device)
        with run.accelerator.autocast():
            states = student.encode_text(text)
            output = rollout(lambda x, t: student(x, t, states), noise, times).float()
            t = draw_dmd_time(config.batch, device=run.device)
            real, estimate = dmd_scores(output, text, teacher, fake, config.guidance, t, torch.randn_like(noise))
            loss = dmd_loss(output, dmd_gradient(output, real, estimate, config.dmd_norm))
        loss.backward()
        norm, fine = optimizer.step(index, run.accelerator)
        ema.update(student, index)
        for _ in range(config.fake_updates):
            t = torch.rand(config.batch, device=run.device).clamp(1e-3, 1 - 1e-3)
            with run.accelerator.autocast():
                fake_loss = fake_score_loss(fake, output, text, t, torch.randn_like(noise))
            fake_loss.backward()
            fake_optimizer.step(index, run.accelerator)
            run.metrics["fake_loss"] = fake_loss.item()
        run.metrics.update(gradient_norm=norm, skipped=float(not fine))
        yield run.done(index, output=output[:8])
    student.load_state_dict(ema.shadow)
    if run.accelerator.is_main_process:
        student.save_pretrained(run.folder / "model")
