"""Requests in words, as ids: prompts, the judge's questions, and the batch that `NPEdit` takes.

Questions: the released templates in our words, one pair for removals and one for everything else
[npedit critic_models/prompts.py]; the judge of the world of shapes has been schooled on its own (`QUESTIONS`).
Shapes: pictures (B, 3, H, W) in [-1, 1]; ids (B, L), as `vlmedit.protocols.Prompts` makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vlmedit.data.batches import UnpairedBatch
from vlmedit.protocols import Prompts
from vlmedit.world.language import edit_question, identity_question, normalise, parse_instruction

ROLE = "You are a professional digital artist and an expert image editor."
EDIT = (
    "The second image is meant to be an edit of the first. The instruction was: {instruction}. Was it carried out in the second image? "
    "If the two images look the same because the edit failed, answer No. Answer Yes or No."
)
EDIT_REMOVE = "Does the image contain {thing}? Answer Yes or No."
IDENTITY = "Apart from what this instruction asks for, is the second image the same as the first in every respect: {instruction}? Answer Yes or No."
IDENTITY_REMOVE = "Ignoring whether {thing} is there, is the second image exactly the same as the first, layout included? Answer Yes or No."


class Asked(NamedTuple):
    """The judge's two questions about a request. The identity question is about both pictures, its right answer yes."""

    edit: str
    answer: bool  # what is right to the edit question
    pair: bool  # whether the edit question is about both pictures
    identity: str


@dataclass(frozen=True)
class Request:
    """One edit without its result: what a no-pair trainer may know of it."""

    instruction: str
    reference_caption: str  # what the reference shows
    target_caption: str  # what the edited picture would show
    type: str = "other"  # "remove" and "nothing" are treated apart
    thing: str | None = None  # what a removal removes

    def __post_init__(self):
        if self.type == "remove" and not self.thing:
            raise ValueError(f"the removal {self.instruction!r} names no thing; pass thing='a dog': the judge is asked whether it is still there")

    def questions(self) -> Asked:
        """Both questions in the released wording."""
        edit, identity = (EDIT_REMOVE, IDENTITY_REMOVE) if self.type == "remove" else (EDIT, IDENTITY)
        words = {"thing": self.thing, "instruction": self.instruction}
        pair = self.type != "remove"
        return Asked(f"{ROLE} {edit.format(**words)}", pair, pair, f"{ROLE} {identity.format(**words)}")


def shape_questions(request: Request) -> Asked:
    """As `Request.questions`, in the world's own words. Raises UnknownInstruction for an instruction that is not of its
    grammar."""
    text = normalise(request.instruction)
    edit = parse_instruction(text)
    asked = edit_question(edit, text)
    return Asked(asked.text, asked.answer, asked.pair, identity_question(edit, text).text)


QUESTIONS: dict[str, Callable[[Request], Asked]] = {"released": Request.questions, "shapes": shape_questions}


def batch_of(requests: Sequence[Request], reference: Tensor, prompts: Prompts, questions: Prompts, wording: str = "released") -> UnpairedBatch:
    """These requests of these pictures. A table among `prompts` grows by instructions and captions, one among `questions` by the judge's in a
    `wording` of `QUESTIONS`.
    Raises ValueError unless there is one picture per request."""
    if len(requests) != len(reference):
        raise ValueError(f"{len(requests)} requests of {len(reference)} pictures; there must be one picture each")
    asked = [QUESTIONS[wording](r) for r in requests]

    def truth(values: Iterable[bool]) -> Tensor:
        return torch.tensor([float(v) for v in values], device=reference.device)

    return UnpairedBatch(
        reference=reference,
        instruction=prompts.ids([r.instruction for r in requests]),
        reference_caption=prompts.ids([r.reference_caption for r in requests]),
        target_caption=prompts.ids([r.target_caption for r in requests]),
        edit_question=questions.ids([q.edit for q in asked]),
        edit_answer=truth(q.answer for q in asked),
        edit_pair=truth(q.pair for q in asked),
        identity_question=questions.ids([q.identity for q in asked]),
        nothing=truth(r.type == "nothing" for r in requests),
        types=tuple(r.type for r in requests),
    )
