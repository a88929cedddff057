"""The main job: train the no-pair editor live for a few minutes, then edit held-out pictures with it and with the shipped
one, and leave pictures, metrics and logs in a run folder.

It starts from the shipped teacher, judge and warmed-up student and runs `train_npedit`; nothing in it sees a target image.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from vlmedit.methods.npedit import NPEditConfig, train_npedit
from vlmedit.pipelines.shapes import checkpoint
from vlmedit.training.run import Step

LIVE = {"smoke": dict(steps=2, batch=4, warmup=1), "laptop": dict(steps=750, save_every=150), "gpu": dict(steps=3000)}
SHOWN = 512  # held-out edits the metrics are taken over, and how many of them are drawn
DRAWN = 8


def live_config(tier: str = "laptop", out: str = "runs/main", **overrides) -> NPEditConfig:
    """NP-Edit from the shipped warm start, sized for the tier."""
    roles = {role: str(checkpoint("shapes", role)) for role in ("teacher", "judge")}
    return NPEditConfig.make(tier, **{**roles, "student": str(checkpoint("shapes", "warm")), "out": out, **LIVE[tier], **overrides})


def report(config: NPEditConfig, tier: str = "laptop") -> dict:
    """Evaluate the warm start, the live editor and the shipped editor by the oracle; write `metrics.json` and `edits.png`."""
    from vlmedit.evaluation.editing import evaluate_student
    from vlmedit.evaluation.judge import ask_judge
    from vlmedit.figures import save, sheet, wrap
    from vlmedit.networks.dit import DiT
    from vlmedit.networks.judge import JudgeModel

    n = 8 if tier == "smoke" else SHOWN
    judge = JudgeModel.from_pretrained(config.judge[0]).eval()
    folders = {"warm start": config.student, "live": Path(config.out) / "model", "shipped": checkpoint("shapes", "editor")}
    metrics, judged = {}, {}
    for name, folder in folders.items():
        student = DiT.from_pretrained(folder).eval()
        metrics[name], judged[name] = evaluate_student(student, judge, n, seed=0, steps=config.sampler_steps, shift=config.sampler_shift)
    rows, titles, frames = [], [], []
    p = {name: ask_judge(judge, j.examples, j.reference, j.output).prod(0) for name, j in judged.items()}
    for i in range(min(DRAWN, n)):
        some = judged["live"]
        rows.append((some.reference[i], [judged[k].output[i] for k in folders]))
        verdict = lambda k: "success" if judged[k].verdicts[i].success else "failed"
        titles.append([wrap(some.examples[i].instruction)] + [f"P(yes) {p[k][i]:.2f}, oracle: {verdict(k)}" for k in folders])
        frames.append([None] + [judged[k].verdicts[i].success for k in folders])
    out = Path(config.out)
    save(sheet(rows, titles, ("reference", *folders), frames), out / "edits.png")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def train_main(config: NPEditConfig) -> Iterator[Step]:
    """The live training, update by update."""
    torch.manual_seed(config.seed)
    yield from train_npedit(config)


def run_main(tier: str = "laptop", out: str = "runs/main", progress=None, **overrides) -> dict:
    """Train live, evaluate, report. `progress` is called with every `Step`. Returns the metrics with the seconds it took."""
    began = time.perf_counter()
    config = live_config(tier, out, **overrides)
    for step in train_main(config):
        if progress is not None:
            progress(step)
    trained = time.perf_counter() - began
    metrics = report(config, tier)
    metrics["training_seconds"] = round(trained, 1)
    (Path(config.out) / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics
