"""Who says whether an edit is right: what may stand in the single judge's place, by name (`NPEditConfig.reward`), and how he is asked.

A reward maps a panel, a batch of requests and the student's pictures x (with a graph) to a loss, least where the edit is right, and the
probability of the right answer per question.

* `judge`            the frozen VLM's two questions (judging.py); with `panel.others`, the mean of all judges' losses, which is a product
                     of experts; `wording` asks in other words, `augment` shows the pictures shifted and speckled, both alike
* `teacher`          no VLM for the edit: the teacher as classifier [Diffusion Classifier, arXiv:2303.16203],
                         m = scale E_{t,eps}[ |v - v_phi(x_t, t, c_source)|^2 - |v - v_phi(x_t, t, c_target)|^2 ],  p = sigmoid(m),
                     with the same t and eps under both captions; the VLM is asked about identity alone, if at all (`identity`)

Shapes: pictures (B, C, S, S); margins (B,). Deviates: Diffusion Classifier chooses among classes by the errors; here two captions are two
classes, and p is differentiated. Squared errors are means over pixels, times `scale` [X]: their sum would be a log-likelihood ratio of
thousands of nats, and p a step. Where both captions say the same (a move, nothing to be done), m is 0 and the reward has no opinion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmedit.data.batches import UnpairedBatch
from vlmedit.equations.judge_loss import judge_loss, yes_no_loss
from vlmedit.flow import interpolate, velocity_target
from vlmedit.networks.judge import JudgeModel
from vlmedit.world.tokenizer import PAD, build_tokenizer

LEVELS = (0.2, 0.8)  # of the noise under which the teacher compares two captions
SHIFT = 2  # pixels by which an augmented picture may move, each way
SPECKLE = 0.05  # standard deviation of its noise, in [-1, 1] pixel units

# Questions about both pictures in other words: what stands before the instruction. The first are those of the judge's schooling.
WORDINGS = {
    "schooled": ("was this done :", "is the rest the same :"),
    "short": ("done :", "the rest :"),
    "turned": ("is this done in the picture :", "is all the rest the same in the picture :"),
    "bare": ("", "the same :"),
}


# the teacher as a judge


def denoising_error(teacher: nn.Module, x: Tensor, text: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Mean |v - v_phi(x_t, t, text)|^2 per picture, (B,), with a graph back to x."""
    v = teacher(interpolate(x, eps, t), t, text)
    return (velocity_target(x, eps) - v).square().flatten(1).mean(1)


@dataclass(frozen=True)
class TeacherJudge:
    """Which of two captions does the teacher find easier to denoise a picture under?"""

    teacher: nn.Module
    draws: int = 2  # levels and noises per picture
    scale: float = 50.0

    def margin(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """m (B,) of pictures x for the captions `target` against `source` (B, L) ids; positive: rather the target. Levels are
        stratified over `LEVELS`; noise comes from torch's global generator."""
        low, high = LEVELS
        total = torch.zeros(len(x), device=x.device)
        for k in range(self.draws):
            t = low + (high - low) * (k + torch.rand(len(x), device=x.device)) / self.draws
            eps = torch.randn_like(x)
            errors = [denoising_error(self.teacher, x, text, t, eps) for text in (source, target)]
            total = total + errors[0] - errors[1]
        return self.scale * total / self.draws  # Eq. teacher

    def loss(self, x: Tensor, batch: UnpairedBatch, gain: float = 1.0) -> tuple[Tensor, Tensor]:
        """-log p per request, (B,), and p."""
        margin = self.margin(x, batch.reference_caption, batch.target_caption)
        return yes_no_loss(margin, torch.ones_like(margin), gain), margin.sigmoid().detach()


# how a judge is asked


def ids_of(words: str) -> list[int]:
    return build_tokenizer()(words)["input_ids"]


def rephrased(question: Tensor, old: str, new: str) -> Tensor:
    """Questions (B, L) ids that begin with the words `old`, beginning with `new` instead; others as they are. Raises ValueError where the
    new question has no room."""
    before, after, pad = ids_of(old), ids_of(new), build_tokenizer().convert_tokens_to_ids(PAD)
    rows = []
    for row in question.tolist():
        words = [i for i in row if i != pad]
        words = after + words[len(before) :] if words[: len(before)] == before else words
        if len(words) > question.shape[1]:
            raise ValueError(f"a question of {len(words)} words, at most {question.shape[1]} fit; take a shorter wording than {new!r}")
        rows.append(words + [pad] * (question.shape[1] - len(words)))
    return torch.tensor(rows, device=question.device)


def reworded(batch: UnpairedBatch, wording: str) -> UnpairedBatch:
    """The same requests, both pairwise questions asked in other words. Raises ValueError for an unknown wording."""
    if wording not in WORDINGS:
        raise ValueError(f"unknown wording {wording!r}; known: {', '.join(WORDINGS)}")
    pairs = list(zip((batch.edit_question, batch.identity_question), WORDINGS["schooled"], WORDINGS[wording]))
    edit, identity = (rephrased(*pair) for pair in pairs)
    return replace(batch, edit_question=edit, identity_question=identity)


def moved(pictures: Tensor, dy: int, dx: int) -> Tensor:
    """All pictures shifted by whole pixels, edges repeated."""
    padded = F.pad(pictures, (SHIFT,) * 4, mode="replicate")
    side = pictures.shape[-1]
    return padded[..., SHIFT - dy : SHIFT - dy + side, SHIFT - dx : SHIFT - dx + side]


def augmented(reference: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Both pictures shifted alike, each with noise of its own: a perturbation that only pleases at one place does not survive it."""
    dy, dx = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
    return tuple(moved(p, dy, dx) + SPECKLE * torch.randn_like(p) for p in (reference, output))


# the registry


@dataclass(frozen=True)
class Panel:
    """Who may be asked, and how."""

    judge: JudgeModel
    teacher: nn.Module
    decode: Callable[[Tensor], Tensor]  # from what the student makes to what a judge sees
    others: tuple[JudgeModel, ...] = ()
    identity: bool = True
    answer_loss: str = "two_logits"
    wording: str = "schooled"
    augment: bool = False
    teacher_draws: int = 2
    teacher_scale: float = 50.0


def judges(panel: Panel, batch: UnpairedBatch, x: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    output = panel.decode(x)
    if panel.wording != "schooled":
        batch = reworded(batch, panel.wording)
    if panel.augment:
        reference, output = augmented(batch.reference, output)
        batch = replace(batch, reference=reference)
    found = [judge_loss(judge, batch, output, gain, panel.identity, panel.answer_loss) for judge in (panel.judge, *panel.others)]
    losses, right = zip(*found)
    return torch.stack(losses).mean(), torch.stack(right).mean(0)


def teacher(panel: Panel, batch: UnpairedBatch, x: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    edit, right = TeacherJudge(panel.teacher, panel.teacher_draws, panel.teacher_scale).loss(x, batch, gain)
    if not panel.identity:
        return edit.mean(), right[None]
    asked = replace(batch, edit_question=batch.identity_question, edit_answer=torch.ones_like(batch.edit_answer), edit_pair=torch.ones_like(batch.edit_pair))
    same, kept = judge_loss(panel.judge, asked, panel.decode(x), gain, identity=False, answer_loss=panel.answer_loss)
    return (edit.mean() + same) / 2, torch.cat((right[None], kept))


Reward = Callable[[Panel, UnpairedBatch, Tensor, float], tuple[Tensor, Tensor]]

REWARDS: dict[str, Reward] = {"judge": judges, "teacher": teacher}
