"""Training data of a real run: a manifest of pictures and requests, drawn by edit type and batched by aspect ratio. No field holds a target.

A line of the manifest, as `vlmedit data prepare` writes it (vlmedit/data/layouts.py; .jsonl, or .parquet with these columns):
    {"image": path, "instruction": str, "type": str, "object": str or null, "caption": str, "target_caption": str}
`object` is what a removal removes; `caption` tells what the picture shows, `target_caption` what it would show after the edit.
Relative paths start at the manifest's folder. For size, shards (vlmedit/data/shards.py): tar or parquet files, one or a folder of them, that
hold the pictures themselves; pictures are read from within them when their turn comes.

**Order.** An update's batches are numbered over all processes, and every process counts through all of them, so that one process that
accumulates N batches sees what N processes see. Types are drawn by share, the rows of a type in a shuffled order that is used up before
it is shuffled anew; a row waits until its bucket holds a batch. The position is a handful of integers, saved with the weights.

Shapes: pictures (B, 3, H, W) in [-1, 1], all of one bucket.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vlmedit.config import TrainConfig
from vlmedit.data.batches import UnpairedBatch
from vlmedit.data.layouts import read_items
from vlmedit.data.requests import QUESTIONS, Prompts, Request, batch_of
from vlmedit.data.shards import PictureSource, shard_rows
from vlmedit.errors import InputError, UnknownInstruction
from vlmedit.io import BROKEN, some, to_rgb, to_tensor
from vlmedit.seeds import rng_for
from vlmedit.world.language import TEMPLATES

SAME = {  # names of edit types in other data, as ours
    "addition": "add", "insert": "add", "insertion": "add", "removal": "remove", "delete": "remove", "recolor": "color", "colour": "color",
    "texture": "material", "stylization": "style", "stylize": "style", "adjust": "shape", "motion": "action", "replacement": "replace",
}  # fmt: skip
NOTHING = TEMPLATES["nothing"]
SIDES = re.compile(r"\b(left|right|clockwise|east|west|text|letter|letters|word|words|sign|number)\b", re.I)  # what mirroring would make wrong


@dataclass(frozen=True)
class Row:
    """A line of the manifest."""

    image: PictureSource
    request: Request


def read_manifest(path: str | Path) -> list[Row]:
    """Every row of a manifest, of a shard or of a folder of shards. Raises `InputError` with the rows that cannot be used."""
    path = Path(path)
    if path.is_dir() or (path.is_file() and path.suffix in (".parquet", ".tar")):
        found = shard_rows(path)
    elif not path.is_file():
        raise InputError(f"{path}: no such manifest; write one with vlmedit data prepare, or name another with data=FILE")
    elif path.suffix == ".jsonl":
        found = [(item, Path(item.image)) for item in read_items(path)]
    else:
        raise InputError(f"{path}: unknown ending {path.suffix!r}; a manifest ends with .jsonl or .parquet, a shard with .tar or .parquet")
    problems, rows = [], []
    for item, picture in found:
        kind = item.type.strip().lower()
        lacking = [name for name in ("caption", "target_caption") if not getattr(item, name).strip()]
        if lacking:
            problems.append(f"{picture}, {item.instruction!r}: no {' and no '.join(lacking)}; vlmedit data prepare writes captions")
        elif isinstance(picture, Path) and not picture.is_file():
            problems.append(f"{item.instruction!r}: no picture {picture}")
        else:
            try:
                rows.append(Row(picture, replace(item, type=SAME.get(kind, kind)).request()))
            except ValueError as error:
                problems.append(f"{picture}: {error}")
    if problems:
        raise InputError(some(problems, 20))
    return rows


def check_questions(rows: Sequence[Row], wording: str) -> None:
    """Raise `InputError` for requests that this wording of the judge's questions has no words for."""
    problems = []
    for row in rows:
        try:
            QUESTIONS[wording](row.request)
        except UnknownInstruction as error:
            problems.append(f"{row.image}: questions is {wording!r}, and {error}")
    if problems:
        raise InputError(some(problems, 20))


def nothing_of(request: Request, rng: random.Random) -> Request:
    """The request replaced by "do nothing": the target is the reference."""
    return replace(request, instruction=rng.choice(NOTHING), target_caption=request.reference_caption, type="nothing", thing=None)


def texts_of(rows: Sequence[Row]) -> list[str]:
    """Every prompt that training on these rows may ask for."""
    texts = dict.fromkeys(NOTHING)
    for row in rows:
        texts |= dict.fromkeys((row.request.instruction, row.request.target_caption, row.request.reference_caption))
    return list(texts)


def nearest(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> int:
    """The bucket whose aspect ratio is nearest, in log; of equal ones the first."""
    ratio = np.log(size[0] / size[1])
    return int(np.argmin([abs(ratio - np.log(w / h)) for w, h in buckets]))


MEND = "put a whole one in its place and repeat the command to resume, or remove its rows and begin a new out folder"


def opened(place: PictureSource) -> Image.Image:
    """The picture, its pixels not decoded yet."""
    return Image.open(place if isinstance(place, Path) else io.BytesIO(place.read()))


def picture_size(path: PictureSource) -> tuple[int, int]:
    """Width and height, upright, from the header. Raises `InputError` for what is no picture."""
    try:
        with opened(path) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            return image.size[::-1] if turned else image.size
    except BROKEN as error:
        raise InputError(f"{path}: not a picture ({error}); {MEND}") from None


def load_fitted(path: PictureSource, size: tuple[int, int]) -> Tensor:
    """(3, H, W) in [-1, 1]: scaled to cover the bucket, what protrudes cut off evenly. Raises `InputError` for a damaged picture."""
    try:
        with opened(path) as image:
            upright = to_rgb(ImageOps.exif_transpose(image))
    except BROKEN as error:
        raise InputError(f"{path}: the picture is damaged ({error}); {MEND}") from None
    fitted = ImageOps.fit(upright, size, Image.Resampling.LANCZOS)
    return to_tensor(fitted)


class Order:
    """Which rows the next batch holds. `state_dict` is the position."""

    def __init__(self, kinds: Sequence[str], bucket: Callable[[int], int], batch: int, shares: dict[str, float] | None = None, seed: int = 0):
        self.kinds = {}
        for i, kind in enumerate(kinds):
            self.kinds.setdefault(kind if shares else "all", []).append(i)
        if shares:
            shares = {SAME.get(k, k): v for k, v in shares.items()}
            if lacking := sorted(self.kinds.keys() - shares.keys()):
                raise InputError(f"type_shares names no share of {', '.join(lacking)}, which the manifest holds; add it (0 leaves these rows out)")
            shares = {k: v for k, v in shares.items() if k in self.kinds and v > 0}
            if not shares:
                raise InputError(f"type_shares gives every type of the manifest ({', '.join(sorted(self.kinds))}) a share of 0")
        self.shares = shares or {"all": 1.0}
        self.bucket, self.batch, self.seed = bucket, batch, seed
        self.drawn, self.places, self.waiting = 0, {k: 0 for k in self.shares}, {}
        self._shuffled: dict[str, tuple[int, list[int]]] = {}

    def _row(self) -> int:
        kind = rng_for("type", self.seed, self.drawn).choices(list(self.shares), list(self.shares.values()))[0]
        rows = self.kinds[kind]
        epoch, place = divmod(self.places[kind], len(rows))
        if self._shuffled.get(kind, (-1,))[0] != epoch:
            shuffled = list(rows)
            rng_for("epoch", self.seed, kind, epoch).shuffle(shuffled)
            self._shuffled[kind] = epoch, shuffled
        self.drawn += 1
        self.places[kind] += 1
        return self._shuffled[kind][1][place]

    def next(self) -> tuple[int, list[int]]:
        """A bucket and the rows of a whole batch in it."""
        while True:
            row = self._row()
            bucket = self.bucket(row)
            waiting = self.waiting.setdefault(bucket, [])
            waiting.append(row)
            if len(waiting) == self.batch:
                return bucket, self.waiting.pop(bucket)

    def state_dict(self) -> dict:
        rows = {kind: len(numbers) for kind, numbers in self.kinds.items()}
        return {"drawn": self.drawn, "places": dict(self.places), "waiting": {k: list(v) for k, v in self.waiting.items()}, "rows": rows}

    def load_state_dict(self, state: dict) -> None:
        """Raises InputError when the position is one in other data."""
        now = {kind: len(numbers) for kind, numbers in self.kinds.items()}
        if (then := state.get("rows", now)) != now:
            raise InputError(f"the run stopped with {sum(then.values())} rows of data ({then}) and finds {sum(now.values())} ({now}); give it the data of before, or name a new out folder")
        self.drawn, self.places, self.waiting = state["drawn"], dict(state["places"]), {k: list(v) for k, v in state["waiting"].items()}


class ManifestData:
    """The rows of a manifest as a trainer's data. `prompts` and `questions` turn words into ids."""

    def __init__(self, rows: Sequence[Row], config: TrainConfig, prompts: Prompts, questions: Prompts):
        self.rows, self.config, self.settings, self.prompts, self.questions = rows, config, config.data, prompts, questions
        self._buckets: dict[int, int] = {}
        self.order = Order([r.request.type for r in rows], self.bucket, config.batch, self.settings.type_shares, config.seed)

    def bucket(self, row: int) -> int:
        if row not in self._buckets:
            self._buckets[row] = nearest(picture_size(self.rows[row].image), self.settings.sizes)
        return self._buckets[row]

    def gives(self, kind: type) -> bool:
        return kind is UnpairedBatch

    def batches(self, kind: type, key: tuple, size: int, total: int, mine: Sequence[int]) -> Iterator[tuple[int, UnpairedBatch]]:
        plan = [self.order.next() for _ in range(total)]
        for number in mine:
            yield number, self.load(*plan[number], rng_for("rows", self.config.seed, *key, number))

    def load(self, bucket: int, rows: Sequence[int], rng: random.Random) -> UnpairedBatch:
        """These rows at the size of their bucket, `nothing_share` of them as "do nothing", `flip` of them mirrored."""
        settings, requests, pictures = self.settings, [], []
        for row in (self.rows[i] for i in rows):
            request = nothing_of(row.request, rng) if rng.random() < settings.nothing_share else row.request
            picture = load_fitted(row.image, settings.sizes[bucket])
            mirror = rng.random() < settings.flip and not SIDES.search(f"{request.instruction} {request.target_caption}")
            pictures.append(picture.flip(-1) if mirror else picture)
            requests.append(request)
        return batch_of(requests, torch.stack(pictures), self.prompts, self.questions, settings.questions)

    def labels(self, batch: UnpairedBatch) -> list[tuple[str, str]]:
        return list(zip(batch.types, self.prompts.look_up(batch.instruction), strict=True))

    def state_dict(self) -> dict:
        return self.order.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.order.load_state_dict(state)


class Feed(ManifestData):
    """The batches of one process of a run on real models. `parts` numbers those of an update: (number over all processes, batch)."""

    def __init__(self, rows: Sequence[Row], config, prompts: Prompts, questions: Prompts, rank: int = 0, world: int = 1, device=None):
        super().__init__(rows, SimpleNamespace(batch=config.batch, seed=config.seed, data=config), prompts, questions)
        self.total, self.device = config.accumulate * world, device
        self.mine = range(rank, self.total, world)

    def parts(self, *key) -> list[tuple[int, UnpairedBatch]]:
        """This process's batches of the next update; `key` seeds what is random within them."""
        drawn = self.batches(UnpairedBatch, key, self.config.batch, self.total, self.mine)
        return [(number, batch.to(self.device)) for number, batch in drawn]
