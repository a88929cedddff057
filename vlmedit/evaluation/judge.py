"""Measuring a judge: what it believes of an edit, and how often it is right on held-out lessons, clean or attacked.

Shapes: pictures (B, 3, S, S) in [-1, 1]; probabilities of the right answers (2, B), edit and identity question.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmedit.data.batches import TEXT_LENGTH
from vlmedit.data.judge_lessons import lesson
from vlmedit.data.world import HELD_OUT, Example
from vlmedit.equations.adversarial import attack, yes_no_losses
from vlmedit.equations.judge_loss import answer_logits
from vlmedit.networks.judge import JudgeModel
from vlmedit.world.language import edit_question, identity_question
from vlmedit.world.tokenizer import encode


@dataclass(frozen=True)
class _Questions:
    """What `judge_loss.answer_logits` reads of a batch."""

    reference: Tensor
    edit_question: Tensor
    edit_answer: Tensor
    edit_pair: Tensor
    identity_question: Tensor


def right_answers(judge: JudgeModel, examples: Sequence[Example], reference: Tensor, output: Tensor) -> Tensor:
    """The judge's probability of the right answer, (2, B), with its gradient by the output: edit and identity
    question."""
    device = judge.device
    questions = [edit_question(e.edit, e.instruction) for e in examples]
    identity = [identity_question(e.edit, e.instruction).text for e in examples]
    rows = _Questions(
        reference.to(device),
        encode([q.text for q in questions], TEXT_LENGTH).to(device),
        torch.tensor([float(q.answer) for q in questions], device=device),
        torch.tensor([float(q.pair) for q in questions], device=device),
        encode(identity, TEXT_LENGTH).to(device),
    )
    logits, answers, _ = answer_logits(judge, rows, output.to(device))
    margin = logits[:, judge.config.yes_token_id] - logits[:, judge.config.no_token_id]
    return (margin * (2 * answers - 1)).sigmoid().unflatten(0, (2, -1))


@torch.no_grad()
def ask_judge(judge: JudgeModel, examples: Sequence[Example], reference: Tensor, output: Tensor, batch: int = 128) -> Tensor:
    """The same without gradient for any number of edits, (2, N), on the CPU."""
    parts = [slice(i, i + batch) for i in range(0, len(examples), batch)]
    return torch.cat([right_answers(judge, examples[part], reference[part], output[part]).cpu() for part in parts], 1)


def evaluate_judge(judge: JudgeModel, pairs: int = 1024, seed: int = 0, radius: float = 0.0, attack_steps: int = 10, batch: int = 64) -> dict:
    """Accuracy per question on held-out lessons, clean or under L2 attack of `radius` ([-1, 1] pixel units)."""
    right = defaultdict(list)
    for b, first in enumerate(range(0, pairs, batch)):
        work = lesson(min(batch, pairs - first), judge.config.side, HELD_OUT, seed, b).to(judge.device)
        output = work.output
        if radius:
            output = attack(judge, work, torch.full((len(work),), radius, device=judge.device), attack_steps)
        with torch.no_grad():
            _, ok, _, _ = yes_no_losses(judge, work, output)
        asked = work.answers >= 0
        kinds = ["edit", "identity"] * (2 * len(work))
        names = [k for k, a in zip(kinds, asked.tolist()) if a] + ["presence"] * int((work.single_answers >= 0).sum())
        for name, value in zip(names, ok.tolist(), strict=True):
            right[name].append(value)
    return {**{k: sum(v) / len(v) for k, v in sorted(right.items())}, "pairs": pairs, "seed": seed, "radius": radius}
