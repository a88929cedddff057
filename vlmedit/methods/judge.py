"""Stage 2: the judge's schooling, with adversarial perturbations of the output picture.

A robust classifier's input gradient points along real changes of the picture; a plain one's does not, and a student
that climbs it hacks the judge (papers/log.md). So from `attack_from` on, most of each batch is perturbed by a few
steps of L2 gradient ascent on the judge's own loss [arXiv:1706.06083].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from vlmedit.config import JUDGE_SIZES, JudgeConfig
from vlmedit.data.judge_lessons import lesson
from vlmedit.equations.adversarial import attack, yes_no_losses
from vlmedit.flow import few_step_times, interpolate, sample, to_x0
from vlmedit.networks.dit import DiT
from vlmedit.networks.judge import JudgeConfig as ModelConfig
from vlmedit.networks.judge import JudgeModel
from vlmedit.training.engine import EMA, Optimizer, Run, Step
from vlmedit.world.tokenizer import build_tokenizer


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


def train_judge(config: JudgeConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per update; the averaged judge and its tokenizer are saved to `out/model` at the end."""
    run = Run(config, accelerator)
    torch.manual_seed(config.seed)
    judge = (JudgeModel.from_pretrained(config.start) if config.start else build_judge(config.size, config.side)).to(run.device)
    optimizer, ema = Optimizer(judge, config), EMA(judge, config.ema)
    run.register("model", judge, optimizer, ema)
    softener = partial(soften, DiT.from_pretrained(config.softener).to(run.device).eval()) if config.softener else None
    students = [DiT.from_pretrained(folder).to(run.device).eval() for folder in config.students]
    editor = partial(practise, students) if students else None
    for index in run.steps():
        with run.accelerator.autocast():
            work = lesson(config.batch, config.side, *run.key(index), softener=softener, editor=editor).to(run.device)
        output = work.output
        with run.accelerator.autocast():
            if index >= config.attack_from:
                ramp = min(1.0, (index - config.attack_from + 1) / max(1, config.attack_from))
                chosen = torch.rand(config.batch, device=run.device) < config.attack_share
                radius = config.attack_radius * ramp * torch.rand(config.batch, device=run.device) * chosen
                output = attack(judge, work, radius, config.attack_steps)
            losses, right, together, alone = yes_no_losses(judge, work, output)
            spoken = judge(work.caption, image_features=alone).logits.float()
            caption_loss = F.cross_entropy(spoken.flatten(0, 1), work.caption_labels.flatten(), ignore_index=-100)
            ground_loss = judge.ground_loss(together, work.ground_reference, work.ground_output)
            ground_loss = ground_loss + judge.ground_loss(alone, None, work.ground_output)
            loss = losses.mean() + config.caption_weight * caption_loss + config.ground_weight * ground_loss
        loss.backward()
        norm, fine = optimizer.step(index, run.accelerator)
        ema.update(judge, index)
        run.metrics.update(loss=losses.mean().item(), caption_loss=caption_loss.item(), ground_loss=ground_loss.item(), accuracy=right.mean().item(), gradient_norm=norm, skipped=float(not fine))
        yield run.done(index)
    judge.load_state_dict(ema.shadow)
    if run.accelerator.is_main_process:
        judge.save_pretrained(run.folder / "model")
        build_tokenizer().save_pretrained(run.folder / "model")
