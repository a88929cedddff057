"""The judge's adversary: pictures perturbed within a small ball so that its answers get worse.

A robust classifier's input gradient points along real changes of the picture; a plain one's does not, and a student
that climbs it hacks the judge. So the judge is schooled on the worst perturbation of each picture x that a few steps
find:

    delta <- P_r(delta + alpha g / |g|),  g = d loss / d delta,  alpha = 1.5 r / steps              [arXiv:1706.06083]

from a random start within the ball; P_r is the projection onto the L2 ball of radius r.
Shapes: P pairs of pictures (P, 3, S, S) in [-1, 1]; radius (P,). Deviates from the paper: L2 in place of the largest
change of a pixel, so the step is the gradient's direction and not its sign; one radius per picture.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmedit.data.batches import Lesson
from vlmedit.equations.search import size


class TokenJudge(Protocol):
    """A judge whose visual tokens may be shared by several questions."""

    config: Any  # names the two answer tokens: yes_token_id, no_token_id

    def get_image_features(self, pictures: Tensor) -> Tensor: ...  # (N, 1 or 2, 3, S, S) -> (N, T, D)

    def answer_logits(self, ids: Tensor, *, image_features: Tensor) -> Tensor: ...  # (N, L), (N, T, D) -> (N, V)


def answer_ids(answers: Tensor, yes: int, no: int) -> Tensor:
    """The token of each answer: `yes` for 1, `no` for 0, -100 where nothing was asked."""
    return torch.where(answers < 0, -100, torch.where(answers > 0, yes, no))


def yes_no_losses(judge: TokenJudge, work: Lesson, output: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy of every yes/no answer (rows,), whether it was right (rows,), and the visual tokens of the pair and
    of the output alone."""
    yes, no = judge.config.yes_token_id, judge.config.no_token_id
    together = judge.get_image_features(torch.stack((work.reference, output), 1))
    alone = judge.get_image_features(output[:, None])
    rows = [(work.questions, work.answers, together), (work.single_questions, work.single_answers, alone)]
    losses, right = [], []
    for ids, answers, features in rows:
        asked = answers >= 0
        owner = torch.arange(len(answers), device=answers.device) // (len(answers) // len(output))
        logits = judge.answer_logits(ids[asked], image_features=features[owner[asked]])
        losses.append(F.cross_entropy(logits, answer_ids(answers[asked], yes, no), reduction="none"))
        margin = logits[:, yes] - logits[:, no]
        right.append(((margin > 0) == (answers[asked] > 0)).detach())
    return torch.cat(losses), torch.cat(right).float(), together, alone


def attack(judge: TokenJudge, work: Lesson, radius: Tensor, steps: int) -> Tensor:
    """The output pictures after `steps` of normalized L2 gradient ascent on the judge's loss, within `radius` (P,)."""
    reach = radius.view(-1, 1, 1, 1)
    start = torch.randn_like(work.output)
    delta = start / size(start) * reach * torch.rand_like(reach)
    for _ in range(steps):
        delta.requires_grad_(True)
        loss = yes_no_losses(judge, work, work.output + delta)[0].sum()
        (gradient,) = torch.autograd.grad(loss, delta)
        gradient = gradient.float()
        delta = delta.detach() + gradient / size(gradient) * reach * (1.5 / steps)  # Eq. ascent
        delta = delta * (reach / size(delta)).clamp(max=1)
    return (work.output + delta).clamp(-1, 1).detach()
