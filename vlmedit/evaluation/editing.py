"""Measuring by the oracle: was the edit done, was the rest kept, is it still a picture, and does the judge merely think
so?

* success: the oracle reads the output as a scene in which the edit is done and everything else kept.
* keep-PSNR: dB between reference and output where the edit has no business (`oracle.keep_mask`).
* manifold-PSNR: dB to the render of the scene the oracle read.
* hacking gap: the judge's mean probability of the right answer over both questions, minus success.

Every figure is over held-out requests that no trainer draws (data.held_out).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmedit import flow
from vlmedit.data.batches import TEXT_LENGTH
from vlmedit.data.world import Example, from_example, held_out
from vlmedit.equations.search import SEARCHES, Loss, Query
from vlmedit.equations.training_free import EDITORS, guided
from vlmedit.evaluation.judge import ask_judge, right_answers
from vlmedit.evaluation.statistics import calibration_error
from vlmedit.networks.dit import DiT
from vlmedit.networks.judge import JudgeModel
from vlmedit.world.edits import EDIT_TYPES
from vlmedit.world.oracle import Verdict, judge_edit, keep_mask, parse, psnr
from vlmedit.world.render import render
from vlmedit.world.tokenizer import encode


@dataclass(frozen=True)
class Judged:
    """Outputs of a set of requests and what the oracle says of each."""

    examples: list[Example]
    reference: Tensor  # (N, 3, S, S)
    output: Tensor  # (N, 3, S, S)
    verdicts: list[Verdict]
    manifold_psnr: Tensor  # (N,)
    keep_psnr: Tensor  # (N,), nan where nothing must be kept

    @property
    def success(self) -> Tensor:
        return torch.tensor([float(v.success) for v in self.verdicts])


@torch.no_grad()
def edit_examples(
    student: DiT, examples: Sequence[Example], steps: int = 4, seed: int = 0, sampler: str = "renoise", shift: float = 1.0, batch: int = 64,
    search: str | None = None, judge: JudgeModel | None = None, **settings,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """References and outputs (N, 3, S, S) of a student on held-out requests; by a `search` (search.SEARCHES, with its
    settings) those that please `judge`. Raises ValueError for an unknown search or one without a judge."""
    if search is not None and search not in SEARCHES:
        raise ValueError(f"unknown search {search!r}; known: {', '.join(SEARCHES)}")
    if search is not None and judge is None:
        raise ValueError(f"search is {search!r}, and no judge says what pleases; pass one")
    side, device = student.config.side, next(student.parameters()).device
    references, outputs = [], []
    generator = torch.Generator().manual_seed(seed)
    for i in range(0, len(examples), batch):
        part = examples[i : i + batch]
        reference = render([e.scene for e in part], side).to(device)
        text = student.encode_text(encode([e.instruction for e in part], TEXT_LENGTH).to(device))

        def copies(k: int, part=part, reference=reference, text=text) -> tuple[Tensor, flow.Velocity, Loss]:
            asked, pictures, words = [e for e in part for _ in range(k)], reference.repeat_interleave(k, 0), text.repeat_interleave(k, 0)
            held = student.hold_reference(pictures, words)
            noise = torch.randn(pictures.shape, generator=generator).to(device)
            pleased = lambda x: right_answers(judge, asked, pictures, x.clamp(-1, 1)).clamp(min=1e-12).log().sum(0).to(device)
            return noise, lambda x, t: student(x, t, words, held), pleased

        times = flow.few_step_times(steps, shift)
        if search is None:
            noise, velocity, _ = copies(1)
            output = flow.sample(velocity, noise, times, sampler, generator)
        else:
            output = SEARCHES[search].run(Query(copies, times, sampler, generator), **settings)
        references.append(reference.cpu())
        outputs.append(output.clamp(-1, 1).cpu())
    return torch.cat(references), torch.cat(outputs)


@torch.no_grad()
def edit_by_captions(
    teacher: DiT, examples: Sequence[Example], editor: str, seed: int = 0, guidance: float = 2.0,
    source_guidance: float = 1.0, batch: int = 64, **settings,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """References and outputs (N, 3, S, S) of an editor without training (training_free.EDITORS, with its settings) on
    held-out requests. Raises ValueError for an unknown editor."""
    if editor not in EDITORS:
        raise ValueError(f"unknown editor {editor!r}; known: {', '.join(EDITORS)}")
    side, device, generator = teacher.config.side, next(teacher.parameters()).device, torch.Generator().manual_seed(seed)
    references, outputs = [], []
    for i in range(0, len(examples), batch):
        part = examples[i : i + batch]
        y = render([e.scene for e in part], side).to(device)
        requests = [from_example(e) for e in part]
        words = [r.reference_caption for r in requests], [r.target_caption for r in requests]
        ids = [encode(texts, TEXT_LENGTH).to(device) for texts in words]
        flows = [guided(teacher, i, w) for i, w in zip(ids, (source_guidance, guidance))]
        outputs.append(EDITORS[editor](*flows, y, generator=generator, **settings).clamp(-1, 1).cpu())
        references.append(y.cpu())
    return torch.cat(references), torch.cat(outputs)


def judge_by_oracle(examples: list[Example], reference: Tensor, output: Tensor) -> Judged:
    """The oracle's verdicts and PSNRs of outputs."""
    readings = parse(output)
    verdicts = [judge_edit(e.scene, r, e.edit) for e, r in zip(examples, readings)]
    masks = torch.stack([keep_mask(e.scene, r.scene, e.edit, output.shape[-1]) for e, r in zip(examples, readings)])
    keep = torch.where(masks.flatten(1).sum(1) > 0, psnr(reference, output, masks), torch.nan)
    return Judged(examples, reference, output, verdicts, torch.tensor([r.manifold_psnr for r in readings]), keep)


def summary(judged: Judged, *judges: JudgeModel) -> dict:
    """Oracle metrics of judged outputs, with the standard errors of PSNRs over edits, and what the judges think of
    them, on average."""
    examples, n = judged.examples, len(judged.examples)
    by_type = defaultdict(list)
    for example, value in zip(examples, judged.success.tolist()):
        by_type[example.edit.type].append(value)
    metrics = {
        "success": judged.success.mean().item(),
        "success_by_type": {k: sum(v) / len(v) for k, v in by_type.items()},
        "done": sum(v.done for v in judged.verdicts) / n,
        "kept": sum(v.kept for v in judged.verdicts) / n,
        "on_manifold": sum(v.on_manifold for v in judged.verdicts) / n,
        "keep_psnr": judged.keep_psnr.nanmean().item(),
        "manifold_psnr": judged.manifold_psnr.mean().item(),
    }
    for name in ("keep_psnr", "manifold_psnr"):
        values = getattr(judged, name)
        values = values[values.isfinite()]
        metrics[f"{name}_se"] = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    if judges:
        p = torch.stack([ask_judge(judge, examples, judged.reference, judged.output) for judge in judges]).mean(0)
        metrics["judge_p_yes"] = {"edit": p[0].mean().item(), "identity": p[1].mean().item()}
        metrics["hacking_gap"] = p.mean().item() - metrics["success"]
        truth = {"edit": [v.done for v in judged.verdicts], "identity": [v.kept for v in judged.verdicts]}
        metrics["calibration_error"] = {k: calibration_error(p[i], torch.tensor(so)) for i, (k, so) in enumerate(truth.items())}
    return metrics


def evaluate_student(
    student: DiT, judge: JudgeModel | None, n: int = 512, seed: int = 0, steps: int = 4, kinds: Sequence[str] = EDIT_TYPES, sampler: str = "renoise",
    shift: float = 1.0, search: str | None = None, others: Sequence[JudgeModel] = (), **settings,
) -> tuple[dict, Judged]:  # fmt: skip
    """Oracle metrics of a student on `n` held-out requests, types in turn, and the judged outputs; by a `search` and
    its settings those that please the judge (see `edit_examples`). What is believed is the mean of the judge and the
    `others`."""
    began = time.perf_counter()
    examples = held_out(n, seed, kinds)
    searched = dict(search=search, judge=judge, **settings) if search else settings
    judged = judge_by_oracle(examples, *edit_examples(student, examples, steps, seed, sampler, shift, **searched))
    metrics = summary(judged, *([judge] if judge else []), *others)
    metrics.update(n=n, seed=seed, steps=steps, sampler=sampler, seconds=round(time.perf_counter() - began, 2))
    return metrics, judged


def evaluate(pipe, n: int = 512, seed: int = 0, steps: int = 4, sampler: str = "renoise", checkpoint: str = "shapes", kinds: Sequence[str] = EDIT_TYPES) -> dict:
    """Oracle metrics of a pipeline; what `vlmedit eval` prints and writes."""
    shift = float(pipe.scheduler.config.shift)
    metrics, _ = evaluate_student(pipe.transformer, pipe.judge, n, seed, steps, kinds, sampler, shift)
    return {**metrics, "checkpoint": checkpoint}


def judge_against_oracle(judge: JudgeModel, judged: Judged) -> dict:
    """Accuracy of the judge per question on a student's own outputs, the oracle's verdicts as truth."""
    p = ask_judge(judge, judged.examples, judged.reference, judged.output) > 0.5
    done = torch.tensor([v.done for v in judged.verdicts])
    kept = torch.tensor([v.kept for v in judged.verdicts])
    return {"edit": (p[0] == done).float().mean().item(), "identity": (p[1] == kept).float().mean().item(), "n": len(judged.examples)}
