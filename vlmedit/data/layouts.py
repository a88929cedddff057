"""Unpaired data on disk: the manifest of `vlmedit data prepare`, data sets of others read without their targets, and shards.

A manifest is JSONL, one request per line: {"image": path, "instruction": str, "type": str, "object": str or null, "caption": str,
"target_caption": str}; relative paths start at the manifest's folder. There is no field for an edited picture.

Readers take a data set's folder as its authors publish it and yield `Found`: the input picture and words. The no-pair rule
[arXiv:2510.14978, Sec. 3]: an edited picture is never opened, named or decoded. Two traps are in the layouts themselves:

* A second turn, of MagicBrush or of pico-banana, starts from the first turn's *result*, somebody's target: only first turns are taken.
* A parquet row holds the target beside the input: only the columns of the input and the words are read from the file.

| layout          | files                                                                         | taken                                        |
|-----------------|-------------------------------------------------------------------------------|----------------------------------------------|
| folder          | pictures                                                                      | the picture                                  |
| pico-banana     | *.jsonl of apple/pico-banana-400k, single-turn and multi-turn, any depth      | `text`, `edit_type`; first turns             |
| gpt-image-edit  | JSON of UCSC-VLAA/GPT-Image-Edit-1.5M, both of its formats                    | first of `image` or `input`, the instruction |
| magicbrush      | edit_sessions.json with images/, or the parquet files of osunlp/MagicBrush    | first turns' `input`, `instruction`          |
| npedit          | merged_edit_data.json of nupurkmr9/npedit                                     | instruction, type and both captions          |
| manifest        | a manifest of this module                                                     | everything                                   |

What a reader passes over it counts, by the reasons in `SKIPPED`. Shards, which hold the pictures' own bytes, are in shards.py.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path

from PIL import Image, ImageOps

from vlmedit.data.requests import Request
from vlmedit.data.tables import json_rows, parquet_rows
from vlmedit.errors import InputError
from vlmedit.io import FORMATS, _check_header, some, to_rgb, write_atomic

TYPES = ("add", "remove", "replace", "color", "material", "shape", "background", "style", "action", "text", "other")  # the paper's, and the rest
SKIPPED = {
    "later turn": "the instruction is for an earlier edit's result, which is a target",
    "no words": "the row has no instruction",
    "no input": "the row names no input picture",
    "another format": f"a picture that ends with none of {', '.join(FORMATS)}; convert it",
}


# the first pattern that fits names the type; data sets' own names and instructions both go through it
PATTERNS = (
    ("style", r"\b(film grain|vintage filter)\b"),
    ("background", r"^add new scene context\b"),
    ("remove", r"\b(remov\w*|delet\w*|eras\w*|take away|get rid|subject-remove)\b"),
    ("add", r"^(please )?(add|insert|put|place|subject-add)\b"),
    ("background", r"\b(backgrounds?|background_change|season|weather|sky|scene|backdrop)\b"),
    ("style", r"\b(styl\w*|paint\w*|sketch|cartoon|anime|watercolou?r|comic|lego|pixar|artistic|tone_transfer|filter)\b"),
    ("text", r"\b(text\w*|text_change|letter\w*|words?|sign(?:age)?|font|translate|caption)\b"),
    ("replace", r"\b(replac\w*|swap\w*|substitut\w*|subject-replace|turn .* into)\b"),
    ("add", r"\b(add\w*|insert\w*|include)\b"),
    ("material", r"\b(materials?|textures?|material_alter|made of|wooden|metal\w*|marble)\b"),
    ("color", r"\b(colou?r\w*|recolou?r\w*|color_alter|hue|red|green|blue|yellow|purple|pink|orange|black|white|gray|grey|brown)\b"),
    ("shape", r"\b(shape\w*|resiz\w*|larger|bigger|smaller|taller|adjust|size|scale)\b"),
    ("action", r"\b(actions?|motion\w*|pose\w*|expression\w*|smil\w*|move\w*|jump\w*|sit\w*|stand\w*|relocat\w*|gestur\w*)\b"),
)
REMOVAL = re.compile(
    r"\b(?:remove|delete|erase|take away|get rid of)\s+(?P<thing>[^.;:!?]+?)"
    r"(?=\s*(?:$|[.;:!?,]|\b(?:from|in|on|at|and|while|so|to|that|which|seamlessly|behind|near|next)\b))", re.I
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One line of a manifest."""

    image: str
    instruction: str
    type: str = "other"
    object: str | None = None
    caption: str = ""
    target_caption: str = ""

    def __post_init__(self):
        wrong = [f.name for f in fields(self) if not isinstance(getattr(self, f.name), str) and not (f.name == "object" and self.object is None)]
        if wrong or not self.image or not self.instruction.strip():
            raise ValueError(f"{', '.join(wrong) or 'image or instruction'}: must be a text that is not empty")
        if self.type == "remove" and not self.object:
            raise ValueError(f"the removal {self.instruction!r} names no object; write what is to go, as in \"object\": \"a dog\"")

    def request(self) -> Request:
        """As the trainer takes it."""
        return Request(self.instruction, self.caption, self.target_caption, self.type, self.object)


@dataclass(frozen=True)
class Found:
    """A picture of a data set and what is known about an edit of it; empty words where nothing is. `content` reads the file's bytes."""

    name: str  # unique within the data set
    content: Callable[[], bytes]
    path: Path | None = None  # None where the picture lies inside another file
    instruction: str = ""
    type: str = ""
    object: str | None = None
    caption: str = ""
    target_caption: str = ""

    def picture(self) -> Image.Image:
        """Upright, RGB as the trainer sees it [feed.py]. Raises OSError for a file that is no picture, InputError for one that `vlmedit edit`
        would refuse too: animated, tiny, huge, or very long."""
        with Image.open(io.BytesIO(self.content())) as image:
            _check_header(Path(self.name), image)
            return to_rgb(ImageOps.exif_transpose(image))


def kind_of(*texts: str) -> str:
    """The type of an edit by its data set's name for it, else by its instruction, else "other"."""
    for text in texts:
        for kind, pattern in PATTERNS:
            if re.search(pattern, text.lower().replace("_", " ")) or re.search(pattern, text.lower()):
                return kind
    return "other"


def thing_removed(instruction: str) -> str | None:
    """What a removal removes, in its own words: "the red flag" of "Remove the red flag from the roof"."""
    found = REMOVAL.search(instruction)
    return found["thing"].strip() if found and 0 < len(found["thing"].split()) <= 12 else None


# manifests


def read_items(path: str | Path) -> list[Item]:
    """A manifest, checked line by line; image paths come back joined to its folder. Raises InputError naming the lines that are wrong."""
    path = Path(path)
    if path.is_dir():
        inside = next(iter(sorted(path.glob("*.jsonl"))), None) if not (path / "manifest.jsonl").is_file() else path / "manifest.jsonl"
        raise InputError(f"{path}: a folder, not a manifest; {f'name {inside}' if inside else 'vlmedit data prepare makes one of a folder of pictures'}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # other line breaks of Unicode may stand within a text
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a manifest ({error}); vlmedit data prepare writes one") from None
    items, problems, known = [], [], {f.name for f in fields(Item)}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or not {"image", "instruction"} <= entry.keys():
                raise ValueError('not an object with "image" and "instruction"')
            item = Item(**{k: v for k, v in entry.items() if k in known})
            items.append(Item(**{**asdict(item), "image": str(path.parent / item.image)}))
        except ValueError as error:
            problems.append(f"{path.name}, line {number}: {error}")
    if problems:
        raise InputError(some(problems, what=" lines"))
    if not items:
        raise InputError(f"{path}: an empty manifest; vlmedit data prepare writes one request per line")
    return items


def write_items(items: Iterable[Item], path: Path) -> None:
    """A manifest, whole or not at all."""
    text = "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)
    write_atomic(path, lambda file: file.write(text.encode()))


# data sets of others


def _inside(folder: Path, name: str) -> Path:
    """A path within the folder, links not followed. Raises ValueError for one that leads out of it."""
    path = Path(os.path.abspath(folder / name))
    if not path.is_relative_to(os.path.abspath(folder)):
        raise ValueError(f"{name!r} leads out of the data set's folder")
    return path


def _on_disk(folder: Path, name: str, **words) -> Found:
    path = _inside(folder, name)
    return Found(name, path.read_bytes, path, **words)


def read_folder(folder: Path, skipped: Counter) -> Iterator[Found]:
    """Every picture of a folder and its subfolders, by name."""
    pictures = Image.registered_extensions()
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in pictures and not p.name.startswith(".")):
        if path.suffix.lower() in FORMATS:
            yield _on_disk(folder, str(path.relative_to(folder)))
        else:
            skipped["another format"] += 1


MAPPED = "_with_local_source_image_path"  # what the data set's own script adds to a list's name when it adds `local_input_image`


def _mapped(folder: Path, name: str | None) -> str | None:
    """A path of the mapping script as one of the folder: the script writes it as seen from where it was run, often the folder's parent."""
    if name and not (folder / name).is_file():
        for place in (folder.absolute().parent, Path.cwd()):
            if (place / name).is_file() and Path(os.path.abspath(place / name)).is_relative_to(os.path.abspath(folder)):
                return os.path.relpath(place / name, folder)
    return name


def read_pico_banana(folder: Path, skipped: Counter) -> Iterator[Found]:
    """Rows {"open_image_input_url", "text", "edit_type", ...} of sft.jsonl and preference.jsonl, and of multi-turn.jsonl
    {"files": [{"id": "original_input_image", "url": ...}, {"id": "edit_turn1", ...}, ...], "metadata_edit_turn_prompts": [...]}.

    The picture is `local_input_image` (their mapping script writes it, as seen from where it was run), or the last part of the Open Images
    address. Of several turns the first
    alone asks something of the original picture; all later ones are for the result before them, and are counted, not read. A list that the
    script has mapped is read in place of its original."""
    lists = set(folder.rglob("*.jsonl"))
    for file in sorted(f for f in lists if f.with_name(f"{f.stem}{MAPPED}.jsonl") not in lists):
        for row in json_rows(file):
            url, said, kind = row.get("open_image_input_url"), row.get("text"), str(row.get("edit_type") or "")
            turns = row.get("metadata_edit_turn_prompts")
            if turns:
                url = next((f.get("url") for f in row.get("files") or () if f.get("id") == "original_input_image"), None)
                said = turns[0]
                skipped["later turn"] += len(turns) - 1
            name = _mapped(folder, row.get("local_input_image")) or str(url or "").rpartition("/")[2]
            if not name or not isinstance(said, str) or not said.strip():
                skipped["no words" if name else "no input"] += 1
            else:
                kind = kind_of(kind, said)
                yield _on_disk(folder, name, instruction=said.strip(), type=kind, object=thing_removed(said) if kind == "remove" else None)


GPT_FOLDERS = {  # where the pictures of an annotation file lie
    "hqedit_gpt_edit": "hqedit/edit", "hqedit_gpt_generate": "hqedit/generate", "omniedit_gpt": "omniedit", "omniedit_gpt_rewrite": "omniedit",
    "complexedit_gpt": "omniedit/complex-edit", "ultraedit_gpt": "ultraedit",
}  # fmt: skip


def read_gpt_image_edit(folder: Path, skipped: Counter) -> Iterator[Found]:
    """Rows {"image": [input, ...], "conversations": [...]} of training_json, or {"input": ..., "instruction": ...}."""
    for file in sorted(p for p in folder.rglob("*.json*") if p.suffix in (".json", ".jsonl")):
        under = GPT_FOLDERS.get(file.stem, "")
        places = [p for p in (folder / "gpt-edit" / under, folder / under, file.parent, folder) if p.is_dir()]
        for row in json_rows(file):
            images = row.get("image")
            name = images[0] if isinstance(images, list) and images else row.get("input")
            said = row.get("instruction") or next((c.get("value") for c in row.get("conversations", ()) if c.get("from") in ("human", "user")), "")
            said = re.sub(r"<image>", "", said[0] if isinstance(said, list) and said else said or "").strip()
            if not isinstance(name, str) or not said:
                skipped["no words" if isinstance(name, str) else "no input"] += 1
            else:
                place = next((p for p in places if (p / name).is_file()), places[0])
                kind = kind_of(str(row.get("task", "")), said)
                path = _inside(folder, str((place / name).relative_to(folder)))
                yield Found(str(path.relative_to(os.path.abspath(folder))), path.read_bytes, path, said, kind, thing_removed(said) if kind == "remove" else None)


def read_magicbrush(folder: Path, skipped: Counter) -> Iterator[Found]:
    """First turns of edit_sessions.json, or of the parquet files, of which the target's column is not read."""
    for file in sorted(folder.rglob("edit_sessions.json")):
        for session, turns in json.loads(file.read_text(encoding="utf-8")).items():
            for turn in turns:
                if turn["input"] != f"{session}-input.png":
                    skipped["later turn"] += 1
                else:
                    name = str((file.parent / "images" / session / turn["input"]).relative_to(folder))
                    yield _on_disk(folder, name, instruction=turn["instruction"].strip(), **_words(turn["instruction"]))
    shards = sorted(folder.rglob("*.parquet"))
    for file in shards:
        for row in parquet_rows(file, ["img_id", "turn_index", "source_img", "instruction"]):
            if row["turn_index"] != 1:
                skipped["later turn"] += 1
            else:
                content = row["source_img"]["bytes"]
                yield Found(f"{row['img_id']}-input.png", lambda content=content: content, None, row["instruction"].strip(), **_words(row["instruction"]))


def _words(instruction: str) -> dict:
    kind = kind_of(instruction)
    return {"type": kind, "object": thing_removed(instruction) if kind == "remove" else None}


def read_npedit(folder: Path, skipped: Counter) -> Iterator[Found]:
    """The released recipe's own list: instructions with both captions."""
    for row in json_rows(folder / "merged_edit_data.json"):
        kind, said = kind_of(str(row.get("edit_type", "")), row["edit_instruction"]), row["edit_instruction"].strip()
        thing = (row.get("object_name") or thing_removed(said)) if kind == "remove" else None
        yield _on_disk(
            folder, row["input_image_path"], instruction=said, type=kind, object=thing,
            caption=row.get("input_description") or "", target_caption=row.get("edited_caption") or "",
        )  # fmt: skip


def read_own(folder: Path, skipped: Counter) -> Iterator[Found]:
    """A manifest of ours, or a folder with one."""
    for number, item in enumerate(read_items(folder if folder.is_file() else folder / "manifest.jsonl")):
        path = Path(item.image)
        yield Found(f"{number:08d}-{path.name}", path.read_bytes, path, item.instruction, item.type, item.object, item.caption, item.target_caption)


LAYOUTS: dict[str, Callable[[Path, Counter], Iterator[Found]]] = {
    "folder": read_folder, "pico-banana": read_pico_banana, "gpt-image-edit": read_gpt_image_edit, "magicbrush": read_magicbrush,
    "npedit": read_npedit, "manifest": read_own,
}  # fmt: skip


def read_dataset(folder: str | Path, layout: str = "folder", skipped: Counter | None = None) -> Iterator[Found]:
    """The inputs and words of a data set; `skipped` counts what is passed over. Raises InputError for a folder that is not laid out so."""
    folder, skipped = Path(folder), Counter() if skipped is None else skipped
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if not folder.is_dir() and not (layout == "manifest" and folder.is_file()):
        raise InputError(f"{folder}: no such folder; name the folder of the pictures")
    count = 0
    try:
        for found in LAYOUTS[layout](folder, skipped):
            count += 1
            yield found
    except (KeyError, AttributeError, TypeError, FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{folder}: not laid out as {layout!r} ({type(error).__name__}: {error}); choose another --layout: {', '.join(LAYOUTS)}") from None
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{folder}: {error}") from None
    if not count:
        passed = f" ({', '.join(f'{n} times {reason}' for reason, n in skipped.items())})" if skipped else ""
        raise InputError(f"{folder}: nothing in the layout {layout!r}{passed}; choose another --layout: {', '.join(LAYOUTS)}")


def check_dataset(folder: str | Path, layout: str = "folder", pictures: int = 200) -> None:
    """Raise InputError, before any weight is read, for annotations that are not whole or pictures of which none is there."""
    first = list(islice(rows := read_dataset(folder, layout), pictures))
    places = [found.path for found in first if found.path is not None]
    if places and not any(p.is_file() for p in places):
        raise InputError(f"{folder}: none of the first {len(places)} pictures is there, such as {places[0]}; download them to where the annotations name them")
    if len(places) == len(first):  # pictures within the files themselves would all be read
        for _ in rows:
            pass
