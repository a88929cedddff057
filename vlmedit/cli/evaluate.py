"""`vlmedit eval`: an editor measured on held-out edits."""

from __future__ import annotations

import time
from typing import Literal

from vlmedit.cli._shared import JsonFile, at_least, check_json, refuse, show_table
from vlmedit.errors import InputError

NAME, ORDER = "eval", 4


def evaluate(
    *,
    n: int = 512,
    seed: int = 0,
    steps: int = 4,
    checkpoint: str = "shapes",
    sampler: Literal["renoise", "euler", "corrector"] | None = None,
    json: JsonFile = None,
) -> int:
    """Measure an editor on held-out edits with the oracle.

    Args:
        n: Held-out edits, types in turn.
        seed: Of the held-out set and the noise.
        steps: Network calls of the sampler.
        checkpoint: "shapes" (shipped) or the folder of a saved pipeline or training run.
        sampler: How the few steps are taken; by default what the model was trained with.
    """
    from vlmedit.io import save_json
    from vlmedit.pipelines.batch_edit import load_pipeline, model_side

    problems = at_least(n=(n, 1), seed=(seed, 0), steps=(steps, 1)) + check_json(json)
    try:
        model_side(checkpoint)
    except InputError as error:
        problems += [p.replace("--model", "--checkpoint") for p in error.problems]
    refuse(problems)
    from vlmedit.evaluation.editing import evaluate as measure

    began = time.time()
    ways = {"sampler": sampler} if sampler else {}
    result = measure(load_pipeline(checkpoint), n=n, seed=seed, steps=steps, **ways)
    result = {**result, "n": n, "seed": seed, "steps": steps, "checkpoint": checkpoint}
    result.setdefault("seconds", round(time.time() - began, 2))
    flat = {k: v for k, v in result.items() if not isinstance(v, dict)}
    nested = {f"{k}: {name}": v for k, inner in result.items() if isinstance(inner, dict) for name, v in inner.items()}
    show_table(f"{checkpoint}, {n} held-out edits", flat | nested)
    if json:
        save_json(result, json)
    return 0
