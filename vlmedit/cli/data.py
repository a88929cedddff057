"""`vlmedit data`: examples of what each trainer of the miniature sees, a manifest made of pictures, or a manifest
packed into shards.

Examples are drawn by the trainers' own streams of `vlmedit.data.world`, ids turned back to words: pictures, one JSONL line
per example, and a contact sheet. Training itself never reads such files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from vlmedit.cli._shared import JsonFile, at_least, check_json, load_model, progress_bar, read_json, refuse, words_of
from vlmedit.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

ORDER = 6
SHEET = 32  # examples on the contact sheet


def data(
    action: Positional[Literal["examples", "prepare", "shards"]] = "examples",
    source: Positional[Path | None] = None,
    *,
    out: Path,
    n: int = 16,
    seed: int = 0,
    task: Literal["unpaired", "captioned", "paired"] = "unpaired",
    side: int | None = None,
    vlm: str = "",
    llm: str = "",
    layout: str = "folder",
    kinds: tuple[str, ...] = (),
    per_picture: int = 3,
    repeats: int = 20,
    batch: int = 8,
    kind: Literal["tar", "parquet"] = "tar",
    per_shard: int = 1000,
    json: JsonFile = None,
) -> int:
    """Write example training data of the miniature, or make unpaired data for real models out of pictures.

    examples: pictures, a data.jsonl (a manifest that `vlmedit edit` reads) and a contact sheet. prepare FOLDER: a
    vision-language model proposes, checks and captions edits of the folder's pictures; the same command goes on where
    it was stopped, and under accelerate launch or torchrun each process does its part. shards MANIFEST: a manifest and
    its pictures as tar or parquet files, which training reads as they are.

    Args:
        action: examples (default), prepare or shards.
        source: The folder of pictures, or the manifest.
        out: A new folder; for prepare and shards also the one of an interrupted run.
        n: Examples.
        seed: Of the examples, or of the edit types drawn for a picture.
        task: unpaired (what the no-pair editor learns from), captioned (the teacher) or paired (the paired rivals alone).
        side: Pixels per side of the examples (32), or of the longer side that the model is shown (512).
        vlm: prepare: a vision-language model, folder or id.
        llm: prepare: a language model that proposes and writes target captions; by default the VLM.
        layout: prepare: folder, pico-banana, gpt-image-edit, magicbrush, npedit or manifest. Targets are never read.
        kinds: prepare: edit types to propose, all by default.
        per_picture: prepare: instructions proposed per picture.
        repeats: prepare: how often one instruction may come altogether.
        batch: prepare: pictures at a time.
        kind: shards: tar (as webdataset reads them) or parquet (as Hugging Face datasets does).
        per_shard: shards: pictures per file.
    """  # noqa: E501
    numbers = dict(n=(n, 1), seed=(seed, 0), side=(side or 16, 16), batch=(batch, 1), repeats=(repeats, 1))
    check_request(action, source, out, at_least(**numbers, per_shard=(per_shard, 1)) + check_json(json))
    if action == "examples":
        result = examples(out, n, seed, task, side or 32)
    elif action == "shards":
        result = shards(source, out, kind, per_shard)
    else:
        result = prepare(source, out, vlm, llm, layout, words_of(kinds), per_picture, side or 512, seed, batch, repeats)
    save(result, json)
    return 0


def check_request(action: str, source: Path | None, out: Path, problems: list[str]) -> None:
    """Raise `InputError` for options that do not fit together, or a folder that cannot be written."""
    from vlmedit.io import check_writable

    refuse(problems)
    check_writable(out, "folder")
    if action == "examples" and source is not None:
        raise InputError(f"{source}: examples are drawn, not read; did you mean vlmedit data prepare {source}?")
    if action != "examples" and source is None:
        needed = "a folder of pictures" if action == "prepare" else "a manifest"
        raise InputError(f"data {action} needs {needed}: vlmedit data {action} SOURCE --out {out}")


def save(result: dict, json: Path | None) -> None:
    """Write the result where it was asked for; of several processes the first one has one."""
    from vlmedit.io import save_json

    if json and result:
        save_json(result, json)


def examples(out: Path, n: int, seed: int, task: str, side: int) -> dict:
    """Draw examples into a new folder."""
    from vlmedit.io import check_space

    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: the folder is not empty; name a new one")
    check_space(out, n * (6 * side * side + 20_000))
    result = write_samples(out, n, seed, task, side)
    print(f"{n} {task} examples in {out}")
    return result


@dataclass(frozen=True)
class Sample:
    """One example: named pictures (the first is the input) and the fields of its JSONL line."""

    pictures: dict[str, Image.Image]
    fields: dict


def samples(n: int, seed: int, task: str, side: int) -> Iterator[Sample]:
    """The first `n` examples of a task's stream. Raises ValueError for an unknown task."""
    from vlmedit.data.world import captioned_batch, paired_batch, unpaired_batch
    from vlmedit.io import to_image
    from vlmedit.world.tokenizer import words

    if task == "captioned":
        batch = captioned_batch(n, side, seed, 0, 0)
        for image, caption in zip(batch.image, batch.caption, strict=True):
            yield Sample({"image": to_image(image)}, {"caption": words(caption)})
    elif task == "paired":
        batch = paired_batch(n, side, seed, 0, 0)
        for i, kind in enumerate(batch.types):
            pictures = {"image": to_image(batch.reference[i]), "target": to_image(batch.target[i])}
            yield Sample(pictures, {"instruction": words(batch.instruction[i]), "type": kind})
    elif task == "unpaired":
        batch = unpaired_batch(n, side, seed, 0, 0)
        for i, kind in enumerate(batch.types):
            fields = {
                "instruction": words(batch.instruction[i]),
                "type": kind,
                "reference_caption": words(batch.reference_caption[i]),
                "target_caption": words(batch.target_caption[i]),
                "edit_question": words(batch.edit_question[i]),
                "edit_answer": "yes" if batch.edit_answer[i] else "no",
                "edit_pictures": ["reference", "output"] if batch.edit_pair[i] else ["output"],
                "identity_question": words(batch.identity_question[i]),
                "identity_answer": "yes",
            }
            yield Sample({"image": to_image(batch.reference[i])}, fields)
    else:
        raise ValueError(f"unknown task {task!r}; known: unpaired, captioned, paired")


def write_samples(out: Path, n: int, seed: int, task: str, side: int) -> dict:
    """Write a folder of examples, whole or not at all; returns its summary."""
    import json

    from vlmedit.io import contact_sheet, disk_errors, strip

    fresh = out.absolute().with_name(f".{out.name}.part")
    shutil.rmtree(fresh, ignore_errors=True)
    lines, strips = [], []
    try:
        with disk_errors(out):
            fresh.mkdir(parents=True)
            for i, sample in enumerate(samples(n, seed, task, side)):
                names = {}
                for kind, picture in sample.pictures.items():
                    names[kind] = f"{i:05d}{'' if kind == 'image' else f'-{kind}'}.png"
                    picture.save(fresh / names[kind])
                lines.append(json.dumps({**names, **sample.fields}))
                if i < SHEET:
                    title = sample.fields.get("instruction") or sample.fields["caption"]
                    strips.append(strip(list(sample.pictures.values()), list(sample.pictures), title, tile=160))
            (fresh / "data.jsonl").write_text("\n".join(lines) + "\n")
            contact_sheet(strips, columns=4).save(fresh / "contact.png")
            if out.exists():
                out.rmdir()  # checked to be empty; rename needs its place
            os.replace(fresh, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    files = ["data.jsonl", "contact.png"]
    return {"out": str(out), "task": task, "n": n, "seed": seed, "side": side, "files": files}


def shards(manifest: Path, out: Path, kind: str, per_shard: int) -> dict:
    """Pack a manifest."""
    from vlmedit.data.layouts import read_items
    from vlmedit.data.shards import write_shards

    items = read_items(manifest)
    paths = write_shards(items, out, kind, per_shard)
    print(f"{len(items)} requests in {len(paths)} {kind} files in {out}")
    return {"out": str(out), "kind": kind, "requests": len(items), "files": [p.name for p in paths]}


def prepare(
    source: Path,
    out: Path,
    vlm: str,
    llm: str,
    layout: str,
    kinds: list[str],
    per_picture: int,
    side: int,
    seed: int,
    batch: int,
    repeats: int,
) -> dict:
    """Make a manifest of a folder of pictures; under a launcher every process does its part, and the first one makes
    the manifest."""
    if not vlm:
        example = "for example --vlm Qwen/Qwen2.5-VL-7B-Instruct"
        raise InputError(f"--vlm is missing: name a vision-language model by folder or id, {example}")
    from accelerate.utils.environment import get_cpu_distributed_information

    from vlmedit.data.layouts import check_dataset
    from vlmedit.data.prepare import run as real
    from vlmedit.networks.judges.text_vlm import load_writer
    from vlmedit.networks.quiet import quiet

    settings = real.Settings(str(source), layout, vlm, llm or None, tuple(kinds or real.KINDS), per_picture, side, seed)
    launched = get_cpu_distributed_information()  # of any launcher, by its environment; there is nothing to exchange
    check_dataset(source, layout)
    with quiet():
        writer = load_model(load_writer, "--vlm", vlm)
        scribe = load_model(load_writer, "--llm", llm) if llm else None
    with progress_bar() as progress:
        task = progress.add_task("pictures", total=None, note="", visible=launched.rank == 0)
        for step in real.prepare(out, settings, writer, scribe, batch, repeats, launched.rank, launched.world_size):
            progress.update(task, completed=step.pictures, note=f"{step.kept} kept, {step.refused} refused")
    if launched.rank:
        return {}
    report = read_json(out / "report.json")
    made = f"{report['kept']} requests of {report['pictures']} pictures in {out / 'manifest.jsonl'}"
    print(f"{made}; {report['refused']} refusals, see {out / 'report.html'}")
    return report
