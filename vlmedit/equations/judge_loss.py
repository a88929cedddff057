"""The judge's loss: how a yes becomes a gradient on pixels.

    p(a) = sigmoid(l_a - l_not_a),  L = - sum_j log p(a_j)  over the edit and the identity question   [arXiv:2510.14978, Eq. 4]
Only the two answer tokens are normalized; `answer_loss="vocabulary"` is the full cross-entropy the paper ablates. The logits are
multiplied by a gain that ramps from 0.1 to 1 (`temperature` in the released code), so the judge starts soft.

Shapes: margins and answers (N,); pictures (B, 3, S, S) in [-1, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmedit.data.batches import UnpairedBatch
from vlmedit.networks.judge import JudgeModel

ANSWER_LOSSES = ("two_logits", "vocabulary")


def yes_no_loss(margin: Tensor, answer: Tensor, gain: float = 1.0) -> Tensor:
    """-log p(answer) per row from the yes-no margin; answer 1 is yes, 0 is no."""
    return F.softplus(-gain * margin * (2 * answer - 1))  # Eq. E6, 4


def vocabulary_loss(logits: Tensor, answer: Tensor, yes: int, no: int, gain: float = 1.0) -> Tensor:
    """Cross-entropy of the answer token over the whole vocabulary, per row; logits (N, V)."""
    return F.cross_entropy(gain * logits, torch.where(answer > 0, yes, no), reduction="none")


def gain_ramp(step: int, ramp_steps: int) -> float:
    """min(1, 0.1 + 0.9 step / ramp_steps) [npedit critic.py]."""
    return min(1.0, 0.1 + 0.9 * step / ramp_steps) if ramp_steps else 1.0  # Eq. E7


def clamp_through(pictures: Tensor) -> Tensor:
    """Clamp to [-1, 1]; saturated pixels keep their gradient, which a plain clamp kills."""
    return pictures + (pictures.clamp(-1, 1) - pictures).detach()


def see(pictures: Tensor, side: int, straight_through: bool = True) -> Tensor:
    """Differentiable preprocessing: clamp to [-1, 1] and resize to the judge's side (bicubic, antialiased).
    With `straight_through`, the clamp is `clamp_through`."""
    clamped = clamp_through(pictures) if straight_through else pictures.clamp(-1, 1)
    if pictures.shape[-1] == side:
        return clamped
    return F.interpolate(clamped, size=(side, side), mode="bicubic", antialias=True)


def asked(batch: UnpairedBatch, output: Tensor, identity: bool = True) -> tuple[list[tuple[Tensor, ...]], Tensor, Tensor, Tensor]:
    """What a judge of separate pictures is asked: per question its one or two pictures, its number (N, 1), the right answer (N,) and
    the row of the batch it belongs to; edit questions first, then identity questions."""
    together = list(zip(batch.reference, output))  # each picture one tensor, so that it is encoded once
    images = [both if pair else both[1:] for both, pair in zip(together, batch.edit_pair > 0.5)]
    rows = torch.arange(len(output), device=output.device)
    if not identity:
        return images, batch.edit_question, batch.edit_answer, rows
    answers = torch.cat((batch.edit_answer, torch.ones_like(batch.edit_answer)))
    return images + together, torch.cat((batch.edit_question, batch.identity_question)), answers, torch.cat((rows, rows))


def answer_margins(judge: JudgeModel, batch: UnpairedBatch, output: Tensor, identity: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """logit(Yes) - logit(No) (N,) with the answers and rows of `answer_logits`, by the judge's two answer rows where it has them."""
    if isinstance(judge, JudgeModel):
        logits, answers, owners = answer_logits(judge, batch, output, identity)
        return logits[:, judge.config.yes_token_id] - logits[:, judge.config.no_token_id], answers, owners
    images, questions, answers, owners = asked(batch, output, identity)
    return judge.logit_margin(images, questions), answers, owners


def answer_logits(judge: JudgeModel, batch: UnpairedBatch, output: Tensor, identity: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Vocabulary logits (N, V) and right answers (N,) of the edit question, then the identity question, and the row of the
    batch each belongs to. One- and two-picture questions are mixed: removals ask about the output alone."""
    if not isinstance(judge, JudgeModel):  # one of vlmedit.real
        images, questions, answers, owners = asked(batch, output, identity)
        return judge.answer_logits(images, questions), answers, owners
    side = judge.config.side
    reference, output = see(batch.reference, side), see(output, side)
    together = judge.get_image_features(torch.stack((reference, output), 1))
    rows = torch.arange(len(output), device=output.device)
    features, ids, answers, owners = together, batch.edit_question, batch.edit_answer, rows
    alone = batch.edit_pair < 0.5
    if alone.any():
        features = features.index_copy(0, rows[alone], judge.get_image_features(output[alone][:, None]).to(features.dtype))
    if identity:
        features = torch.cat((features, together))
        ids = torch.cat((ids, batch.identity_question))
        answers = torch.cat((answers, torch.ones_like(batch.edit_answer)))
        owners = torch.cat((owners, rows))
    return judge.answer_logits(ids, image_features=features), answers, owners


def judge_loss(judge: JudgeModel, batch: UnpairedBatch, output: Tensor, gain: float = 1.0, identity: bool = True, answer_loss: str = "two_logits") -> tuple[Tensor, Tensor]:
    """Loss (mean over questions and batch) and the probability of the right answer per question, (2, B) or (1, B)."""
    if answer_loss not in ANSWER_LOSSES:
        raise ValueError(f"unknown answer loss {answer_loss!r}; known: {', '.join(ANSWER_LOSSES)}")
    if answer_loss == "vocabulary":
        logits, answers, _ = answer_logits(judge, batch, output, identity)
        yes, no = judge.config.yes_token_id, judge.config.no_token_id
        margin, losses = logits[:, yes] - logits[:, no], vocabulary_loss(logits, answers, yes, no, gain)
    else:
        margin, answers, _ = answer_margins(judge, batch, output, identity)
        losses = yes_no_loss(margin, answers, gain)
    right = (margin * (2 * answers - 1)).sigmoid().detach()
    return losses.mean(), right.unflatten(0, (-1, len(output)))
