"""What `vlmedit data prepare` leaves: the manifest, and a report of what was proposed, kept and refused, as JSON and as
a page."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageOps

from vlmedit.data.layouts import SKIPPED, Item, write_items
from vlmedit.data.prepare.proposals import REASONS, plain
from vlmedit.errors import InputError
from vlmedit.io import save_json, to_rgb, write_atomic

THUMB, SHOWN = 192, 60  # pixels and number of the report's pictures


class Count:
    """What became of a run's drafts. An instruction that came more than `repeats` times is refused."""

    def __init__(self, lines: Iterable[dict], repeats: int):
        self.items: list[Item] = []
        self.proposed: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.samples: dict[str, str] = {}  # of each reason, the first answer that was refused for it
        self.common: Counter[str] = Counter()
        for line in lines:
            if line["reason"]:
                self.refuse(line["reason"], line["said"])
            for draft in line["drafts"]:
                self.add(line, draft, repeats)

    def refuse(self, reason: str, said: str) -> None:
        self.reasons[reason] += 1
        self.samples.setdefault(reason, said)

    def add(self, line: dict, draft: dict, repeats: int) -> None:
        kind, instruction, reason = draft["kind"], draft["instruction"], draft["reason"]
        self.proposed[kind] += 1
        if not reason:
            self.common[plain(instruction)] += 1
            reason = "too common" if self.common[plain(instruction)] > repeats else ""
        if reason:
            self.refuse(reason, draft["said"] or instruction)
        else:
            self.kept[kind] += 1
            self.items.append(Item(line["image"], instruction, kind, draft["object"], line["caption"], draft["target"]))


def finish(out: Path, settings: dict, lines: Sequence[dict], repeats: int, skipped: Counter) -> dict:
    """Manifest, report.json and report.html from a journal's lines; `settings` are the run's, `skipped` counts what the
    reader of the data set passed over. Raises InputError when no edit was kept, with the report written."""
    count = Count(lines, repeats)
    report = {
        "pictures": len(lines), "kept": len(count.items), "refused": sum(count.reasons.values()),
        "types": {k: {"proposed": n, "kept": count.kept[k]} for k, n in count.proposed.items()},
        "refusals": {
            r: {"times": n, "meaning": REASONS[r], "for example": count.samples[r][:200]}
            for r, n in count.reasons.most_common()
        },
        "skipped": {r: {"times": n, "meaning": SKIPPED[r]} for r, n in skipped.most_common() if n},
        "settings": settings, "repeats": repeats,
    }  # fmt: skip
    save_json(report, out / "report.json")
    write_atomic(out / "report.html", lambda file: file.write(page(report, count.items, out).encode()))
    if not count.items:
        (out / "manifest.jsonl").unlink(missing_ok=True)
        reason, times = count.reasons.most_common(1)[0]
        raise InputError(
            f"{settings['folder']}: none of {len(lines)} pictures gave an edit; {times} refusals because "
            f"{REASONS[reason]}. {out / 'report.html'} shows the answers; a stronger --vlm is the usual remedy"
        )
    write_items(count.items, out / "manifest.jsonl")
    return report


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


def _row(tag: str, cells: Iterable) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(str(c))}</{tag}>' for c in cells)}</tr>"


def _table(head: Iterable, rows: Iterable[Iterable]) -> str:
    return f"<table>{_row('th', head)}{''.join(_row('td', r) for r in rows)}</table>"


def _card(item: Item, out: Path) -> str:
    kind, said, before, after = (html.escape(t) for t in (item.type, item.instruction, item.caption, item.target_caption))
    picture = f'<img alt="{before}" src="data:image/jpeg;base64,{_thumbnail(out / item.image)}">'
    words = f"<b>{kind}</b> {said}<br><i>{before}</i><br>{after}"
    return f"<figure>{picture}<figcaption>{words}</figcaption></figure>"


STYLE = (
    "body{font:14px sans-serif;margin:2em}figure{display:inline-block;width:15em;vertical-align:top;margin:.5em}"
    "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #999;padding:.2em .6em;text-align:left}"
)


def page(report: dict, items: Sequence[Item], out: Path) -> str:
    """The report as one file: counts, refusals with an example each, and pictures with their requests."""
    passed = [(v["meaning"], v["times"]) for v in report["skipped"].values()]
    skipped = f"<h2>Passed over in the data set</h2>{_table(('why', 'times'), passed)}" if passed else ""
    types = [(k, v["proposed"], v["kept"]) for k, v in report["types"].items()]
    refusals = [(v["meaning"], v["times"], v["for example"]) for v in report["refusals"].values()]
    cards = "".join(_card(i, out) for i in items[:: max(1, len(items) // SHOWN)][:SHOWN])
    return (
        f"<!doctype html><meta charset=utf-8><title>Unpaired data</title><style>{STYLE}</style>"
        f"<h1>{report['kept']} requests from {report['pictures']} pictures</h1>{_table(('type', 'proposed', 'kept'), types)}"
        f"<h2>{report['refused']} refusals</h2>{_table(('reason', 'times', 'for example'), refusals)}"
        f"{skipped}<h2>What was kept</h2>{cards}"
    )
