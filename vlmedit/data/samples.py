"""Example training data on disk: what each trainer sees, as pictures, one JSONL line per example, and a contact sheet.

Drawn by the trainers' own streams of `data.py`, ids turned back to words; training itself never reads such files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vlmedit.data.world import captioned_batch, paired_batch, unpaired_batch
from vlmedit.io import contact_sheet, disk_errors, strip
from vlmedit.world.tokenizer import build_tokenizer


@dataclass(frozen=True)
class Sample:
    """One example: named pictures (the first is the input) and the fields of its JSONL line."""

    pictures: dict[str, Image.Image]
    fields: dict


def to_image(picture: Tensor) -> Image.Image:
    """A tensor (3, S, S) in [-1, 1] as a picture."""
    pixels = ((picture.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.numpy())


def words(ids: Tensor) -> str:
    return build_tokenizer().decode(ids, skip_special_tokens=True)


def samples(n: int, seed: int, task: str, side: int) -> Iterator[Sample]:
    """The first `n` examples of a task's stream. Raises ValueError for an unknown task."""
    if task == "captioned":
        batch = captioned_batch(n, side, seed, 0, 0)
        for image, caption in zip(batch.image, batch.caption):
            yield Sample({"image": to_image(image)}, {"caption": words(caption)})
    elif task == "paired":
        batch = paired_batch(n, side, seed, 0, 0)
        for before, text, after, kind in zip(batch.reference, batch.instruction, batch.target, batch.types):
            yield Sample({"image": to_image(before), "target": to_image(after)}, {"instruction": words(text), "type": kind})
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
                if i < 32:
                    title = sample.fields.get("instruction") or sample.fields["caption"]
                    strips.append(strip(list(sample.pictures.values()), list(sample.pictures), title, tile=160))
            (fresh / "data.jsonl").write_text("\n".join(lines) + "\n")
            contact_sheet(strips, columns=4).save(fresh / "contact.png")
            if out.exists():
                out.rmdir()  # checked to be empty; rename needs its place
            os.replace(fresh, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return {"out": str(out), "task": task, "n": n, "seed": seed, "side": side, "files": ["data.jsonl", "contact.png"]}
