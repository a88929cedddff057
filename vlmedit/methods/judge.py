"""Stage 2: the judge's schooling, with adversarial perturbations of the output picture.

A robust classifier's input gradient points along real changes of the picture; a plain one's does not, and a student
that climbs it hacks the judge (papers/log.md). So from `attack_from` on, most of each batch is perturbed by a few
steps of L2 gradient ascent on the judge's own loss [arXiv:1706.06083].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from vlmedit.config import TrainConfig
from vlmedit.data.batches import Lesson
from vlmedit.data.judge_lessons import lesson
from vlmedit.data.world import WorldData
from vlmedit.equations.adversarial import attack, yes_no_losses
from vlmedit.flow import few_step_times, interpolate, sample, to_x0
from vlmedit.methods._base import Base
from vlmedit.networks.dit import DiT
from vlmedit.networks.judge import JudgeConfig as ModelConfig
from vlmedit.networks.judge import JudgeModel
from vlmedit.protocols import Phase, Trained
from vlmedit.training.run import Step, begin
from vlmedit.training.trainer import train
from vlmedit.world.tokenizer import build_tokenizer

JUDGE_SIZES = {
    "small": dict(width=64, conv=32, vision_layers=1, text_layers=2),
    "medium": dict(width=128, conv=64, vision_layers=2, text_layers=3),
    "large": dict(width=192, conv=96, vision_layers=3, text_layers=4),
}


@dataclass(frozen=True)
class JudgeConfig(TrainConfig):
    """The judge's schooling, adversarial from `attack_from` on [X: miniature's finding that unlocked the rest]."""

    out: str = "runs/judge"
    steps: int = 3000
    batch: int = 48  # pairs; each carries up to seven questions and a caption
    lr: float = 1.5e-3
    size: str = "medium"  # small, medium or large: see JUDGE_SIZES
    attack_from: int = 1000  # updates on clean inputs first
    attack_share: float = 0.75  # share of each batch that is attacked
    attack_radius: float = 3.5  # L2, [-1, 1] pixel units, drawn uniformly up to it
    attack_steps: int = 2
    caption_weight: float = 0.3
    start: str | None = None  # weights to go on from; None is random
    softener: str | None = "runs/teacher/model"  # redraws some of the outputs as a student would; None is off
    students: tuple[str, ...] = ()  # earlier students, whose edits become lessons: what they bribe a judge with
    ground_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        self.check_choices(size=JUDGE_SIZES)

    @classmethod
    def tiers(cls):
        return {**super().tiers(), "smoke": dict(steps=2, batch=4, warmup=1, save_every=1, size="small", attack_from=1, softener=None), "gpu": dict(side=64, batch=256, steps=20_000, size="large")}


@torch.no_grad()  # a generator's drawing is data here
def soften(teacher: DiT, pictures: Tensor, captions: Tensor) -> Tensor:
    """Redraw pictures (B, 3, S, S) in one or two calls of the teacher from partly noised ones [SDEdit, arXiv:2108.01073]: soft,
    and now and then another thing, as a few-step student's pictures are."""
    home, device = pictures.device, teacher.device
    drawn, text = pictures.to(device), teacher.encode_text(captions.to(device))
    uniform = lambda low, high: low + (high - low) * torch.rand(len(drawn), device=device)
    t = uniform(0.15, 0.9)
    for again in (torch.ones(len(drawn), device=device), uniform(0, 2).floor()):
        x = interpolate(drawn, torch.randn_like(drawn), t)
        drawn = torch.where(again.view(-1, 1, 1, 1) > 0, to_x0(x, teacher(x, t, text), t).float(), drawn)
        t = t * uniform(0.2, 0.9)
    return drawn.to(home)


@torch.no_grad()
def practise(students: Sequence[DiT], references: Tensor, instructions: Tensor) -> Tensor:
    """One of earlier students edits the references (B, 3, S, S) as instructed (B, L), in one, two or four calls. What it has learnt to
    please a judge with becomes a lesson: the marks that prove nothing, as adversarial negatives."""
    student = students[int(torch.randint(len(students), ()))]
    given, text = references.to(student.device), student.encode_text(instructions.to(student.device))
    steps = (1, 2, 4)[int(torch.randint(3, ()))]
    noise = torch.randn_like(given)
    return sample(lambda x, t: student(x, t, text, given), noise, few_step_times(steps), "renoise").float().to(references.device)


def build_judge(size: str, side: int) -> JudgeModel:
    tokenizer = build_tokenizer()
    return JudgeModel(ModelConfig(side=side, vocab_size=len(tokenizer), text_length=40, **JUDGE_SIZES[size]))


class JudgeSchool(Base):
    """Questions, captions and patches of a lesson, its output pictures attacked from `attack_from` on."""

    batch, result = Lesson, "judge"

    def __init__(self, config: JudgeConfig, judge: JudgeModel):
        super().__init__({"judge": Trained(judge, ema=config.ema)})
        self.config, self.judge = config, judge

    def backward(self, phase: Phase, batch: Lesson, memory: dict, index: int) -> dict[str, float | int]:
        c, judge = self.config, self.judge
        output = self.attacked(batch, index) if index >= c.attack_from else batch.output
        losses, right, together, alone = yes_no_losses(judge, batch, output)
        spoken = judge(batch.caption, image_features=alone).logits.float()
        caption_loss = F.cross_entropy(spoken.flatten(0, 1), batch.caption_labels.flatten(), ignore_index=-100)
        ground_loss = judge.ground_loss(together, batch.ground_reference, batch.ground_output)
        ground_loss = ground_loss + judge.ground_loss(alone, None, batch.ground_output)
        loss = losses.mean() + c.caption_weight * caption_loss + c.ground_weight * ground_loss
        loss.backward()
        metrics = dict(loss=losses.mean(), caption_loss=caption_loss, ground_loss=ground_loss, accuracy=right.mean())
        return {name: value.item() for name, value in metrics.items()}

    def attacked(self, batch: Lesson, index: int) -> Tensor:
        """The output pictures, a share of them attacked, within a radius that grows with the updates."""
        c, rows = self.config, len(batch.output)
        ramp = min(1.0, (index - c.attack_from + 1) / max(1, c.attack_from))
        chosen = torch.rand(rows, device=batch.output.device) < c.attack_share
        radius = c.attack_radius * ramp * torch.rand(rows, device=batch.output.device) * chosen
        return attack(self.judge, batch, radius, c.attack_steps)

    def save(self, state: dict[str, Tensor], folder: Path) -> None:
        super().save(state, folder)
        build_tokenizer().save_pretrained(folder)


def train_judge(config: JudgeConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per update; the averaged judge and its tokenizer are saved to `out/model` at the end."""
    device = (accelerator := begin(config, accelerator)).device
    torch.manual_seed(config.seed)  # of the initial weights
    judge = (JudgeModel.from_pretrained(config.start) if config.start else build_judge(config.size, config.side)).to(device)
    load = lambda folder: DiT.from_pretrained(folder).to(device).eval()
    softener = partial(soften, load(config.softener)) if config.softener else None
    editor = partial(practise, [load(folder) for folder in config.students]) if config.students else None
    draw = lambda size, *key: lesson(size, config.side, *key, softener=softener, editor=editor)
    yield from train(JudgeSchool(config, judge), WorldData(config, {Lesson: draw}), config, accelerator)
