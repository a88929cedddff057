"""`vlmedit bench`: edited pictures measured on a public benchmark, and compared with other runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from vlmedit.cli._shared import (
    JsonFile,
    at_least,
    check_json,
    load_model,
    progress_bar,
    read_json,
    refuse,
    say,
    show_table,
)
from vlmedit.errors import InputError

ORDER = 7


def bench(
    name: Positional[Literal["gedit", "imgedit", "dreambooth"]],
    folder: Positional[Path],
    *,
    edits: Path,
    out: Path,
    judge: str = "",
    clip: str = "",
    dino: str = "",
    model: str = "",
    seed: int = 0,
    against: tuple[Path, ...] = (),
    language: Literal["en", "cn"] = "en",
    batch: int = 4,
    side: int = 1024,
    partial: bool = False,
    json: JsonFile = None,
) -> int:
    """Measure edited pictures on a public benchmark: VIEScore by a local judge, CLIP-T, CLIP-I and DINO.

    With --model an exported editor draws the edits first. The same command goes on where it was stopped. Writes
    cases/KEY.json with the judge's words, result.json and contact.png.

    Args:
        name: The benchmark.
        folder: Of the benchmark, as it is published.
        edits: Folder of the edited pictures: GEdit-Bench fullset/TASK/LANGUAGE/KEY.png or KEY.png, ImgEdit-Bench KEY.png, DreamBooth SUBJECT/NN.png.
        out: Folder of the results.
        judge: A vision-language model by folder or id; it answers greedily.
        clip: A CLIP by folder or id, for CLIP-T and CLIP-I.
        dino: A DINO by folder or id, for example facebook/dino-vits16.
        model: What `vlmedit export` wrote, by folder or id: draws the edits that are missing.
        seed: Of the noise with --model, the same for each edit.
        against: Results of other runs by the same judge and encoders: compares case by case, with standard errors.
        language: Of GEdit-Bench's instructions.
        batch: Cases at a time.
        side: Pixels of the longer side that the judge is shown at most.
        partial: Measure the edits that are there, even if some are missing.
    """  # noqa: E501
    from vlmedit.benchmarks import find_edits, read_benchmark

    refuse(at_least(batch=(batch, 1), side=(side, 32), seed=(seed, 0)) + check_json(json))
    check_places(out, [judge, clip, dino], against)
    cases = read_benchmark(name, folder, language)
    if model:
        draw(name, cases, edits, model, seed, judge)
    pairs = find_edits(cases, edits, partial)
    settings = dict(language=language, batch=batch, side=side, total=len(cases), against=against)
    tell(name, measure_all(name, pairs, out, judge, clip, dino, settings), len(pairs), out, against, json)
    return 0


def check_places(out: Path, models: list[str], against: Sequence[Path]) -> None:
    """Raise `InputError` unless results can be written, something measures, and the other runs are finished."""
    from vlmedit.io import check_writable

    check_writable(out, "folder")
    if not any(models):
        raise InputError("nothing to measure with: name a --judge, a --clip or a --dino")
    lacking = [other for other in against if not (other / "result.json").is_file()]
    refuse([f"--against {other}: no result.json of a finished vlmedit bench in it" for other in lacking])


def draw(name: str, cases: list, edits: Path, model: str, seed: int, judge: str) -> None:
    """Draw the edits of a benchmark that are missing, after everything small is checked, the judge's files too."""
    from vlmedit.benchmarks import draw_edits
    from vlmedit.io import check_writable, disk_errors
    from vlmedit.networks.checks import check_judge
    from vlmedit.pipelines import exported as editor
    from vlmedit.pipelines.batch_edit import find_exported

    exported = find_exported(model)
    if exported is None:
        raise InputError(f"--model {model}: no editor of real models that vlmedit export wrote; name its folder or id")
    refuse([f"--{problem}" for problem in check_judge(judge)] if judge else [])
    check_writable(edits, "folder")
    with progress_bar() as progress, disk_errors(edits):
        task = progress.add_task(f"edits of {name}", total=len(cases), note="")
        for done in draw_edits(cases, edits, exported, editor.load, seed):
            progress.update(task, completed=done)


def measure_all(name: str, pairs: list, out: Path, judge: str, clip: str, dino: str, settings: dict) -> dict:
    """Load the models and measure every edit; returns what result.json holds."""
    from vlmedit.benchmarks import Encoder, measure
    from vlmedit.networks.judges import load_judge
    from vlmedit.networks.quiet import quiet

    with quiet():
        scorer = load_model(load_judge, "--judge", judge) if judge else None
        encoders = [
            load_model(functools.partial(Encoder, words=words), option, place, half=False) if place else None
            for option, place, words in (("--clip", clip, True), ("--dino", dino, False))
        ]
    with progress_bar() as progress:
        task = progress.add_task(name, total=len(pairs), note="")
        for done in measure(name, pairs, out, scorer, *encoders, **settings):
            progress.update(task, completed=done)
    return read_json(out / "result.json")


def tell(name: str, result: dict, edits: int, out: Path, against: Sequence[Path], json: Path | None) -> None:
    """Show the averages, compare with other runs, and write all of it where it was asked for."""
    from vlmedit.benchmarks import compare
    from vlmedit.io import save_json

    for which, found in result["sets"].items():
        rows = {k: v["average"] for k, v in found.items() if k != "n"}
        show_table(f"{name}, {which} set, {found['n']} cases", rows)
    if result["unreadable"]:
        unread = f"{result['unreadable']} of {edits} answers of the judge could not be read"
        say(f"{unread}; they count in no average (see {out / 'cases'})")
    for other in against:
        result.setdefault("against", []).append(found := compare(out, other))
        rows = {k: difference(v) for k, v in found["metrics"].items()}
        show_table(f"against {other}, {found['cases']} cases that both have", rows)
    if json:
        save_json(result, json)


def difference(found: dict) -> str:
    """A metric of two runs, and how far they are apart."""
    error = "" if found["standard error"] is None else f" (standard error {found['standard error']:.2g})"
    values = f"{found['here']:.4g} here, {found['there']:.4g} there"
    return f"{values}: {found['difference']:+.3g}{error}, better in {found['better']:.0%}"
