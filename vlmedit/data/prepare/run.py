"""A folder of pictures becomes unpaired training data: a vision-language model proposes edits, checks them and writes
both captions.

The paper lets Qwen2.5-32B propose instructions per edit category and a VLM check them and write the edited picture's
caption [arXiv:2510.14978, Sec. 4]; its prompts are not published, ours are in proposals.py. Per picture, in words
alone:

1. caption: what is to be seen
2. propose: one instruction for each of the types drawn for this picture, with the thing it is about
3. check: can this be done to this picture, yes or no
4. target caption: what the edited picture would show, for the teacher of DMD

Every answer is parsed and may be refused, with one of the reasons in `REASONS`; nothing is repaired. Pictures that look
alike (a difference hash of 256 bits and coarse colors) are taken once, an instruction once per picture and at most
`repeats` times altogether. The journal gets one line per picture, flushed to the disk: after a kill the same command
goes on with the next one.

Several processes share the pictures by their names, each with a model and a journal of its own; they never talk to each
other. The main process waits until all pictures are in the journals and writes manifest and report from them, in the
data set's order. After a kill any number of processes goes on. A picture that looks like one of another process is
asked about, and dropped at the end.

A `Writer` (text_vlm.py) is a judge of `vlmedit.networks.judges`, or a language model without eyes.
Types are drawn as the released recipe samples them: removals 1/4, the others alike [npedit configs].
"""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

from PIL import Image

from vlmedit.data.layouts import Found, read_dataset
from vlmedit.data.prepare.dedupe import Gallery, Looks, gallery_of, merged
from vlmedit.data.prepare.journal import Journal, PeerJournals, Progress, journal_name, part_of, progress_of, wait_for
from vlmedit.data.prepare.proposals import (
    CAPTION,
    CHECK,
    KINDS,
    PROPOSE,
    TARGET,
    Refused,
    no_change,
    parse_answer,
    parse_caption,
    parse_proposal,
    plain,
)
from vlmedit.data.prepare.report import finish
from vlmedit.errors import InputError
from vlmedit.io import to_tensor, write_atomic
from vlmedit.networks.judges.text_vlm import Writer, identity_of

ANSWER_TOKENS = 160




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
        looks = self.looks.written() if self.looks else None
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
        """Ask about every open draft at once; `one(work, draft)` gives the question, `one(work, draft, answer)` takes
        the answer."""
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


def prepare(
    out: Path, settings: Settings, vlm: Writer, llm: Writer | None = None, batch: int = 8, repeats: int = 20, process: int = 0, processes: int = 1
) -> Iterator[Progress]:
    """Work through the pictures of `settings.folder`, yield after every batch, and write manifest, report and contact
    sheet into `out`. The same call goes on after a kill. Of several `processes`, each does its part, and number 0 also
    waits, merges and writes. Raises InputError where nothing can be used, and where the others stand still."""
    if batch < 1 or repeats < 1:
        raise InputError(f"--batch is {batch} and --repeats {repeats}; both must be at least 1")
    if not 0 <= process < processes:
        raise InputError(f"process {process} of {processes}; they are numbered from 0")
    pipeline = Pipeline(settings, vlm, llm)
    head = {"settings": asdict(settings), "vlm": identity_of(vlm), "llm": identity_of(llm)}
    journal = Journal(out / journal_name(process), head)
    others = PeerJournals(journal, processes)
    known = {line["name"] for line in journal.lines + others.lines}
    seen = (line for line in journal.lines + others.lines if part_of(line["name"], processes) == process)
    gallery, order, skipped = gallery_of(seen), {}, Counter()
    rows = ((_key(found), found) for found in in_order(read_dataset(settings.folder, settings.layout, skipped), order))
    fresh = (found for key, found in rows if part_of(key, processes) == process and key not in known)
    while part := list(islice(fresh, batch)):
        works = [look_at(found, gallery) for found in part]
        pipeline.run(works)
        for work in works:
            if any(not d.reason for d in work.drafts):
                work.place = _place(work.found, out)
        journal.add([w.line() for w in works])
        others.look()
        yield progress_of(journal, others)
    journal.file.close()
    if process == 0:
        yield from wait_for(journal, others, order, processes)
        finish(out, asdict(settings), merged(journal.lines, others.lines, order), repeats, skipped)


def _key(found: Found) -> str:
    """Of a row: a data set may ask several edits of one picture."""
    return f"{found.name}#{hashlib.sha256(found.instruction.encode()).hexdigest()[:8]}" if found.instruction else found.name


def in_order(rows: Iterator[Found], order: dict) -> Iterator[Found]:
    """Rows without repetition; `order` gets each one's number, and whether it comes without an instruction, when
    pictures that look alike count once."""
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


def _place(found: Found, out: Path) -> str:
    """The picture's path as the manifest has it; one from inside another file is written beside the manifest."""
    if found.path is not None:
        return os.path.relpath(found.path, out)
    path = out / "pictures" / Path(found.name).name
    if not path.exists():
        write_atomic(path, lambda file: file.write(found.content()))
    return os.path.relpath(path, out)
