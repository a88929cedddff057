"""What `vlmedit edit` is asked to do: every check of every input before a model is loaded, then the edits and their reports.

A job is one picture, one instruction and the places its results go. `prepare` reports all problems of a folder or a manifest
at once; where the oracle reads the picture reliably, impossible edits ("there is no circle ...") are among them. An exported editor of
real models [real/editor.py] takes any picture and any words: there the miniature's language and oracle are not asked.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from PIL import Image

from vlmedit.errors import ImpossibleEdit, InputError, UnknownInstruction
from vlmedit.io import (
    Picture,
    Request,
    check_ending,
    check_space,
    check_writable,
    gather,
    load_picture,
    save_json,
    save_picture,
    strip,
    to_tensor,
)
from vlmedit.world.edits import Edit, check_edit
from vlmedit.world.language import grammar, parse_instruction

ABOUT = "editor.json"  # what `vlmedit export` says of its folder [real/export.py]
RELIABLE_PSNR = 22.0  # dB to the oracle's nearest valid render, from which its reading may refuse an edit


@dataclass(frozen=True)
class Job:
    """One edit to make. `outputs`: one path per sample; the report's paths follow the first."""

    picture: Picture  # or a `Fitted` of real/editor.py
    instruction: str
    edit: Edit | None  # none where any words are allowed
    source: str
    outputs: tuple[Path, ...]
    stem: Path  # the result's path without a sample number and ending

    @property
    def report(self) -> Path:
        return self.stem.with_name(self.stem.name + ".json")

    @property
    def strip(self) -> Path:
        return self.stem.with_name(self.stem.name + "-strip.png")

    def is_done(self, report: bool = False) -> bool:
        """Whether every file that it writes is there already."""
        return all(path.is_file() for path in (*self.outputs, *((self.report, self.strip) if report else ())))


def find_exported(model: str, trust: bool = False):
    """The exported editor of real models that a folder or an id of the Hub holds; None for anything else, such as the miniature's. Raises
    `InputError` for one that cannot be used, and for real models that were not exported."""
    from vlmedit.networks.checks import looks_like_id

    folder = Path(model)
    if model == "shapes" or not (folder.is_dir() or looks_like_id(model)):
        return None
    if looks_like_id(model) or (folder / ABOUT).is_file():
        from vlmedit.pipelines import exported as editor  # imports every family: not for the miniature

        folder = editor.local(model)
        if (folder / ABOUT).is_file():
            return editor.find(model, trust)
    kept = {name: (folder / name).read_text(errors="replace") for name in ("config.json", "model_index.json") if (folder / name).is_file()}
    if '"backbone"' in kept.get("config.json", ""):
        raise InputError(f"--model {model}: a training run of real models; write its editor first (vlmedit export {model} --out FOLDER) and name that folder")
    if "model_index.json" in kept and '"EditPipeline"' not in kept["model_index.json"] or looks_like_id(model):
        raise InputError(f"--model {model}: no editor that vlmedit export wrote (it has no {ABOUT}); export a finished run and name its folder or id")
    return None


def model_side(model: str) -> int:
    """Pixels per side of a shipped family or a saved model, from its config alone. Raises `InputError` if there is none."""
    folder = Path(str(files("vlmedit"))) / "checkpoints" / "shapes" / "editor" if model == "shapes" else Path(model)
    if (folder / ABOUT).is_file():
        raise InputError(f"--model {model}: an editor of real models, which the oracle of drawn scenes cannot measure; edit pictures with it and use vlmedit bench")
    for config in (folder / "transformer" / "config.json", folder / "config.json", folder / "model" / "config.json"):
        if config.is_file():
            try:
                return int(json.loads(config.read_text())["side"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{config}: not the configuration of an editor ({type(error).__name__}: {error})") from None
    if model == "shapes":
        raise InputError("the shipped checkpoints are missing; train the editor (vlmedit train npedit) and name its folder with --model")
    raise InputError(f"--model {model}: no such shipped model (known: shapes) and no folder with a model_index.json or config.json")


def load_pipeline(model: str):
    """The pipeline of a shipped family or a folder; whatever is wrong with the folder is an `InputError`."""
    import vlmedit

    model_side(model)
    try:
        return vlmedit.load(model)
    except (ValueError, OSError) as error:
        raise InputError(f"--model {model}: cannot be loaded: {error}") from error


def prepare(
    source: Path, instruction: str, out: Path, side: int, samples: int = 1, report: bool = False, force: bool = False, load: Callable[[Path], Picture] | None = None
) -> list[Job]:
    """Every job of a picture, a folder or a manifest. With `load`, which reads a picture for a real model, any words are allowed. Raises
    one `InputError` with all problems of all of them."""
    requests, problems = gather(source, instruction)
    many = source.is_dir() or source.suffix.lower() == ".jsonl"
    edits: dict[str, Edit | None] = {}
    pictures: list[Picture | None] = []
    unread = False
    for text in dict.fromkeys(r.instruction for r in requests):
        try:
            edits[text] = read_words(text) if load else parse_instruction(text)
        except (UnknownInstruction, InputError) as error:
            unread = unread or not load
            where = "" if not many or source.is_dir() else ", ".join(r.source for r in requests if r.instruction == text) + ": "
            problems.append(where + str(error).split("\n")[0])
    for request in requests:
        try:
            pictures.append(load(request.image) if load else load_picture(request.image, side))
        except InputError as error:
            pictures.append(None)
            prefix = "" if request.source == str(request.image) else f"{request.source}: "
            problems += [prefix + p for p in error.problems]
    ready = [(r, p, edits[r.instruction]) for r, p in zip(requests, pictures) if p and r.instruction in edits]
    if not force and not load:
        problems += impossible(ready)
    jobs = name_results(ready, out, source, many, samples)
    problems += result_problems(jobs, out, requests, many, report)
    if problems:
        raise InputError(problems, hint=grammar() if unread else "")
    raw = sum(3 * j.picture.size[0] * j.picture.size[1] * samples + report * 500_000 for j in jobs)
    check_space(out, raw)
    return jobs


def read_words(text: str) -> None:
    """Any instruction but an empty one."""
    if not text.strip():
        raise InputError('the instruction is empty; say what to do, for example "make the dog red"')


def impossible(ready: list[tuple[Request, Picture, Edit]]) -> list[str]:
    """Edits that a picture does not allow, by the oracle's reading where it is reliable."""
    if not ready:
        return []
    import torch

    from vlmedit.world.oracle import parse

    views = torch.stack([to_tensor(p.view) for _, p, _ in ready])
    problems = []
    for (request, _, edit), reading in zip(ready, parse(views)):
        if reading.manifold_psnr >= RELIABLE_PSNR:
            try:
                check_edit(reading.scene, edit)
            except ImpossibleEdit as error:
                problems.append(f"{request.source}: {request.instruction!r} cannot be done: {error} (--force tries all the same)")
    return problems


def name_results(ready: list[tuple[Request, Picture, Edit]], out: Path, source: Path, many: bool, samples: int) -> list[Job]:
    """Where each result goes: `out` itself for one picture; for a folder out/NAME.png, for a manifest out/0001-NAME.png."""
    clashes = Counter(r.image.stem for r, _, _ in ready)
    jobs = []
    for number, (request, picture, edit) in enumerate(ready, 1):
        if not many:
            stem, ending = out.with_suffix(""), out.suffix
        elif source.is_dir():
            stem, ending = out / (request.image.name if clashes[request.image.stem] > 1 else request.image.stem), ".png"
        else:
            stem, ending = out / f"{number:04d}-{request.image.stem}", ".png"
        numbers = [""] if samples == 1 else [f"-{k}" for k in range(1, samples + 1)]
        outputs = tuple(stem.with_name(stem.name + n + ending) for n in numbers)
        jobs.append(Job(picture, request.instruction, edit, request.source, outputs, stem))
    return jobs


def result_problems(jobs: list[Job], out: Path, requests: list[Request], many: bool, report: bool) -> list[str]:
    """Why the results cannot be written where they were asked for."""
    problems = []
    try:
        check_writable(out, "folder" if many else "file")
        if not many:
            check_ending(out)
    except InputError as error:
        problems += error.problems
    inputs = {r.image.resolve() for r in requests}
    for job in jobs:
        for path in (*job.outputs, *((job.report, job.strip) if report else ())):
            if path.resolve() in inputs:
                problems.append(f"{path}: the result would replace an input; choose another --out")
    return problems


def carry_out(pipe, job: Job, steps: int, seed: int, best_of: int = 0, report: bool = False) -> dict:
    """Edit one picture, write its results, and return the record that `--json` and `--report` write."""
    view, settings = job.picture.view, dict(num_inference_steps=steps, seed=seed)
    if best_of:
        result = pipe.best_of(view, job.instruction, n=best_of, **settings)
        images, answers = result.images, result.answers
    else:
        images = pipe(view, job.instruction, num_samples=len(job.outputs), **settings).images
        answers = pipe.ask(view, images, job.instruction) if report and pipe.judge is not None else None
    for image, path in zip(images, job.outputs, strict=True):
        save_picture(job.picture.restore(image), path)
    record = {
        "input": str(job.picture.path),
        "instruction": job.instruction,
        **({"edit": {k: v for k, v in dataclasses.asdict(job.edit).items() if v}} if job.edit else {"drawn_at": list(view.size)}),
        "outputs": [str(p) for p in job.outputs],
        "steps": steps,
        "seed": seed,
    }
    if best_of:
        record |= {"best_of": best_of, "picked": int(result.picked[0])}
    if answers is not None:
        record["judge"] = judgement(answers)
    if report:
        record["strip"] = str(job.strip)
        save_picture(report_strip(view, job.instruction, images, record.get("judge")), job.strip)
        save_json(record, job.report)
    return record


def judgement(answers) -> dict:
    """The judge's probabilities of the right answers, per sample, and its questions."""
    return {
        "p_edit": [round(float(p), 4) for p in answers.p_edit],
        "p_identity": [round(float(p), 4) for p in answers.p_identity],
        "edit_question": {"text": answers.edit_questions[0].text, "right_answer": "yes" if answers.edit_questions[0].answer else "no"},
        "identity_question": {"text": answers.identity_questions[0].text, "right_answer": "yes" if answers.identity_questions[0].answer else "no"},
    }


def report_strip(view: Image.Image, instruction: str, images: list[Image.Image], judge: dict | None) -> Image.Image:
    """Reference and edits as the model sees them, with the judge's probabilities if there is a judge."""
    labels = [f"P(edit made) {a:.2f}\nP(rest kept) {b:.2f}" for a, b in zip(judge["p_edit"], judge["p_identity"])] if judge else ["edit"] * len(images)
    return strip([contained(image) for image in (view, *images)], ["reference", *labels], instruction)


def contained(image: Image.Image) -> Image.Image:
    """A picture that is not square, on a white square: a strip's tiles are squares."""
    if image.width == image.height:
        return image
    square = Image.new("RGB", (max(image.size),) * 2, "white")
    square.paste(image, ((square.width - image.width) // 2, (square.width - image.height) // 2))
    return square
