"""What each trainer may see, as batches of tensors.

* `CaptionedBatch`: picture and caption, for the text-to-image teacher.
* `UnpairedBatch`: the no-pair path. A reference, an instruction, a target *caption*, and two questions: no field could
  hold a target image, and a test says so.
* `PairedBatch`: reference, instruction and exact target, for the paired rivals alone.
* `Lesson`: pairs of pictures, questions about them and the right answers, for the judge's school.

Shapes: pictures (B, 3, S, S) in [-1, 1]; texts (B, L) ids, of words or of rows in a table of encoded prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

TEXT_LENGTH = 24  # words of a caption, an instruction or a question, padded


class Batch:
    """Tensors, and batches within it, move with `.to(device)`; other fields stay."""

    def to(self, device):
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{name: v.to(device) if isinstance(v, Tensor | Batch) else v for name, v in held.items()})

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))


@dataclass(frozen=True)
class CaptionedBatch(Batch):
    image: Tensor  # (B, 3, S, S) in [-1, 1]
    caption: Tensor  # (B, L) ids
    ground: Tensor  # (B, (S / 4)^2, 3): what each patch shows, see `data.world.ground`


@dataclass(frozen=True)
class UnpairedBatch(Batch):
    reference: Tensor  # (B, 3, S, S) in [-1, 1]
    instruction: Tensor  # (B, L) ids
    reference_caption: Tensor  # (B, L) ids: what the reference shows
    target_caption: Tensor  # (B, L) ids: what the edited picture would show
    edit_question: Tensor  # (B, L) ids
    edit_answer: Tensor  # (B,) 1 where "yes" is right
    edit_pair: Tensor  # (B,) 1 where the question is about both pictures
    identity_question: Tensor  # (B, L) ids
    nothing: Tensor  # (B,) 1 where the instruction asks for no change
    types: tuple[str, ...]


@dataclass(frozen=True)
class PairedBatch(Batch):
    reference: Tensor  # (B, 3, S, S) in [-1, 1]
    instruction: Tensor  # (B, L) ids
    target: Tensor  # (B, 3, S, S): what the no-pair trainer never sees
    types: tuple[str, ...]


@dataclass(frozen=True)
class ReadingBatch(Batch):
    instruction: Tensor  # (B, L) ids
    labels: Tensor  # (B, slots) what each asks for: indices from 1, 0 where a slot is not named


@dataclass(frozen=True)
class Lesson(Batch):
    """P pairs with Q questions each (P * Q rows, pair-major), and S single-picture rows."""

    reference: Tensor  # (P, 3, S, S)
    output: Tensor  # (P, 3, S, S)
    questions: Tensor  # (P * 4, L) ids about both pictures; rows of removals' edit questions are in `single`
    answers: Tensor  # (P * 4,) 1 yes, 0 no, -1 not asked
    single_questions: Tensor  # (P * 3, L) ids about the output alone
    single_answers: Tensor  # (P * 3,)
    caption: Tensor  # (P, L) request and caption of the output
    caption_labels: Tensor  # (P, L) next tokens, -100 where not asked
    ground_reference: Tensor  # (P, (S / 4)^2, 3) shape, color, texture per patch, 0 nothing, -100 not asked
    ground_output: Tensor
    kinds: tuple[str, ...]
    types: tuple[str, ...]
