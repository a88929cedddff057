"""A folder of pictures becomes unpaired training data: a vision-language model proposes edits, checks them and writes both captions.

The paper lets Qwen2.5-32B propose instructions per edit category and a VLM check them and write the edited picture's caption
[arXiv:2510.14978, Sec. 4]; its prompts are not published, ours are in proposals.py. Per picture, in words alone:

1. caption: what is to be seen
2. propose: one instruction for each of the types drawn for this picture, with the thing it is about
3. check: can this be done to this picture, yes or no
4. target caption: what the edited picture would show, for the teacher of DMD

Every answer is parsed and may be refused, with one of the reasons in `REASONS`; nothing is repaired. Pictures that look alike (a
difference hash of 256 bits and coarse colors) are taken once, an instruction once per picture and at most `repeats` times altogether.
The journal gets one line per picture, flushed to the disk: after a kill the same command goes on with the next one.

Several processes share the pictures by their names, each with a model and a journal of its own; they never talk to each other. The main
process waits until all pictures are in the journals and writes manifest and report from them, in the data set's order. After a kill any
number of processes goes on. A picture that looks like one of another process is asked about, and dropped at the end.

A `Writer` (writers.py) is a judge of `vlmedit.networks.judges`, or a language model without eyes.
Types are drawn as the released recipe samples them: removals 1/4, the others alike [npedit configs].
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vlmedit.data.layouts import SKIPPED, Found, Item, read_dataset, write_items
from vlmedit.data.prepare.proposals import (
    CAPTION,
    CHECK,
    KINDS,
    PROPOSE,
    REASONS,
    TARGET,
    Refused,
    no_change,
    parse_answer,
    parse_caption,
    parse_proposal,
    plain,
)
from vlmedit.errors import InputError
from vlmedit.io import disk_errors, save_json, to_rgb, to_tensor, write_atomic
from vlmedit.networks.judges.text_vlm import Writer, identity_of

ANSWER_TOKENS = 160
THUMB, SHOWN = 192, 60  # pixels and number of the report's pictures
ALIKE_BITS, ALIKE_COLOR, BANDS = 10, 12, 16  # of 256 bits, of 255; bands of a hash that are looked up
POLL, PATIENCE = 2.0, 3600.0  # seconds between looks at the others' journals, and without a new line in them before the main process gives up


# pictures that look alike


@dataclass(frozen=True)
class Looks:
    """What makes two pictures look alike: brightness rising or falling along each row of a 17 x 16 thumbnail, and 4 x 4 colors."""

    bits: int
    colors: bytes

    @staticmethod
    def of(image: Image.Image) -> Looks:
        gray = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BOX), dtype=np.int16)
        rising = np.packbits(gray[:, 1:] > gray[:, :-1] + 2)  # more than rounding
        return Looks(int.from_bytes(rising.tobytes(), "big"), image.resize((4, 4), Image.Resampling.BOX).tobytes())

    def like(self, other: Looks) -> bool:
        off = np.abs(np.frombuffer(self.colors, np.uint8).astype(int) - np.frombuffer(other.colors, np.uint8)).max()
        return (self.bits ^ other.bits).bit_count() <= ALIKE_BITS and off <= ALIKE_COLOR


class Gallery:
    """Looks of the pictures so far. Two that differ in fewer than BANDS bits share at least one of BANDS bands: only those are compared."""

    def __init__(self):
        self.bands: dict[tuple[int, int], list[Looks]] = {}

    def _keys(self, looks: Looks) -> list[tuple[int, int]]:
        return [(i, looks.bits >> (16 * i) & 0xFFFF) for i in range(BANDS)]

    def has(self, looks: Looks) -> bool:
        return any(looks.like(other) for key in self._keys(looks) for other in self.bands.get(key, ()))

    def add(self, looks: Looks) -> None:
        for key in self._keys(looks):
            self.bands.setdefault(key, []).append(looks)


# the pipeline


@dataclass
class Draft:
    """One edit of one picture on its way."""

    kind: str
    instruction: str = ""
    object: str | None = None
    target: str = ""
    reason: str = ""  # why it was refused
    said: str = ""  # the answer that was


@dataclass
class Work:
    """One picture on its way."""

    found: Found
    image: Image.Image | None = None
    looks: Looks | None = None
    caption: str = ""
    drafts: list[Draft] = field(default_factory=list)
    reason: str = ""
    said: str = ""
    place: str = ""  # of the picture, as the manifest has it

    def line(self) -> dict:
        looks = [f"{self.looks.bits:064x}", self.looks.colors.hex()] if self.looks else None
        words = {"caption": self.caption, "reason": self.reason, "said": self.said[:300], "drafts": [asdict(d) for d in self.drafts]}
        return {"name": _key(self.found), "image": self.place, "looks": looks, **words}


@dataclass(frozen=True)
class Settings:
    """Of a run; a folder holds the run of one."""

    folder: str
    layout: str
    vlm: str
    llm: str | None
    kinds: tuple[str, ...] = tuple(KINDS)
    per_picture: int = 3  # instructions proposed for a picture that comes without one
    side: int = 512  # pixels of the longer side that the model is shown
    seed: int = 0  # of the types drawn

    def __post_init__(self):
        unknown = set(self.kinds) - set(KINDS)
        if unknown or not self.kinds:
            raise InputError(f"unknown edit types {', '.join(sorted(unknown)) or 'none at all'}; known: {', '.join(KINDS)}")
        if not 1 <= self.per_picture <= len(self.kinds):
            raise InputError(f"--per-picture is {self.per_picture}; between 1 and the {len(self.kinds)} edit types can be proposed for a picture")
        if self.side < 32:
            raise InputError(f"--side is {self.side}; the model needs at least 32 pixels to see anything")


def draw_kinds(settings: Settings, name: str) -> list[str]:
    """Types for a picture, without repetition, removals as often as three others; a function of its name alone."""
    rng = random.Random(hashlib.sha256(f"{settings.seed}/{name}".encode()).digest())
    left, out = list(settings.kinds), []
    while len(out) < settings.per_picture:
        out.append(rng.choices(left, [3 if k == "remove" else 1 for k in left])[0])
        left.remove(out[-1])
    return out


class Pipeline:
    """`vlm` describes and checks, `llm` (the same one unless given) proposes and writes target captions."""

    def __init__(self, settings: Settings, vlm: Writer, llm: Writer | None = None):
        self.settings, self.vlm, self.llm = settings, vlm, llm or vlm
        if not getattr(vlm, "sees", True):
            raise InputError(f"{settings.vlm}: a language model without eyes cannot describe or check pictures; name a vision-language model, and this one as --llm")
        self.shows = getattr(self.llm, "sees", True)

    def ask(self, writer: Writer, works: Sequence[Work], texts: Sequence[str], show: bool) -> list[str]:
        if not texts:
            return []
        device = getattr(getattr(writer, "mean", None), "device", "cpu")
        shown = {id(w): to_tensor(w.image, self.settings.side).to(device) for w in works} if show else {}
        return writer.write([[shown[id(w)]] if show else [] for w in works], texts, ANSWER_TOKENS)

    def run(self, works: list[Work]) -> None:
        """All four steps for these pictures, in batches of the open questions."""
        todo = [w for w in works if not w.reason]
        for work in todo:
            work.caption = work.found.caption
        lacking = [w for w in todo if not w.caption]
        for work, said in zip(lacking, self.ask(self.vlm, lacking, [CAPTION] * len(lacking), True), strict=True):
            try:
                work.caption = parse_caption(said, "no caption")
            except Refused as refused:
                work.reason, work.said = str(refused), said
        todo = [w for w in todo if not w.reason]
        for work in todo:
            given = work.found.instruction
            work.drafts = [Draft(work.found.type, given, work.found.object)] if given else [Draft(k) for k in draw_kinds(self.settings, work.found.name)]
        self.step(todo, self.propose, self.llm, self.shows, lambda w, d: not d.instruction)
        for work in todo:
            self.settle(work)
        self.step(todo, self.check, self.vlm, True)
        self.step(todo, self.describe, self.llm, False, lambda w, d: not w.found.target_caption)
        for work in todo:
            for draft in work.drafts:
                draft.target = draft.target or work.found.target_caption
                if not draft.reason and (reason := no_change(draft.kind, draft.object, work.caption, draft.target)):
                    draft.reason, draft.said = reason, draft.target

    def step(self, works: list[Work], one: Callable, writer: Writer, show: bool, wanted: Callable = lambda w, d: True) -> None:
        """Ask about every open draft at once; `one(work, draft)` gives the question, `one(work, draft, answer)` takes the answer."""
        pairs = [(w, d) for w in works for d in w.drafts if not d.reason and wanted(w, d)]
        answers = self.ask(writer, [w for w, _ in pairs], [one(w, d) for w, d in pairs], show)
        for (work, draft), said in zip(pairs, answers, strict=True):
            try:
                one(work, draft, said)
            except Refused as refused:
                draft.reason, draft.said = str(refused), said[:300]

    def propose(self, work: Work, draft: Draft, said: str | None = None) -> str | None:
        if said is None:
            task, example, thing = KINDS[draft.kind]
            view = "You see the picture." if self.shows else f'The picture shows: "{work.caption}"'
            return PROPOSE.format(view=view, task=task, example=example, thing=thing)
        draft.instruction, draft.object = parse_proposal(said, draft.kind)

    def settle(self, work: Work) -> None:
        """What needs no model: given removals name what goes, no instruction comes twice."""
        seen = set()
        for draft in work.drafts:
            if not draft.reason and draft.kind == "remove" and not draft.object:
                draft.reason, draft.said = "no object", draft.instruction
            if not draft.reason and plain(draft.instruction) in seen:
                draft.reason, draft.said = "twice for one picture", draft.instruction
            seen.add(plain(draft.instruction))

    def check(self, work: Work, draft: Draft, said: str | None = None) -> str | None:
        if said is None:
            return CHECK.format(instruction=draft.instruction)
        if not parse_answer(said):
            raise Refused("not possible")

    def describe(self, work: Work, draft: Draft, said: str | None = None) -> str | None:
        if said is None:
            return TARGET.format(caption=work.caption, instruction=draft.instruction)
        draft.target = parse_caption(said, "no target caption")


# the journal


class Journal:
    """One line per picture behind a line of settings; a line that a kill tore is dropped."""

    def __init__(self, path: Path, settings: Settings, identity: dict):
        self.path, self.lines = path, []
        self.head = head = json.loads(json.dumps({"settings": asdict(settings), **identity}))
        if path.exists():
            raw = path.read_bytes()
            lines, whole = whole_lines(path, raw, "delete it to start again, or name a new folder")
            if lines:
                check_head(path, lines[0], head)
            self.lines = lines[1:]
            if whole < len(raw):
                os.truncate(path, whole)
            self.file = open(path, "a", encoding="utf-8")
            if lines:
                return
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a", encoding="utf-8")
        self._write([head])

    def _write(self, lines: list[dict]) -> None:
        with disk_errors(self.path):
            self.file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            self.file.flush()
            os.fsync(self.file.fileno())

    def add(self, works: list[Work]) -> None:
        lines = [w.line() for w in works]
        self._write(lines)
        self.lines += lines


def whole_lines(path: Path, raw: bytes, remedy: str) -> tuple[list[dict], int]:
    """The lines of a journal that were written to their end, and how many bytes they take. Raises InputError for one that is no JSON."""
    whole = raw[: raw.rfind(b"\n") + 1]
    try:
        return [json.loads(line) for line in whole.splitlines()], len(whole)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: damaged ({error}); {remedy}") from None


def check_head(path: Path, old: dict, head: dict) -> None:
    """Raise InputError when a journal is of another run."""
    if old != head:
        before = old.get("settings", {})
        other = [k for k in head["settings"] if before.get(k) != head["settings"][k]] or [k for k in head if old.get(k) != head[k]]
        raise InputError(f"{path.parent}: holds a run of other settings ({', '.join(other)}); name a new folder, or give the settings of before")


class Others:
    """The journals of other processes as they grow; they are read and never written."""

    def __init__(self, journal: Journal, processes: int):
        folder, self.head = journal.path.parent, journal.head
        self.read = dict.fromkeys(sorted({*folder.glob("journal*.jsonl"), *(folder / journal_name(i) for i in range(processes))} - {journal.path}), 0)
        self.lines: list[dict] = []
        self.look()

    def look(self) -> int:
        """Read what came since; a line that is being written waits. Returns how many pictures came."""
        before = len(self.lines)
        for path, at in self.read.items():
            if not path.exists():
                continue
            with open(path, "rb") as file:
                file.seek(at)
                raw = file.read()
            lines, whole = whole_lines(path, raw, "delete it, and its pictures are asked about again")
            if lines and at == 0:
                check_head(path, lines.pop(0), self.head)
            self.lines += lines
            self.read[path] = at + whole
        return len(self.lines) - before


def journal_name(process: int) -> str:
    return f"journal-{process}.jsonl" if process else "journal.jsonl"


def part_of(key: str, processes: int) -> int:
    """The process whose a row is; a function of its name alone, so that nobody has to be told."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % processes


@dataclass(frozen=True)
class Progress:
    """After a batch of pictures."""

    pictures: int
    kept: int
    refused: int


def prepare(
    out: Path, settings: Settings, vlm: Writer, llm: Writer | None = None, batch: int = 8, repeats: int = 20, process: int = 0, processes: int = 1
) -> Iterator[Progress]:
    """Work through the pictures of `settings.folder`, yield after every batch, and write manifest, report and contact sheet into `out`.
    The same call goes on after a kill. Of several `processes`, each does its part, and number 0 also waits, merges and writes.
    Raises InputError where nothing can be used, and where the others stand still."""
    if batch < 1 or repeats < 1:
        raise InputError(f"--batch is {batch} and --repeats {repeats}; both must be at least 1")
    if not 0 <= process < processes:
        raise InputError(f"process {process} of {processes}; they are numbered from 0")
    pipeline = Pipeline(settings, vlm, llm)
    journal = Journal(out / journal_name(process), settings, {"vlm": identity_of(vlm), "llm": identity_of(llm)})
    others = Others(journal, processes)
    mine = lambda key: part_of(key, processes) == process
    known = {line["name"] for line in journal.lines + others.lines}
    gallery = gallery_of(line for line in journal.lines + others.lines if mine(line["name"]))
    order, skipped = {}, Counter()
    rows = in_order(read_dataset(settings.folder, settings.layout, skipped), order)
    fresh = (found for found in rows if mine(_key(found)) and _key(found) not in known)
    while part := list(islice(fresh, batch)):
        works = [look_at(found, gallery) for found in part]
        pipeline.run(works)
        for work in works:
            if any(not d.reason for d in work.drafts):
                work.place = _place(work.found, out)
        journal.add(works)
        others.look()
        yield progress_of(journal, others)
    journal.file.close()
    if process == 0:
        yield from wait_for(journal, others, order, processes)
        finish(out, settings, merged(journal.lines, others.lines, order), repeats, skipped)


def progress_of(journal: Journal, others: Others) -> Progress:
    lines = journal.lines + others.lines
    return Progress(len(lines), *tally(lines))


def wait_for(journal: Journal, others: Others, order: dict, processes: int) -> Iterator[Progress]:
    """Until every picture of the data set is in a journal."""
    lacking, since = order.keys() - {line["name"] for line in journal.lines + others.lines}, time.monotonic()
    while lacking:
        time.sleep(POLL)
        if came := others.look():
            lacking -= {line["name"] for line in others.lines[-came:]}
            since = time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            left = Counter(part_of(key, processes) for key in lacking)
            told = ", ".join(f"process {p} has {n} pictures left" for p, n in sorted(left.items()))
            raise InputError(f"{journal.path.parent}: nothing came from the other processes for {PATIENCE / 60:.0f} minutes ({told}); the same command goes on")
        yield progress_of(journal, others)


def gallery_of(lines: Iterator[dict]) -> Gallery:
    """What a run has seen so far."""
    gallery = Gallery()
    for line in lines:
        if line["looks"] and line["reason"] != "seen before":
            gallery.add(_looks(line))
    return gallery


def _looks(line: dict) -> Looks:
    return Looks(int(line["looks"][0], 16), bytes.fromhex(line["looks"][1]))


def merged(own: list[dict], others: list[dict], order: dict) -> list[dict]:
    """The lines of all journals in the data set's order, of pictures that look alike only the first. One journal alone stays as it is."""
    if not others:
        return own
    gallery, out, last = Gallery(), {}, (len(order), False)
    for line in sorted(own + others, key=lambda line: order.get(line["name"], last)[0]):
        if line["looks"] and line["reason"] != "seen before":
            looks = _looks(line)
            if order.get(line["name"], last)[1] and gallery.has(looks):
                line = {**line, "reason": "seen before", "drafts": []}
            else:
                gallery.add(looks)
        out.setdefault(line["name"], line)
    return list(out.values())


def _key(found: Found) -> str:
    """Of a row: a data set may ask several edits of one picture."""
    return f"{found.name}#{hashlib.sha256(found.instruction.encode()).hexdigest()[:8]}" if found.instruction else found.name


def in_order(rows: Iterator[Found], order: dict) -> Iterator[Found]:
    """Rows without repetition; `order` gets each one's number, and whether it comes without an instruction, when pictures that look alike count once."""
    for row in rows:
        if _key(row) not in order:
            order[_key(row)] = len(order), not row.instruction
            yield row


def look_at(found: Found, gallery: Gallery) -> Work:
    """Open one picture. Rows that bring their own instruction may share a picture; others are taken once."""
    work = Work(found)
    try:
        work.image = found.picture()
    except InputError as error:
        work.reason, work.said = "unsuitable", str(error)
        return work
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        work.reason = "unreadable"
        return work
    work.looks = Looks.of(work.image)
    if not found.instruction and gallery.has(work.looks):
        work.reason = "seen before"
    else:
        gallery.add(work.looks)
    return work


def tally(lines: list[dict]) -> tuple[int, int]:
    """Edits kept and refused so far; a picture without a caption counts as one refusal."""
    drafts = [d for line in lines for d in line["drafts"]]
    kept = sum(not d["reason"] for d in drafts)
    return kept, len(drafts) - kept + sum(bool(line["reason"]) for line in lines)


def finish(out: Path, settings: Settings, lines: list[dict], repeats: int, skipped: Counter) -> dict:
    """Manifest, report.json and report.html from a journal's lines. Raises InputError when no edit was kept, with the report written."""
    items, common = [], Counter()
    counts = {"proposed": Counter(), "kept": Counter()}
    reasons: Counter = Counter()
    samples: dict[str, list[str]] = {}
    for line in lines:
        if line["reason"]:
            reasons[line["reason"]] += 1
            samples.setdefault(line["reason"], []).append(line["said"])
        for draft in line["drafts"]:
            counts["proposed"][draft["kind"]] += 1
            reason = draft["reason"]
            if not reason:
                common[plain(draft["instruction"])] += 1
                reason = "too common" if common[plain(draft["instruction"])] > repeats else ""
            if reason:
                reasons[reason] += 1
                samples.setdefault(reason, []).append(draft["said"] or draft["instruction"])
                continue
            counts["kept"][draft["kind"]] += 1
            items.append(Item(line["image"], draft["instruction"], draft["kind"], draft["object"], line["caption"], draft["target"]))
    report = {
        "pictures": len(lines), "kept": len(items), "refused": sum(reasons.values()),
        "types": {k: {"proposed": counts["proposed"][k], "kept": counts["kept"][k]} for k in counts["proposed"]},
        "refusals": {r: {"times": n, "meaning": REASONS[r], "for example": samples[r][0][:200]} for r, n in reasons.most_common()},
        "skipped": {r: {"times": n, "meaning": SKIPPED[r]} for r, n in skipped.most_common() if n},
        "settings": asdict(settings), "repeats": repeats,
    }  # fmt: skip
    save_json(report, out / "report.json")
    write_atomic(out / "report.html", lambda file: file.write(page(report, items, out).encode()))
    if not items:
        (out / "manifest.jsonl").unlink(missing_ok=True)
        worst = reasons.most_common(1)[0]
        raise InputError(
            f"{settings.folder}: none of {len(lines)} pictures gave an edit; {worst[1]} refusals because {REASONS[worst[0]]}. "
            f"{out / 'report.html'} shows the answers; a stronger --vlm is the usual remedy"
        )
    write_items(items, out / "manifest.jsonl")
    return report


def _place(found: Found, out: Path) -> str:
    """The picture's path as the manifest has it; one from inside another file is written beside the manifest."""
    if found.path is not None:
        return os.path.relpath(found.path, out)
    path = out / "pictures" / Path(found.name).name
    if not path.exists():
        write_atomic(path, lambda file: file.write(found.content()))
    return os.path.relpath(path, out)


def _thumbnail(path: Path) -> str:
    try:
        with Image.open(path) as image:
            small = to_rgb(ImageOps.exif_transpose(image))
    except OSError:  # moved since it was read
        small = Image.new("RGB", (THUMB, THUMB), "white")
    small.thumbnail((THUMB, THUMB))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def page(report: dict, items: list[Item], out: Path) -> str:
    """The report as one file: counts, refusals with an example each, and pictures with their requests."""
    e = html.escape
    line = lambda tag, cells: f"<tr>{''.join(f'<{tag}>{e(str(c))}</{tag}>' for c in cells)}</tr>"
    table = lambda head, rows: f"<table>{line('th', head)}{''.join(line('td', r) for r in rows)}</table>"
    passed = [(v["meaning"], v["times"]) for v in report["skipped"].values()]
    skipped = f"<h2>Passed over in the data set</h2>{table(('why', 'times'), passed)}" if passed else ""
    step = max(1, len(items) // SHOWN)
    cards = "".join(
        f'<figure><img alt="{e(i.caption)}" src="data:image/jpeg;base64,{_thumbnail(out / i.image)}"><figcaption><b>{e(i.type)}</b> {e(i.instruction)}'
        f"<br><i>{e(i.caption)}</i><br>{e(i.target_caption)}</figcaption></figure>"
        for i in items[::step][:SHOWN]
    )
    return (
        "<!doctype html><meta charset=utf-8><title>Unpaired data</title><style>body{font:14px sans-serif;margin:2em}figure{display:inline-block;width:15em;"
        "vertical-align:top;margin:.5em}table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #999;padding:.2em .6em;text-align:left}</style>"
        f"<h1>{report['kept']} requests from {report['pictures']} pictures</h1>"
        f"{table(('type', 'proposed', 'kept'), [(k, v['proposed'], v['kept']) for k, v in report['types'].items()])}"
        f"<h2>{report['refused']} refusals</h2>"
        f"{table(('reason', 'times', 'for example'), [(v['meaning'], v['times'], v['for example']) for v in report['refusals'].values()])}"
        f"{skipped}<h2>What was kept</h2>{cards}"
    )
