"""`vlmedit edit`: a picture, a folder or a manifest, edited by the shipped model or by an exported one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from vlmedit.cli._shared import JsonFile, at_least, check_json, load_model, progress_bar, say
from vlmedit.errors import InputError

ORDER = 3
MOST_SIDE = 4096  # pixels at which a real model may work


def edit(
    input: Positional[Path],
    instruction: Positional[str] = "",
    *,
    out: Path,
    report: bool = False,
    steps: int | None = None,
    seed: int = 0,
    num_samples: int = 1,
    best_of: int = 0,
    model: str = "shapes",
    judge: str = "",
    side: int | None = None,
    skip_existing: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    json: JsonFile = None,
) -> int:
    """Edit a picture, a folder of pictures or a .jsonl manifest by instruction.

    The shipped model works at 32 x 32 pixels: the input is padded to a square with its border's color and scaled down,
    and the edit is scaled back to the input's size, without its finest detail. A real model (what `vlmedit export`
    wrote) takes any picture and any instruction: it works at as many pixels as it was trained at, or at --side, and the
    edit has the input's size too.

    Args:
        input: A PNG, JPEG or WebP picture, a folder of them, or a manifest of {"image": ..., "instruction": ...} lines.
        instruction: What to do, for example "make the circle red"; none for a manifest.
        out: The edited picture, or a folder when the input is a folder or a manifest.
        report: Also write, next to each edit, the judge's answers (.json) and a strip (-strip.png).
        steps: Network calls of the sampler; by default 4, or what a real model was trained with.
        seed: Of the noise; a picture's result does not depend on the others.
        num_samples: Edits to draw of each picture, numbered -1, -2, ...
        best_of: Draw that many and keep the one the judge likes best; 0 draws one without asking.
        model: "shapes" (shipped), the folder of a saved pipeline or training run, or what `vlmedit export` wrote: its folder or id.
        judge: Of a real model, for --report and --best-of: a vision-language model by folder or id.
        side: Pixels of the longer side at which a real model works.
        skip_existing: Leave alone what is edited already, to go on with a folder that was stopped.
        force: Try edits that the picture seems not to allow; a real model tries all.
        trust_remote_code: Run code that comes with a real model and is not the file that `vlmedit export` writes.
    """  # noqa: E501
    from vlmedit.pipelines.batch_edit import find_exported

    problems = wrong_numbers(steps, seed, num_samples, best_of, side) + check_json(json)
    exported = find_exported(model, trust_remote_code)
    problems += unusable(model, exported is not None, report, best_of, judge, side, force, trust_remote_code)
    jobs = find_jobs(problems, input, instruction, out, model, exported, side, num_samples, report, force)
    known = [skip_existing and job.is_done(report) for job in jobs]
    if all(known):
        say(f"nothing left to do: every edit is in {out}")
    pipe = None if all(known) else load_editor(model, exported, judge, report, best_of)
    began = time.time()
    records = edit_all(pipe, jobs, known, steps or (exported.steps if exported else 4), seed, best_of, report)
    tell(records, {"model": model} | ({"judge": judge} if judge else {}), round(time.time() - began, 3), json)
    return 0


def wrong_numbers(steps: int | None, seed: int, num_samples: int, best_of: int, side: int | None) -> list[str]:
    """Numbers that no model can use."""
    given = dict(steps=(steps, 1), seed=(seed, 0), num_samples=(num_samples, 1), best_of=(best_of, 0), side=(side, 16))
    problems = at_least(**{k: v for k, v in given.items() if v[0] is not None})
    if best_of and num_samples > 1:
        both = f"--best-of {best_of} keeps one edit and --num-samples {num_samples} keeps all"
        problems.append(f"{both}; choose one of them")
    return problems


def unusable(
    model: str, real: bool, report: bool, best_of: int, judge: str, side: int | None, force: bool, trust: bool
) -> list[str]:
    """Options that this model cannot use."""
    if not real:
        options = {"--judge": judge, "--side": side, "--trust-remote-code": trust}
        what = f"{model} is no real model that vlmedit export wrote; leave it out"
        return [f"{option}: {what}" for option, value in options.items() if value]
    problems = [f"--force: {model} is a real model, which tries every edit; leave it out"] if force else []
    if side and side > MOST_SIDE:
        problems.append(f"--side is {side}; a real model works at {MOST_SIDE} pixels at most")
    if best_of and not judge:
        name = "name one, for example --judge Qwen/Qwen2.5-VL-7B-Instruct"
        problems.append(f"--best-of {best_of}: {model} has no judge of its own; {name}")
    if judge:
        from vlmedit.networks.checks import check_judge

        problems += [f"--{problem}" for problem in check_judge(judge)]
        if not (report or best_of):
            idle = "it is asked for --report or --best-of alone; add one of them, or leave it out"
            problems.append(f"--judge {judge}: {idle}")
    return problems


def find_jobs(
    problems: list[str],
    source: Path,
    instruction: str,
    out: Path,
    model: str,
    exported,
    side: int | None,
    samples: int,
    report: bool,
    force: bool,
) -> list[Any]:
    """Every edit to make. Raises one `InputError` with all problems: the pictures', then those of the options."""
    from vlmedit.pipelines.batch_edit import model_side, prepare

    view, hint, jobs = 32, "", []
    if not exported:
        try:
            view = model_side(model)
        except InputError as error:
            problems = [*problems, *error.problems]

    def fitted(path: Path):
        from vlmedit.pipelines import exported as editor

        return editor.fit(exported, path, side)

    try:
        jobs = prepare(source, instruction, out, view, samples, report, force, fitted if exported else None)
    except InputError as error:
        problems, hint = [*error.problems, *problems], error.hint
    if problems:
        raise InputError(problems, hint)
    return jobs


def load_editor(model: str, exported, judge: str, report: bool, best_of: int):
    """The pipeline, with its judge where one is asked for. Raises `InputError` where the shipped kind has none and one
    is needed."""
    if exported:
        from vlmedit.networks.judges import load_judge
        from vlmedit.networks.quiet import quiet
        from vlmedit.pipelines import exported as editor

        with quiet():
            seen = load_model(load_judge, "--judge", judge) if judge else None
        return editor.load(exported, seen)
    from vlmedit.pipelines.batch_edit import load_pipeline

    pipe = load_pipeline(model)
    if pipe.judge is None and (report or best_of):
        raise InputError(f"--model {model}: it has no judge; leave out {'--report' if report else '--best-of'}")
    return pipe


def edit_all(
    pipe, jobs: Sequence[Any], known: Sequence[bool], steps: int, seed: int, best_of: int, report: bool
) -> list[dict]:
    """Make every edit that is not known to be there; returns the record of each."""
    from vlmedit.pipelines.batch_edit import carry_out

    records = []
    with progress_bar() as progress:
        task = progress.add_task("edits", total=len(jobs), note="")
        for job, there in zip(jobs, known, strict=True):
            if there:
                outputs = [str(path) for path in job.outputs]
                about = {"input": str(job.picture.path), "instruction": job.instruction}
                records.append({**about, "outputs": outputs, "skipped": True})
            else:
                records.append(carry_out(pipe, job, steps, seed, best_of, report))
            progress.advance(task)
    return records


def tell(records: list[dict], models: dict, seconds: float, json: Path | None) -> None:
    """Write the records and name the results."""
    from vlmedit.io import save_json

    if json:
        save_json({**models, "edits": records, "seconds": seconds}, json)
    for record in records:
        found, odds = record.get("judge"), ""
        if found and len(found["p_edit"]) == 1:
            odds = f"  P(edit made) {max(found['p_edit']):.2f}  P(rest kept) {max(found['p_identity']):.2f}"
        there = "  (there already)" if "skipped" in record else ""
        print(f"{', '.join(record['outputs'])}{odds}{there}")
