"""The rival that NP-Edit argues against: supervised editing on synthetic pairs, made by a generator and filtered by a judge.

    D = {(y, c, x) : x = editor(y; source caption, target caption), P(yes | y, x, c) > threshold for both questions}
    L = E |v_theta(x_t, t, y, c) - (eps - x)|^2  over D                 [InstructPix2Pix, arXiv:2211.09800; filtered by a
                                                                         VLM: Diffusion Self-Distillation, arXiv:2411.18616]

Pair editors, all of them the teacher without training (training_free.py): `flowedit`, `inversion`, `sdedit` change a reference; `twins` draws
both pictures from one noise, one under each caption (InstructPix2Pix's pairs, without its shared attention). Each update makes some
pairs, adds those that the judge likes to a pool, and trains on a batch from the pool. No target of the world is ever seen: the requests
are those of the no-pair path, and the pool's targets are the teacher's own pictures.

Deviates: pairs are made while training, so that the first updates see few of them and a run is as long as its number of updates; a
request that nothing fits is simply lost; several processes have a pool each, and the first one's is saved. Where nothing is to be done
the reference itself is the pair. Shapes: pictures (B, 3, S, S).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmedit.data.batches import TEXT_LENGTH, PairedBatch, UnpairedBatch
from vlmedit.data.world import WorldData
from vlmedit.equations.judge_loss import judge_loss
from vlmedit.equations.training_free import EDITORS, calls, guided
from vlmedit.errors import ConfigError
from vlmedit.flow import few_step_times, sample
from vlmedit.methods._base import Base, load_dit
from vlmedit.methods.sft import SFTConfig, paired_loss
from vlmedit.networks.dit import DiT
from vlmedit.networks.judge import JudgeModel
from vlmedit.protocols import Phase, Trained
from vlmedit.training.run import Step, begin
from vlmedit.training.trainer import train

PAIR_EDITORS = ("twins", *EDITORS)


@dataclass(frozen=True)
class SyntheticPairsConfig(SFTConfig):
    """Paired training on the teacher's own pairs, those the judge says yes to [arXiv:2211.09800; arXiv:2411.18616]. Its own settings
    say how pairs are made; the rest is SFT's."""

    world = {"side": 32, "fulfilled_share": 0.2, "request_limit": None}  # as NPEditConfig's: the same requests

    out: str = "runs/synthetic_pairs"
    teacher: str = "runs/teacher/model"
    judge: str = "runs/judge/model"
    pair_editor: str = "flowedit"  # what makes a pair: see vlmedit/methods/synthetic_pairs.py
    pair_editor_start: float = 0.85  # time at which an editor leaves the reference; twins start at 1
    pair_editor_steps: int = 8
    guidance: float = 2.0  # of the target caption; InstructPix2Pix: 7.5
    candidates: int = 8  # pairs made per update
    threshold: float = 0.5  # P(yes) to both questions above which a pair is kept
    capacity: int = 2048  # pairs held, the newest; an update draws its batch from all of them

    def __post_init__(self):
        super().__post_init__()
        self.check_counts("candidates", "pair_editor_steps", "capacity")
        if not 0 < self.pair_editor_start <= 1:
            raise ConfigError(f"pair_editor_start is {self.pair_editor_start}; it is a time in (0, 1]")
        if not 0 <= self.threshold < 1:
            raise ConfigError(f"threshold is {self.threshold}; it is a probability in [0, 1)")
        self.check_choices(pair_editor=PAIR_EDITORS)

    @classmethod
    def tiers(cls):
        base = super().tiers()
        return {**base, "smoke": {**base["smoke"], "candidates": 2, "pair_editor_steps": 2, "capacity": 8}, "gpu": dict(side=64, batch=128, candidates=32)}


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

    def draw(self, batch: int) -> PairedBatch:
        """So many pairs, with replacement."""
        rows = torch.randint(len(self), (batch,)).to(self.count.device)
        return PairedBatch(from_bytes(self.reference[rows]), self.instruction[rows], from_bytes(self.target[rows]), ())


def to_bytes(pictures: Tensor) -> Tensor:
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_bytes(pictures: Tensor) -> Tensor:
    return pictures.float() / 127.5 - 1


@torch.no_grad()
def make_pairs(teacher: DiT, batch: UnpairedBatch, config: SyntheticPairsConfig) -> tuple[Tensor, Tensor]:
    """References and targets. Twins bring references of their own; requests where nothing is to be done keep theirs as the target."""
    source, target = guided(teacher, batch.reference_caption), guided(teacher, batch.target_caption, config.guidance)
    if config.pair_editor == "twins":
        noise, times = torch.randn_like(batch.reference), few_step_times(config.pair_editor_steps)
        reference, made = (sample(guided(teacher, ids, config.guidance), noise, times).clamp(-1, 1) for ids in (batch.reference_caption, batch.target_caption))
    else:
        reference = batch.reference
        made = EDITORS[config.pair_editor](source, target, reference, config.pair_editor_start, config.pair_editor_steps).clamp(-1, 1)
    return reference, torch.where(batch.nothing.view(-1, 1, 1, 1) > 0, reference, made)


@torch.no_grad()
def approved(judge: JudgeModel, batch: UnpairedBatch, reference: Tensor, target: Tensor, threshold: float) -> Tensor:
    """Which pairs (B,) the judge says yes to, both times."""
    _, right = judge_loss(judge, replace(batch, reference=reference), target)
    return (right > threshold).all(0)


def teacher_calls(config: SyntheticPairsConfig) -> int:
    """Of the teacher on one picture, per update."""
    guided = 2 if config.guidance != 1 else 1
    each = 2 * guided * config.pair_editor_steps if config.pair_editor == "twins" else calls(config.pair_editor, config.pair_editor_steps, guidance=config.guidance)
    return config.candidates * each


class SyntheticPairs(Base):
    """Pairs are made and those that the judge likes join the pool; then the student is trained on a batch from it, unless it is empty."""

    def __init__(self, config: SyntheticPairsConfig, student: DiT, teacher: DiT, judge: JudgeModel, pool: Pool):
        super().__init__({"student": Trained(student, ema=config.ema)}, {"teacher": teacher, "judge": judge}, kept={"pairs": pool})
        self.config, self.student, self.teacher, self.judge, self.pool = config, student, teacher, judge, pool

    def phases(self, index: int) -> Iterator[Phase]:
        yield Phase("make", batch=UnpairedBatch, size=self.config.candidates)
        if len(self.pool):
            yield Phase("student", ("student",))

    def backward(self, phase: Phase, batch: UnpairedBatch, memory: dict, index: int) -> dict[str, float | int]:
        c = self.config
        if phase.name == "make":
            reference, made = make_pairs(self.teacher, batch, c)
            fine = approved(self.judge, batch, reference, made, c.threshold)
            self.pool.add(reference[fine], batch.instruction[fine], made[fine])
            return {"kept": fine.float().mean().item(), "pairs": len(self.pool), "teacher_calls": teacher_calls(c), "calls": 0}
        memory["pairs"] = pairs = self.pool.draw(c.batch)
        loss = paired_loss(self.student, pairs, c.time_shift)
        loss.backward()
        return {"loss": loss.item(), "calls": c.batch}

    def pictures(self, batch: UnpairedBatch, memory: dict) -> dict[str, Tensor]:
        return {"reference": memory["pairs"].reference, "output": memory["pairs"].target} if "pairs" in memory else {}

    def save(self, state: dict[str, Tensor], folder: Path) -> None:
        """The student, and beside its folder the pool."""
        super().save(state, folder)
        held = {name: getattr(self.pool, name)[: len(self.pool)].contiguous() for name in ("reference", "instruction", "target")}
        save_file(held, folder.parent / "pairs.safetensors")


def train_synthetic_pairs(config: SyntheticPairsConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per update; the averaged student is saved to `out/model` and the pool to `out/pairs.safetensors` at the end. Metrics:
    `kept`, the share of this update's pairs that the judge liked, `pairs` in the pool, `teacher_calls`. An update before the first
    pair changes nothing."""
    device = (accelerator := begin(config, accelerator)).device
    judge = JudgeModel.from_pretrained(config.judge).to(device)
    pool = Pool(config.capacity, config.side).to(device)
    method = SyntheticPairs(config, load_dit(config.student, device), load_dit(config.teacher, device), judge, pool)
    yield from train(method, WorldData(config), config, accelerator)
