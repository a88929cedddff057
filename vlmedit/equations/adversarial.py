"""Adversarial lessons for a judge: gradient ascent on its own loss [arXiv:1706.06083]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmedit.data.judge_lessons import Lesson, answer_ids
from vlmedit.networks.judge import JudgeModel


def yes_no_losses(judge: JudgeModel, work: Lesson, output: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy of every yes/no answer (rows,), whether it was right (rows,), and the visual tokens of the pair and
    of the output alone."""
    together = judge.get_image_features(torch.stack((work.reference, output), 1))
    alone = judge.get_image_features(output[:, None])
    rows = [(work.questions, work.answers, together), (work.single_questions, work.single_answers, alone)]
    losses, right = [], []
    for ids, answers, features in rows:
        asked = answers >= 0
        owner = torch.arange(len(answers), device=answers.device) // (len(answers) // len(output))
        logits = judge.answer_logits(ids[asked], image_features=features[owner[asked]])
        target = answer_ids(answers[asked])
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        margin = logits[:, judge.config.yes_token_id] - logits[:, judge.config.no_token_id]
        right.append(((margin > 0) == (answers[asked] > 0)).detach())
    return torch.cat(losses), torch.cat(right).float(), together, alone


def attack(judge: JudgeModel, work: Lesson, radius: Tensor, steps: int) -> Tensor:
    """The output pictures after `steps` of normalized L2 gradient ascent on the judge's loss, within `radius` (P,)."""
    reach = radius.view(-1, 1, 1, 1)
    normed = lambda d: d / d.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
    delta = normed(torch.randn_like(work.output)) * reach * torch.rand_like(reach)
    for _ in range(steps):
        delta.requires_grad_(True)
        loss = yes_no_losses(judge, work, work.output + delta)[0].sum()
        (gradient,) = torch.autograd.grad(loss, delta)
        delta = delta.detach() + normed(gradient.float()) * reach * (1.5 / steps)
        delta = delta * (reach / delta.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)).clamp(max=1)
    return (work.output + delta).clamp(-1, 1).detach()
