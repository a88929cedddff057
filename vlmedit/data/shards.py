"""Shards: pictures and words together in a few large files, because a million small files are slow to copy, list and open.

| kind    | a file holds                                                                                                             |
|---------|--------------------------------------------------------------------------------------------------------------------------|
| tar     | KEY.jpg beside KEY.json for every request, as webdataset groups them                                                     |
| parquet | a row per request: `image`, a struct of bytes and path as Hugging Face datasets holds pictures, and the manifest's words |

Shards of others are read too, if they have these names; `type` and `object` may be missing. The no-pair rule [arXiv:2510.14978, Sec. 3]:
of a parquet row only these columns are read from the disk, whatever stands beside them; a tar key with two pictures is refused, because
one of them may be a target.

Words are read at once, pictures when they are called for. A picture in a tar file is read from its offset; parquet reads no less than a
row group's column, so our groups are small, and a group of more than GROUP_BYTES is refused. Shards are never given to processes as files:
processes split the rows, so that any number of processes reads any number of shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path

from PIL import Image

from vlmedit.data.layouts import Item
from vlmedit.data.tables import parquet_library, whole_parquet
from vlmedit.errors import InputError
from vlmedit.io import BROKEN, disk_errors, some, write_atomic

SHARDS = ("tar", "parquet")
WORDS = tuple(f.name for f in fields(Item) if f.name != "image")
NEEDED = ("image", "instruction", "caption", "target_caption")
ROW_GROUP = 8  # pictures in a row group of ours
GROUP_BYTES = 256 * 2**20  # of a row group's pictures at most: all are read for each one
TAR_END = 1024  # zero bytes that close a tar file


@dataclass(frozen=True)
class Slice:
    """A picture inside a tar file."""

    path: Path
    offset: int
    size: int
    name: str = ""

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return f"{self.name} in {self.path}"


@dataclass(frozen=True)
class ParquetPicture:
    """A picture inside a parquet file."""

    path: Path
    group: int
    row: int  # within its group
    name: str = ""

    def read(self) -> bytes:
        return _contents(self.path, self.group, self.path.stat().st_mtime_ns)[self.row]

    def __str__(self) -> str:
        return f"{self.name} in {self.path}"


PictureSource = Path | Slice | ParquetPicture


@lru_cache(maxsize=2)
def _contents(path: Path, group: int, changed: int) -> list[bytes | None]:
    """The pictures of a row group. `changed`: the file's time, so that another file of the name is not taken for it."""
    with whole_parquet(path) as file:
        return [row and row["bytes"] for row in file.read_row_group(group, columns=["image.bytes"])["image"].to_pylist()]


# writing


def _suffix(item: Item) -> str:
    return Path(item.image).suffix.lower() or ".png"


def _tar_bytes(part: list[tuple[str, Item, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for key, item, content in part:
            words = {**asdict(item), "image": f"{key}{_suffix(item)}"}
            for name, data in ((f"{key}{_suffix(item)}", content), (f"{key}.json", json.dumps(words, ensure_ascii=False).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def _parquet_bytes(part: list[tuple[str, Item, bytes]]) -> bytes:
    pyarrow, parquet = parquet_library()
    rows = [{**asdict(item), "image": {"bytes": content, "path": f"{key}{_suffix(item)}"}} for key, item, content in part]
    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    features = {"image": {"_type": "Image"}, **{name: {"dtype": "string", "_type": "Value"} for name in WORDS}}  # datasets decodes by these
    schema = pyarrow.schema([("image", picture), *((name, pyarrow.string()) for name in WORDS)], {"huggingface": json.dumps({"info": {"features": features}})})
    out = io.BytesIO()  # pictures are compressed already
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), out, row_group_size=ROW_GROUP, compression="none", use_dictionary=False)
    return out.getvalue()


def _no_picture(path: str) -> str:
    """What is wrong with a file of pixels by its header, or nothing."""
    if not os.path.isfile(path):
        return f"{path}: no such picture; the manifest names it"
    try:
        Image.open(path).close()
    except BROKEN as error:
        return f"{path}: not a picture ({error}); remove its lines from the manifest"
    return ""


def write_shards(items: list[Item], out: Path, kind: str = "tar", per_shard: int = 1000) -> list[Path]:
    """Pictures' own bytes and words, so many to a file. A shard that is there is not written again. Raises InputError for a picture that
    cannot be read, before anything is written."""
    if kind not in SHARDS or per_shard < 1:
        raise InputError(f"--kind is {kind!r} and --per-shard {per_shard}; known kinds: {', '.join(SHARDS)}, with at least 1 picture each")
    if kind == "parquet":
        parquet_library()
    if lacking := [problem for name in dict.fromkeys(item.image for item in items) if (problem := _no_picture(name))]:
        raise InputError(some(lacking))
    encode = _tar_bytes if kind == "tar" else _parquet_bytes
    mark = hashlib.sha256(json.dumps([kind, per_shard, *(asdict(i) for i in items)]).encode()).hexdigest()
    if _index(out).get("manifest", mark) != mark:
        raise InputError(f"{out}: holds shards of another manifest; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    about = {"manifest": mark, "kind": kind, "items": len(items), "per_shard": per_shard}
    write_atomic(out / "shards.json", lambda file: file.write(json.dumps(about).encode()))
    paths = []
    with disk_errors(out):
        for first in range(0, len(items), per_shard):
            path = out / f"{first // per_shard:06d}.{kind}"
            paths.append(path)
            if not path.exists():
                part = [(f"{first + i:09d}", item, Path(item.image).read_bytes()) for i, item in enumerate(items[first : first + per_shard])]
                write_atomic(path, lambda file, part=part: file.write(encode(part)))
    return paths


def _index(folder: Path) -> dict:
    """What `write_shards` noted about a folder; nothing where shards come from elsewhere."""
    path = folder / "shards.json"
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); write the shards into a new folder") from None
    return found if isinstance(found, dict) else {}


# reading


def _told(path: Path, problems: list[str]) -> None:
    if problems:
        raise InputError(some([f"{path}: {p}" for p in problems], what=f" rows of {path}"))


def _item(words: dict, name: str) -> Item:
    return Item(**{"image": name, **{k: words[k] for k in WORDS if words.get(k) is not None}})


def _tar_rows(path: Path) -> list[tuple[Item, PictureSource]]:
    pictures: dict[str, list[Slice]] = {}
    words: dict[str, dict] = {}
    problems, endings = [], Image.registered_extensions()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                folder, _, name = member.name.rpartition("/")
                key = f"{folder}/{name.partition('.')[0]}"  # webdataset's
                if Path(name).suffix.lower() in endings:
                    pictures.setdefault(key, []).append(Slice(path, member.offset_data, member.size, member.name))
                elif name.endswith(".json"):
                    pictures.setdefault(key, [])
                    try:
                        words[key] = json.loads(tar.extractfile(member).read())
                    except ValueError as error:
                        problems.append(f"{member.name}: not JSON ({error})")
            tar.fileobj.seek(-TAR_END, os.SEEK_END)
            if any(tar.fileobj.read()):
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path}: not a whole tar shard ({error}); copy or write it again") from None
    rows = []
    for key, found in pictures.items():
        about, key = words.get(key), key.lstrip("/")
        if len(found) > 1:
            problems.append(f"{key} has {len(found)} pictures ({', '.join(s.name for s in found)}); of unpaired data there is one, the input")
        elif not found or not isinstance(about, dict):
            problems.append(f"{key} has {'no words (KEY.json, an object)' if found else 'no picture'}; write the shard again")
        else:
            try:
                rows.append((_item(about, found[0].name), found[0]))
            except (TypeError, ValueError) as error:
                problems.append(f"{key}: {error}")
    _told(path, problems)
    return rows


def _check_columns(path: Path, schema) -> bool:
    """Whether pictures lie within the file. Raises InputError for columns that are missing or of another kind."""
    types = parquet_library()[0].types
    names = schema.names
    if lacking := [name for name in NEEDED if name not in names]:
        raise InputError(f"{path}: lacks the columns {', '.join(lacking)}; it has {', '.join(names)}")
    text = lambda kind: types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind) or (types.is_dictionary(kind) and text(kind.value_type))
    wrong = [f"{name} ({schema.field(name).type})" for name in WORDS if name in names and not text(schema.field(name).type)]
    if wrong:
        raise InputError(f"{path}: the columns {', '.join(wrong)} must hold text; are columns mixed up?")
    image = schema.field("image").type
    if types.is_struct(image) and "bytes" in (inner := {image.field(i).name: image.field(i).type for i in range(image.num_fields)}):
        if types.is_binary(inner["bytes"]) or types.is_large_binary(inner["bytes"]):
            return True
    if not text(image) or types.is_null(image):
        raise InputError(f"{path}: the column image holds {image}; it must hold paths, or structs of bytes and path as datasets writes pictures")
    return False


def _held(path: Path, file, group: int) -> list[bool]:
    """Which rows of a group hold their picture's bytes; as a rule its statistics tell that all do."""
    about = file.metadata.row_group(group)
    chunk = next(about.column(i) for i in range(about.num_columns) if about.column(i).path_in_schema == "image.bytes")
    if chunk.total_uncompressed_size > GROUP_BYTES and about.num_rows > 1:
        raise InputError(
            f"{path}: a row group of {about.num_rows} rows has {chunk.total_uncompressed_size / 2**20:.0f} MiB of pictures, and for each one all are read; "
            f"write it again in smaller groups, of at most {max(1, about.num_rows * GROUP_BYTES // chunk.total_uncompressed_size)} rows"
        )
    if chunk.statistics is not None and chunk.statistics.has_null_count and chunk.statistics.null_count == 0:
        return [True] * about.num_rows
    return [content is not None for content in _contents(path, group, path.stat().st_mtime_ns)]


def _parquet_rows(path: Path) -> list[tuple[Item, PictureSource]]:
    """Items of a parquet file and where their pictures are: within it, or at paths that start at its folder."""
    rows, problems, number = [], [], 0
    with whole_parquet(path) as file:
        within = _check_columns(path, file.schema_arrow)
        columns = [name for name in WORDS if name in file.schema_arrow.names]
        named = not within or any(f.name == "path" for f in file.schema_arrow.field("image").type)
        if named:
            columns.append("image.path" if within else "image")
        for group in range(file.num_row_groups):
            held = _held(path, file, group) if within else None
            for i, row in enumerate(file.read_row_group(group, columns=columns).to_pylist()):
                number += 1
                name = (row.get("image") or {}).get("path") if within else row["image"]
                if within and held[i]:
                    place = ParquetPicture(path, group, i, name or f"row {number}")
                elif name:
                    place = path.parent / name
                else:
                    problems.append(f"row {number} holds no picture; remove it or write the file again")
                    continue
                try:
                    rows.append((_item(row, name or f"row {number}"), place))
                except ValueError as error:
                    problems.append(f"row {number}: {error}")
    _told(path, problems)
    return rows


def shard_rows(path: str | Path) -> list[tuple[Item, PictureSource]]:
    """The items of one shard, or of a folder of shards by name, and where their pictures are. Raises InputError for anything else, for a
    shard that is cut short or empty, and for shards that were written together and are not all there."""
    path = Path(path)
    if path.is_file():
        rows = _tar_rows(path) if path.suffix == ".tar" else _parquet_rows(path)
        if not rows:
            raise InputError(f"{path}: an empty shard; delete it, or write it again")
        return rows
    paths = sorted(p for p in path.glob("*") if p.suffix[1:] in SHARDS and not p.name.startswith("."))
    if not paths:
        deeper = sorted({str(p.parent) for kind in SHARDS for p in path.glob(f"*/*.{kind}")})
        packed = [p for p in path.glob("*.tar.*") if not p.name.startswith(".")]  # of a packed tar no member can be read by its place
        remedy = f"there are some in {deeper[0]}" if deeper else f"unpack {packed[0].name} to a plain .tar" if packed else "vlmedit data shards writes them"
        raise InputError(f"{path}: no shards in this folder; {remedy}")
    if len(kinds := {p.suffix for p in paths}) > 1:
        raise InputError(f"{path}: shards of two kinds ({' and '.join(sorted(kinds))}); keep one kind in a folder, or the same pictures count twice")
    found, problems = [], []
    for p in paths:
        try:
            found += shard_rows(p)
        except InputError as error:
            problems += error.problems
    expected = _index(path).get("items", len(found))
    if not problems and len(found) != expected:
        problems = [f"{path}: {len(found)} requests in {len(paths)} shards, shards.json counts {expected}; the command that wrote them writes what is missing"]
    if problems:
        raise InputError(some(problems))
    return found


def read_shards(folder: str | Path, rank: int = 0, world: int = 1, skip: int = 0) -> Iterator[tuple[Item, bytes]]:
    """Items and their pictures' bytes in order: of `world` readers each takes every world-th row, and starts after its own first `skip`."""
    for item, place in shard_rows(folder)[rank::world][skip:]:
        yield item, place.read_bytes() if isinstance(place, Path) else place.read()
