"""The rival that NP-Edit argues against: supervised editing on synthetic pairs, made by a generator and filtered by a judge.

    D = {(y, c, x) : x = maker(y; source caption, target caption), P(yes | y, x, c) > threshold for both questions}
    L = E |v_theta(x_t, t, y, c) - (eps - x)|^2  over D                 [InstructPix2Pix, arXiv:2211.09800; filtered by a
                                                                         VLM: Diffusion Self-Distillation, arXiv:2411.18616]

Makers, all of them the teacher without training (training_free.py): `flowedit`, `inversion`, `sdedit` change a reference; `twins` draws
both pictures from one noise, one under each caption (InstructPix2Pix's pairs, without its shared attention). Each update makes some
pairs, adds those that the judge likes to a pool, and trains on a batch from the pool. No target of the world is ever seen: the requests
are those of the no-pair path, and the pool's targets are the teacher's own pictures.

Deviates: pairs are made while training, so that the first updates see few of them and a run is as long as its number of updates; a
request that nothing fits is simply lost; several processes have a pool each, and the first one's is saved. Where nothing is to be done
the reference itself is the pair. Shapes: pictures (B, 3, S, S).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmedit.config import SyntheticConfig
from vlmedit.data.batches import TEXT_LENGTH, UnpairedBatch
from vlmedit.data.world import unpaired_batch
from vlmedit.equations.judge_loss import judge_loss
from vlmedit.equations.training_free import EDITORS, calls, guided
from vlmedit.flow import few_step_times, flow_matching_loss, logit_normal_time, sample
from vlmedit.networks.dit import DiT
from vlmedit.networks.judge import JudgeModel
from vlmedit.training.engine import EMA, Optimizer, Run, Step


class Pool(nn.Module):
    """The newest pairs, up to `capacity`, in eight bits: part of a checkpoint, so that a resumed run trains on the same ones."""

    def __init__(self, capacity: int, side: int):
        super().__init__()
        empty = torch.zeros(capacity, 3, side, side, dtype=torch.uint8)
        self.register_buffer("reference", empty)
        self.register_buffer("target", empty.clone())
        self.register_buffer("instruction", torch.zeros(capacity, TEXT_LENGTH, dtype=torch.long))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))  # pairs added so far

    def __len__(self) -> int:
        return min(int(self.count), len(self.target))

    def add(self, reference: Tensor, instruction: Tensor, target: Tensor) -> None:
        rows = (torch.arange(len(target), device=self.count.device) + self.count) % len(self.target)
        self.reference[rows], self.target[rows], self.instruction[rows] = to_bytes(reference), to_bytes(target), instruction
        self.count += len(target)

    def draw(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """References, instructions and targets, with replacement."""
        rows = torch.randint(len(self), (batch,)).to(self.count.device)
        return from_bytes(self.reference[rows]), self.instruction[rows], from_bytes(self.target[rows])


def to_bytes(pictures: Tensor) -> Tensor:
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_bytes(pictures: Tensor) -> Tensor:
    return pictures.float() / 127.5 - 1


@torch.no_grad()
def make_pairs(teacher: DiT, batch: UnpairedBatch, config: SyntheticConfig) -> tuple[Tensor, Tensor]:
    """References and targets. Twins bring references of their own; requests where nothing is to be done keep theirs as the target."""
    source, target = guided(teacher, batch.reference_caption), guided(teacher, batch.target_caption, config.guidance)
    if config.maker == "twins":
        noise, times = torch.randn_like(batch.reference), few_step_times(config.maker_steps)
        reference, made = (sample(guided(teacher, ids, config.guidance), noise, times).clamp(-1, 1) for ids in (batch.reference_caption, batch.target_caption))
    else:
        reference = batch.reference
        made = EDITORS[config.maker](source, target, reference, config.maker_start, config.maker_steps).clamp(-1, 1)
    return reference, torch.where(batch.nothing.view(-1, 1, 1, 1) > 0, reference, made)


@torch.no_grad()
def approved(judge: JudgeModel, batch: UnpairedBatch, reference: Tensor, target: Tensor, threshold: float) -> Tensor:
    """Which pairs (B,) the judge says yes to, both times."""
    _, right = judge_loss(judge, replace(batch, reference=reference), target)
    return (right > threshold).all(0)


def teacher_calls(config: SyntheticConfig) -> int:
    """Of the teacher on one picture, per update."""
    guided = 2 if config.guidance != 1 else 1
    each = 2 * guided * config.maker_steps if config.maker == "twins" else calls(config.maker, config.maker_steps, guidance=config.guidance)
    return config.candidates * each


def train_synthetic(config: SyntheticConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per update; the averaged student is saved to `out/model` and the pool to `out/pairs.safetensors` at the end. Metrics:
    `kept`, the share of this update's pairs that the judge liked, `pairs` in the pool, `teacher_calls`. An update before the first
    pair changes nothing."""
    run = Run(config, accelerator)
    load = lambda folder: DiT.from_pretrained(folder).to(run.device)
    student, teacher = load(config.student), load(config.teacher).requires_grad_(False).eval()
    judge = JudgeModel.from_pretrained(config.judge).to(run.device).requires_grad_(False).eval()
    optimizer, ema, pool = Optimizer(student, config), EMA(student, config.ema), Pool(config.capacity, config.side).to(run.device)
    run.register("model", student, optimizer, ema)
    run.register("pairs", pool)
    for index in run.steps():
        batch = unpaired_batch(config.candidates, config.side, *run.key(index), pool=config.pool, settled=config.settled).to(run.device)
        with run.accelerator.autocast():
            reference, made = make_pairs(teacher, batch, config)
            fine = approved(judge, batch, reference, made, config.threshold)
        pool.add(reference[fine], batch.instruction[fine], made[fine])
        run.metrics.update(kept=fine.float().mean().item(), pairs=len(pool), teacher_calls=teacher_calls(config), calls=0)
        if len(pool):
            reference, instruction, target = pool.draw(config.batch)
            t, eps = logit_normal_time(config.batch, config.time_shift, run.device), torch.randn_like(target)
            with run.accelerator.autocast():
                loss = flow_matching_loss(lambda x, time: student(x, time, instruction, reference), target, t, eps).mean()
            loss.backward()
            norm, whole = optimizer.step(index, run.accelerator)
            ema.update(student, index)
            run.metrics.update(loss=loss.item(), gradient_norm=norm, skipped=float(not whole), calls=config.batch)
            yield run.done(index, reference=reference[:8], output=target[:8])
        else:
            yield run.done(index)
    student.load_state_dict(ema.shadow)
    if run.accelerator.is_main_process:
        student.save_pretrained(run.folder / "model")
        held = {name: getattr(pool, name)[: len(pool)].contiguous() for name in ("reference", "instruction", "target")}
        save_file(held, run.folder / "pairs.safetensors")
