"""Real pictures in and out: files that other programs drew, brought to the model's view and back.

`load_picture` takes a PNG, JPEG or WebP of any size and mode, upright by its EXIF tag, composed on white where it is
transparent, padded to a square with the color of its own border, and scaled to the model's side by an antialiasing filter;
`Picture.restore` undoes the padding and the scaling on an edited view. The model sees `side` pixels, so a restored
picture has the size of its original but not its finest detail. Color profiles are not applied.

Everything is checked before anything is computed, and `InputError` carries every problem that was found.
Results are written beside their destination and renamed, so a file is either whole or absent.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import uuid
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from vlmedit.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_PIXELS = 64_000_000  # of one picture: 8000 x 8000, about 200 MB decoded
MIN_SIDE = 8  # pixels
MAX_ASPECT = 4.0  # longer side over shorter side
BORDER = 0.02  # width of the ring whose median is the background's color, in shorter sides
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, MemoryError, Image.DecompressionBombError)


def some(problems: list[str], most: int = 10, what: str = "") -> list[str]:
    """The first `most` problems, and how many more (`what`) there are."""
    return [*problems[:most], *([f"and {len(problems) - most} more{what}"] if len(problems) > most else [])]


@dataclass(frozen=True)
class Picture:
    """A picture as the model sees it, and what is needed to bring an edit of it back to the original's size."""

    path: Path
    view: Image.Image  # RGB, side x side
    size: tuple[int, int]  # width and height of the upright original
    background: tuple[int, int, int]  # median of its border, the color of the padding

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Where the original lies within its padded square: left, top, right, bottom, in its own pixels."""
        (width, height), full = self.size, max(self.size)
        left, top = (full - width) // 2, (full - height) // 2
        return left, top, left + width, top + height

    def restore(self, edited: Image.Image) -> Image.Image:
        """An edited view at the original's size, without the padding."""
        full = max(self.size)
        return edited.convert("RGB").resize((full, full), Image.Resampling.BICUBIC).crop(self.box)


@dataclass(frozen=True)
class Request:
    """One picture and what to do with it. `source` names it in messages: a path, or a manifest and its line."""

    image: Path
    instruction: str
    source: str


def load_picture(path: str | Path, side: int = 32) -> Picture:
    """Read one picture. Raises `InputError` naming the file, what is wrong with it and the remedy."""
    path = Path(path)
    upright = to_rgb(_decode(path))
    return Picture(path, to_view(upright, side), upright.size, border_color(upright))


def _decode(path: Path) -> Image.Image:
    """The first and only frame, upright, in the file's own mode, after every check that a header allows."""
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not path.is_file():
        raise InputError(f"{path}: not a file; give a picture, a folder of pictures or a .jsonl manifest")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning: the limit below is lower
            with _open(path) as image:
                _check_header(path, image)
                if image.format == "PNG":
                    image.verify()  # checksums; the picture has to be opened again afterwards
            with _open(path) as image:
                image.load()
                return ImageOps.exif_transpose(image)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{path}: not a PNG, JPEG or WebP picture; convert it to one of them") from None
    except PermissionError:
        raise InputError(f"{path}: reading it is not permitted") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: it decodes to more than {MAX_PIXELS:,} pixels; scale it down") from None
    except BROKEN as error:
        raise InputError(f"{path}: the picture is damaged or truncated ({error}); save it again") from None


def _open(path: Path) -> Image.Image:
    return Image.open(path, formats=("PNG", "JPEG", "WEBP"))


def _check_header(path: Path, image: Image.Image) -> None:
    (width, height), frames = image.size, getattr(image, "n_frames", 1)
    if width * height > MAX_PIXELS:
        raise InputError(f"{path}: {width} x {height} is more than {MAX_PIXELS:,} pixels; scale it down")
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{path}: {width} x {height} is too small; both sides need at least {MIN_SIDE} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(f"{path}: {width} x {height} is longer than {MAX_ASPECT:g} to 1; crop it")
    if frames > 1 and image.format != "MPO":  # MPO: a camera's JPEG with a preview or a second eye; the first is the picture
        raise InputError(f"{path}: animated, {frames} frames; save the frame you mean as a picture of its own")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB: 16-bit scaled (not clipped), transparency composed on white."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        hole = image.info.get("transparency")
        if hole is not None:
            values = np.where(values == hole, 65535, values)
        image = Image.fromarray(np.clip(np.rint(values / 257), 0, 255).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(paper, image)
    return image.convert("RGB")


def border_color(image: Image.Image) -> tuple[int, int, int]:
    """Median color of the picture's outermost ring."""
    pixels = np.asarray(image)
    width = max(1, round(BORDER * min(image.size)))
    sides = (pixels[:width], pixels[-width:], pixels[:, :width], pixels[:, -width:])
    ring = np.concatenate([s.reshape(-1, 3) for s in sides])
    return tuple(int(v) for v in np.median(ring, axis=0).round())


def to_view(image: Image.Image, side: int) -> Image.Image:
    """Pad an RGB picture to a square with its border's color, centered, and scale it to `side` pixels."""
    (width, height), full = image.size, max(image.size)
    if width != height:
        square = Image.new("RGB", (full, full), border_color(image))
        square.paste(image, ((full - width) // 2, (full - height) // 2))
        image = square
    # Hamming: antialiased without ringing; crisp drawings of 64 to 400 pixels come within 42 dB of the renderer's own 32
    return image.resize((side, side), Image.Resampling.HAMMING if full > side else Image.Resampling.BICUBIC)


def to_image(picture: Tensor) -> Image.Image:
    """A tensor (3, H, W) as an RGB picture: [-1, 1] becomes 0 to 255, rounded; what lies outside is clamped."""
    pixels = ((picture.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def to_tensor(image: Image.Image, side: int | None = None) -> Tensor:
    """A picture as float32 (3, H, W) in [-1, 1]; with `side`, scaled down until the longer side is at most that long."""
    import torch

    if side and max(image.size) > side:
        scale = side / max(image.size)
        image = image.resize([max(1, round(v * scale)) for v in image.size], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def picture_paths(folder: Path) -> list[Path]:
    """The pictures of a folder by name, not of its subfolders. Raises `InputError` when there is none."""
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in FORMATS and not p.name.startswith("."))
    if not found:
        raise InputError(f"{folder}: no picture in this folder; known endings: {', '.join(FORMATS)}")
    return found


def read_manifest(path: Path) -> tuple[list[Request], list[str]]:
    """Requests of a JSONL manifest of {"image": ..., "instruction": ...}, and the problems of its other lines.

    Relative image paths start at the manifest's folder. Empty lines are skipped.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"{path}: cannot be read as UTF-8 text ({error})"]
    requests, problems = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path.name}, line {number}"
            try:
                requests.append(_read_line(line, where, path.parent))
            except InputError as error:
                problems += error.problems
    if not requests and not problems:
        problems.append(f'{path}: an empty manifest; write one {{"image": ..., "instruction": ...}} per line')
    return requests, problems


def _read_line(line: str, where: str, folder: Path) -> Request:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise InputError(f'{where}: a {type(entry).__name__}, not an object with "image" and "instruction"')
    wrong = [f"{key!r} is missing" if key not in entry else f"{key!r} is {entry[key]!r}, not a text" for key in ("image", "instruction") if not isinstance(entry.get(key), str)]
    if wrong:
        raise InputError(f"{where}: {' and '.join(wrong)}")
    return Request(folder / entry["image"], entry["instruction"], where)


def gather(source: Path, instruction: str = "") -> tuple[list[Request], list[str]]:
    """The requests of a picture, a folder of pictures (one instruction for all) or a .jsonl manifest, and its problems."""
    if source.suffix.lower() == ".jsonl" and source.is_file():
        requests, problems = read_manifest(source)
        if instruction:
            problems.insert(0, f"{source}: a manifest carries its own instructions; leave out {instruction!r}")
        return requests, problems
    if source.is_dir():
        try:
            return [Request(p, instruction, str(p)) for p in picture_paths(source)], []
        except (InputError, OSError) as error:
            return [], [str(error)]
    return [Request(source, instruction, str(source))], []


# Writing


def free_bytes(path: Path) -> int:
    """Free space where `path` is or will be."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def check_space(path: Path, needed: int) -> None:
    """Raise `InputError` unless `needed` bytes and a little more are free where `path` will be."""
    free = free_bytes(path)
    if free < needed + 2**20:
        raise InputError(f"{path}: the disk is full: {free / 2**20:.0f} MB free, about {needed / 2**20 + 1:.0f} MB needed; make room or choose another place")


def check_writable(path: Path, kind: str = "file") -> None:
    """Raise `InputError` unless `path` can become a file (or folder, by `kind`). Writes nothing."""
    if kind == "file" and path.is_dir():
        raise InputError(f"{path}: a folder; name a file")
    if kind == "folder" and path.exists() and not path.is_dir():
        raise InputError(f"{path}: a file; name a folder")
    place = path if kind == "folder" else path.absolute().parent
    while not place.exists():
        place = place.absolute().parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"{path}: cannot be written, because {place} is {'read-only' if place.is_dir() else 'not a folder'}")


def check_ending(path: Path) -> None:
    """Raise `InputError` unless the path ends like a picture that can be written."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: unknown ending {path.suffix!r}; a picture's name ends with {', '.join(FORMATS)}")


@contextmanager
def disk_errors(path: Path):
    """Turn a full disk into an `InputError`; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{path}: the disk is full; make room and start again (nothing half-written was left)") from error
        raise


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a new file beside `path`, flush it to the disk, and rename it."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            with open(fresh, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a picture atomically, in the format its name ends with."""
    check_ending(path)
    options = {"quality": 95, "subsampling": 0} if FORMATS[path.suffix.lower()] == "JPEG" else {}
    options = {"lossless": True} if FORMATS[path.suffix.lower()] == "WEBP" else options
    write_atomic(path, lambda file: image.save(file, FORMATS[path.suffix.lower()], **options))


def save_json(data, path: Path) -> None:
    """Write JSON atomically."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


# Showing


def strip(pictures: list[Image.Image], labels: list[str], title: str = "", tile: int = 192) -> Image.Image:
    """Pictures side by side, their longer sides scaled to `tile` pixels, enlarged without smoothing; a label under each, wrapped to its width."""
    if len(pictures) != len(labels):
        raise ValueError(f"{len(pictures)} pictures and {len(labels)} labels; pass one for each")
    font, gap, line = ImageFont.load_default(14), 8, 18
    head = _wrap(title, font, len(pictures) * (tile + gap) - gap)
    wrapped = [[row for part in text.split("\n") for row in _wrap(part, font, tile)] for text in labels]
    top, bottom = gap + line * len(head), line * max(map(len, wrapped)) + gap
    sheet = Image.new("RGB", (gap + len(pictures) * (tile + gap), top + tile + bottom), "white")
    draw = ImageDraw.Draw(sheet)
    for row, words in enumerate(head):
        draw.text((gap, gap // 2 + row * line), words, "black", font)
    for i, (picture, rows) in enumerate(zip(pictures, wrapped)):
        left = gap + i * (tile + gap)
        how = Image.Resampling.NEAREST if max(picture.size) <= tile else Image.Resampling.LANCZOS
        shown = ImageOps.contain(picture.convert("RGB"), (tile, tile), how)
        sheet.paste(shown, (left + (tile - shown.width) // 2, top + (tile - shown.height) // 2))
        for row, words in enumerate(rows):
            draw.text((left, top + tile + 2 + row * line), words, "black", font)
    return sheet


def _wrap(text: str, font, width: float) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def contact_sheet(strips: list[Image.Image], columns: int = 2) -> Image.Image:
    """Strips in a grid, row by row."""
    width, height = max(s.width for s in strips), max(s.height for s in strips)
    sheet = Image.new("RGB", (width * min(columns, len(strips)), height * -(-len(strips) // columns)), "white")
    for i, one in enumerate(strips):
        sheet.paste(one, (i % columns * width, i // columns * height))
    return sheet
