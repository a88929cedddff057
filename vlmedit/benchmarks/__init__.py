"""Public benchmarks of instruction editing on local folders: what a judge says of every edit, what CLIP and DINO see, and the sums.

VIEScore [arXiv:2312.14867], as GEdit-Bench uses it [arXiv:2504.17761]: a judge is shown reference and edit and gives two scores in [0, 10],
success and restraint, of which the smaller is SC; it is shown the edit alone and gives naturalness and freedom from artifacts, of which
the smaller is PQ; overall = sqrt(SC PQ) per picture. Averages are over the groups' means, as the benchmark's own script takes them.

| benchmark  | folder, as published                                                         | edits                                                    |
|------------|------------------------------------------------------------------------------|----------------------------------------------------------|
| gedit      | parquet of stepfun-ai/GEdit-Bench, or its rows in metadata.jsonl             | fullset/TASK/LANGUAGE/KEY.png, or KEY.png                |
| imgedit    | singleturn.json or basic_edit.json with pictures, judge_prompt.json or prompts.json [arXiv:2505.20275] | KEY.png                        |
| dreambooth | SUBJECT/*.jpg and prompts_and_classes.txt of google/dreambooth [arXiv:2208.12242] | SUBJECT/NN.png, NN the prompt's number from 00      |

CLIP-T: cosine of edit and text; CLIP-I and DINO: cosine of edit and reference (DreamBooth: mean over the subject's pictures).
Every case keeps its own JSON with the judge's words. The judge is greedy, and its class, revision and weights are on record, with a digest
of the questions: numbers compare between runs of one record alone, case by case (`compare`). The edits that are missing can be drawn by an
exported editor (`draw_edits`). Deviates: the judge is a local model and the questions are in our words, so that numbers do not compare with
those of GPT-4o.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from vlmedit.data.tables import json_rows, parquet_rows
from vlmedit.errors import InputError
from vlmedit.evaluation.statistics import viescore
from vlmedit.io import BROKEN, FORMATS, contact_sheet, save_json, save_picture, some, strip, to_rgb, to_tensor, to_view
from vlmedit.networks.checks import reachable
from vlmedit.networks.judges.text_vlm import Writer, identity_of

SC = (
    "You are a strict judge of image editing. The second image is meant to be an edit of the first by this instruction: {instruction}\n"
    "Give two whole scores from 0 to 10. First, success: 0 if the second image does not follow the instruction at all (two images that look the same are a "
    "failed edit), 10 if it follows it in every detail. Second, restraint: 0 if the second image has nothing in common with the first, 10 if nothing "
    'changed that the instruction does not ask for. Answer with JSON alone: {{"score": [success, restraint], "reasoning": "one short sentence"}}'
)
PQ = (
    "You are a strict judge of picture quality. Give two whole scores from 0 to 10 to this image, whatever it shows. First, naturalness: 0 if light, shadow, "
    "perspective or proportions are wrong throughout, 10 if it looks natural. Second, freedom from artifacts: 0 if it is full of distortions, watermarks, "
    'smears or broken bodies, 10 if there are none. Answer with JSON alone: {"score": [naturalness, artifacts], "reasoning": "one short sentence"}'
)
ANSWER_TOKENS, SHOWN, SIDE = 256, 48, 1024  # of an answer; cases on the sheet; pixels of the longer side that the judge sees


@dataclass(frozen=True)
class Case:
    """One edit to be judged."""

    key: str
    group: str
    instruction: str
    reference: Callable[[], Image.Image]
    edits: tuple[str, ...]  # where the edit may lie, the first that exists counts
    intersection: bool = True  # in the set that every compared model answered, where a benchmark has one
    others: tuple[Path, ...] = ()  # further pictures of the subject
    question: str = ""  # the benchmark's own, where it comes with one
    path: Path | None = None  # of the reference; none where it lies inside another file


def open_picture(source: Path | bytes) -> Image.Image:
    """Upright, RGB as a trainer sees it. Raises InputError for a file that is no picture."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except BROKEN as error:
        raise InputError(f"{'a picture of the benchmark' if isinstance(source, bytes) else source}: not a picture ({error}); make it again") from None


# layouts


def read_gedit(folder: Path, language: str = "en") -> Iterator[Case]:
    """GEdit-Bench: parquet, or metadata.jsonl with the same fields and pictures by path."""
    columns = ["task_type", "key", "instruction", "instruction_language", "input_image", "Intersection_exist"]
    shards = sorted(folder.rglob("*.parquet"))
    for file in shards or [folder / "metadata.jsonl"]:
        for row in parquet_rows(file, columns) if shards else json_rows(file):
            if row["instruction_language"] == language:
                picture = row["input_image"]["bytes"] if shards else file.parent / row["input_image"]
                name, task = f"{row['key']}.png", row["task_type"]
                places = (f"fullset/{task}/{language}/{name}", name)
                path = None if shards else picture
                yield Case(row["key"], task, row["instruction"], lambda picture=picture: open_picture(picture), places, bool(row["Intersection_exist"]), path=path)


def read_imgedit(folder: Path, language: str = "en") -> Iterator[Case]:
    """ImgEdit-Bench, single turn: {key: {"id": picture, "prompt": ..., "edit_type": ...}}, pictures beside it or in singleturn/. Its questions by
    type are in judge_prompt.json, or prompts.json beside basic_edit.json, in that folder or the one above. Raises `InputError` for a folder without them."""
    listed = [p for p in (folder / "singleturn.json", folder / "basic_edit.json", *sorted(folder.rglob("singleturn.json"))) if p.is_file()]
    if not listed:
        raise InputError(f"{folder}: has no singleturn.json or basic_edit.json; name the folder of the unpacked benchmark")
    here = listed[0].parent
    own = next((p for name in ("judge_prompt.json", "prompts.json") for p in (here / name, here.parent / name) if p.is_file()), None)
    questions = json.loads(own.read_text(encoding="utf-8")) if own else {}
    for key, row in json.loads(listed[0].read_text(encoding="utf-8")).items():
        path = next((p for p in (here / row["id"], here / "singleturn" / row["id"]) if p.is_file()), here / row["id"])
        question = questions.get(row["edit_type"], "").replace("<edit_prompt>", row["prompt"])
        yield Case(key, row["edit_type"], row["prompt"], lambda path=path: open_picture(path), (f"{key}.png", f"{key}.jpg"), question=question, path=path)


def read_dreambooth(folder: Path, language: str = "en") -> Iterator[Case]:
    """DreamBooth: every subject with the 25 prompts of its kind; the rare token of the prompts is left out. Raises `InputError` for
    another folder."""
    listed = next(iter(sorted(folder.rglob("prompts_and_classes.txt"))), None)
    if listed is None:
        raise InputError(f"{folder}: has no prompts_and_classes.txt; name the folder of google/dreambooth")
    classes, prompts, live = {}, {False: [], True: []}, False
    for line in listed.read_text(encoding="utf-8").splitlines():
        live = bool(re.match(r"\s*live", line, re.I)) or (live and not re.match(r"\s*object", line, re.I))
        if found := re.search(r"""(['"])(.*\{0\}.*\{1\}.*)\1""", line):
            prompts[live].append(found[2])
        elif (row := next(csv.reader([line]), [])) and len(row) == 2 and (listed.parent / row[0].strip()).is_dir():
            classes[row[0].strip()] = row[1].strip()
    for subject, name in classes.items():
        pictures = sorted(p for p in (listed.parent / subject).iterdir() if p.suffix.lower() in FORMATS)
        if not pictures:
            raise InputError(f"{listed.parent / subject}: no picture of this subject; download the benchmark again")
        for number, prompt in enumerate(prompts[name in ("cat", "dog")]):
            said = " ".join(prompt.format("", name).split())
            where = f"{subject}/{number:02d}.png"
            yield Case(f"{subject}-{number:02d}", subject, said, lambda path=pictures[0]: open_picture(path), (where, where[:-3] + "jpg"), others=tuple(pictures), path=pictures[0])


BENCHMARKS: dict[str, Callable[[Path, str], Iterator[Case]]] = {"gedit": read_gedit, "imgedit": read_imgedit, "dreambooth": read_dreambooth}


def read_benchmark(name: str, folder: str | Path, language: str = "en") -> list[Case]:
    """All cases. Raises InputError for a folder that does not hold the benchmark."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name the folder of the benchmark {name}")
    try:
        cases = list(BENCHMARKS[name](folder, language))
    except (KeyError, TypeError, AttributeError, FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{folder}: not laid out as {name} publishes it ({type(error).__name__}: {error})") from None
    if not cases:
        raise InputError(f"{folder}: no case of {name} in it{f' in the language {language!r}' if name == 'gedit' else ''}")
    keys = [c.key for c in cases]
    if len(set(keys)) < len(keys):
        raise InputError(f"{folder}: {len(keys) - len(set(keys))} keys come twice, for example {next(k for k in keys if keys.count(k) > 1)!r}")
    check_pictures((p for c in cases for p in (c.path, *c.others) if p), "download the benchmark again")
    return cases


def check_pictures(paths: Iterable[Path], remedy: str) -> None:
    """Raise InputError for files that are no pictures by their headers."""
    wrong = []
    for path in dict.fromkeys(paths):
        try:
            Image.open(path).close()
        except BROKEN as error:
            wrong.append(f"{path}: {'no such picture' if isinstance(error, FileNotFoundError) else f'not a picture ({error})'}; {remedy}")
    if wrong:
        raise InputError(some(wrong))


def find_edits(cases: Sequence[Case], edits: Path, partial: bool = False) -> list[tuple[Case, Path]]:
    """Each case with its edit. Raises InputError where edits are missing, or with `partial` where all are."""
    if not edits.is_dir():
        raise InputError(f"{edits}: no such folder; name the folder of the edited pictures")
    found = [(c, next((edits / e for e in c.edits if (edits / e).is_file()), None)) for c in cases]
    lacking = [c for c, path in found if path is None]
    if lacking and (not partial or len(lacking) == len(cases)):
        remedy = "" if len(lacking) == len(cases) else "; --partial measures the others, but such numbers compare with nothing"
        raise InputError(f"{edits}: {len(lacking)} of {len(cases)} edits are missing, for example {lacking[0].edits[0]}{remedy}; --model EDITOR draws them")
    pairs = [(c, path) for c, path in found if path is not None]
    check_pictures((path for _, path in pairs), "make it again")
    return pairs


def draw_edits(cases: Sequence[Case], edits: Path, exported, load: Callable, seed: int = 0) -> Iterator[int]:
    """Let an exported editor [editor.py] draw the edits that are missing, each at its reference's size and from the same seed; yield how many
    are there. `load(exported)` is called if any is. `drawn.json` tells who drew the folder: edits of another editor are refused
    with an `InputError`."""
    place = str(Path(exported.name).resolve()) if Path(exported.name).is_dir() else exported.name
    about, note = {"model": place, "steps": exported.steps, "seed": seed}, edits / "drawn.json"
    if (known := saved(note) or about) != about:
        raise InputError(f"{edits}: holds edits of another {', '.join(k for k in about if known.get(k) != about[k])} (drawn.json); name a new folder with --edits")
    editor = None
    for done, case in enumerate(cases, 1):
        if not any((edits / e).is_file() for e in case.edits):
            if editor is None:
                editor = load(exported)
                save_json(about, note)
            reference = case.reference()
            view = reference.resize(exported.working_size(*reference.size), Image.Resampling.LANCZOS)
            image = editor(view, case.instruction, exported.steps, seed).images[0]
            save_picture(image.convert("RGB").resize(reference.size, Image.Resampling.LANCZOS), edits / case.edits[0])
        yield done


# what a judge says


def parse_scores(text: str) -> list[float] | None:
    """The two numbers in [0, 10] of an answer, or None: nothing is guessed."""
    for at in (m.start() for m in re.finditer(r"\{", text)):
        try:
            found, _ = json.JSONDecoder().raw_decode(text[at:])
        except json.JSONDecodeError:
            continue
        score = found.get("score") if isinstance(found, dict) else None
        if isinstance(score, list) and len(score) == 2 and all(isinstance(s, int | float) and not isinstance(s, bool) and 0 <= s <= 10 for s in score):
            return [float(s) for s in score]
    return None


def parse_lines(text: str) -> float | None:
    """ImgEdit's answers: the mean of the lines that end with a whole number from 1 to 5."""
    found = [int(m[1]) for m in re.finditer(r"^[^\n:]*: *\**([1-5])\**(?:/5)?\.?\s*$", text, re.M)]
    return sum(found) / len(found) if found else None


def judge_cases(judge: Writer, cases: Sequence[Case], references: Sequence[Image.Image], edited: Sequence[Image.Image], side: int = SIDE) -> list[dict]:
    """Answers and scores of a batch; edits are shown at their reference's size."""
    device = getattr(getattr(judge, "mean", None), "device", "cpu")
    before = [to_tensor(r, side).to(device) for r in references]
    after = [to_tensor(e.resize(r.size, Image.Resampling.BICUBIC), side).to(device) for e, r in zip(edited, references)]
    said = judge.write(list(zip(before, after)), [SC.format(instruction=c.instruction) for c in cases], ANSWER_TOKENS)
    seen = judge.write([(a,) for a in after], [PQ] * len(after), ANSWER_TOKENS)
    own = [i for i, c in enumerate(cases) if c.question]
    asked = dict(zip(own, judge.write([(before[i], after[i]) for i in own], [cases[i].question for i in own], ANSWER_TOKENS) if own else ()))
    rows = []
    for i, (sc, pq) in enumerate(zip(said, seen, strict=True)):
        row = {"said": {"sc": sc, "pq": pq}}
        consistency, quality = parse_scores(sc), parse_scores(pq)
        if consistency and quality:
            overall = viescore(torch.tensor([consistency]), torch.tensor([quality]))
            row |= {"SC": min(consistency), "PQ": min(quality), "overall": float(overall), "sub-scores": [*consistency, *quality]}
        if i in asked:
            row["said"]["own"] = asked[i]
            if (score := parse_lines(asked[i])) is not None:
                row["ImgEdit"] = score
        rows.append(row)
    return rows


# what encoders see


@contextmanager
def unreported() -> Iterator[None]:
    """No report of new weights: a DINO's checkpoint has no pooler, and we read none."""
    told = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(told)


class Encoder(nn.Module):
    """Unit features of pictures, and of texts where the model has words: CLIP, or a DINO by its class token (poolers are not trained)."""

    def __init__(self, folder: str, words: bool | None = None):
        """`words`: whether it must have a text tower (CLIP) or must not (DINO). Raises InputError for the other kind, and for no encoder."""
        super().__init__()
        try:
            here = {"trust_remote_code": False, "local_files_only": not reachable()}
            self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **here)
            with unreported():
                self.model = AutoModel.from_pretrained(folder, **here).eval().requires_grad_(False)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **here) if hasattr(self.model, "get_text_features") else None
            if self.tokenizer is None and getattr(self.model, "pooler", None) is not None:
                self.model.pooler = None  # new random weights at every load: DINO's checkpoints have none
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: not a picture encoder of transformers with preprocessor_config.json, by folder or id ({str(error).splitlines()[0]})") from None
        if words is not None and words != (self.tokenizer is not None):
            raise InputError(f"{folder} is {type(self.model).__name__}, which has {'no words' if words else 'words'}; name a {'CLIP' if words else 'DINO'}")

    @torch.no_grad()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, d) of unit length."""
        x = torch.as_tensor(self.processor(list(images), return_tensors="pt")["pixel_values"]).to(self.model.device, self.model.dtype)
        out = self.model.get_image_features(pixel_values=x) if self.tokenizer else self.model(pixel_values=x).last_hidden_state[:, 0]
        return F.normalize(getattr(out, "pooler_output", out).float(), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, d) of unit length, texts cut to the model's length. Raises `InputError` for a model without words."""
        if self.tokenizer is None:
            raise InputError(f"{type(self.model).__name__} has no words; CLIP-T needs a CLIP")
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt").to(self.model.device)
        out = self.model.get_text_features(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])
        return F.normalize(getattr(out, "pooler_output", out).float(), dim=-1).cpu()


def encode_cases(clip: Encoder | None, dino: Encoder | None, cases: Sequence[Case], references: Sequence[Image.Image], edited: Sequence[Image.Image]) -> list[dict]:
    """Cosines of a batch. A subject's pictures are encoded with each of its cases."""
    rows: list[dict] = [{} for _ in cases]
    for name, encoder in (("CLIP-I", clip), ("DINO", dino)):
        if encoder is None:
            continue
        after = encoder.pictures(edited)
        for i, (case, reference) in enumerate(zip(cases, references)):
            known = encoder.pictures([open_picture(p) for p in case.others] or [reference])
            rows[i][name] = float((known @ after[i]).mean())
        if name == "CLIP-I":
            for row, value in zip(rows, (encoder.texts([c.instruction for c in cases]) * after).sum(1).tolist()):
                row["CLIP-T"] = value
    return rows


# a run


def _file(out: Path, key: str) -> Path:
    safe = re.sub(r"[^\w.-]", "_", key)
    return out / "cases" / (f"{safe}.json" if safe == key and len(key) < 120 else f"{safe[:80]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.json")


def saved(path: Path) -> dict | None:
    """A JSON object that a run wrote; None where there is none. Raises InputError for a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); delete it") from None


def record_of(name: str, judge: Writer | None, clip: Encoder | None, dino: Encoder | None, language: str, side: int = SIDE) -> dict:
    """What the numbers of a run depend on, apart from the pictures and the benchmark's own questions, which every case has beside its numbers."""
    questions = hashlib.sha256(json.dumps([SC, PQ, ANSWER_TOKENS, side]).encode()).hexdigest()[:16]
    parts = {"judge": judge, "clip": clip, "dino": dino}
    found = {"benchmark": name, "language": language, "temperature": 0, "questions": questions, **{k: identity_of(v) for k, v in parts.items()}}
    return json.loads(json.dumps(found))


def check_record(record: dict, there: Path) -> None:
    """Raise InputError for another run's folder whose numbers do not compare with those of a run of this record."""
    if (known := saved(there / "record.json")) is None:
        raise InputError(f"{there}: no run of vlmedit bench (it has no record.json); name the --out folder of one")
    if other := [k for k in {**record, **known} if record.get(k) != known.get(k)]:
        raise InputError(f"{there}: measured with another {', '.join(other)}; such numbers do not compare")


def measure(
    name: str, pairs: Sequence[tuple[Case, Path]], out: Path, judge: Writer | None = None, clip: Encoder | None = None, dino: Encoder | None = None, language: str = "en",
    batch: int = 4, side: int = SIDE, total: int | None = None, against: Sequence[Path] = (),
) -> Iterator[int]:  # fmt: skip
    """Judge every edit, yield how many are done after each batch, and write cases/KEY.json, result.json and contact.png. What an earlier run
    of the same record said of the same pictures is kept. `total`: cases of the whole benchmark; `against`: runs that must compare with it.
    Raises `InputError` where they do not, and where nothing is named to measure with."""
    if not (judge or clip or dino):
        raise InputError("nothing to measure with: name a --judge, a --clip or a --dino")
    record = record_of(name, judge, clip, dino, language, side)
    for other in against:
        check_record(record, other)
    known = saved(out / "record.json") or record
    if known != record and any(out.glob("cases/*.json")):  # a run that came to nothing binds nobody
        raise InputError(f"{out}: holds a run with another {', '.join(k for k in record if known.get(k) != record[k])}; name a new folder")
    save_json(record, out / "record.json")
    rows: dict[str, dict] = {}
    todo = []
    for case, path in pairs:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        row = saved(_file(out, case.key)) or {}
        if (row.get("edit"), row.get("instruction"), row.get("question", "")) == (digest, case.instruction, case.question):
            rows[case.key] = row
        else:
            todo.append((case, path, digest))
    if rows:
        yield len(rows)
    left = iter(todo)
    while part := list(islice(left, batch)):
        cases = [c for c, _, _ in part]
        references, edited = [c.reference() for c in cases], [open_picture(path) for _, path, _ in part]
        answers = judge_cases(judge, cases, references, edited, side) if judge else [{} for _ in cases]
        cosines = encode_cases(clip, dino, cases, references, edited)
        for (case, _, digest), said, seen in zip(part, answers, cosines, strict=True):
            own = {"question": case.question} if case.question else {}
            rows[case.key] = {"key": case.key, "group": case.group, "instruction": case.instruction, "intersection": case.intersection, "edit": digest, **own, **said, **seen}
            save_json(rows[case.key], _file(out, case.key))
        yield len(rows)
    ordered = [rows[c.key] for c, _ in pairs]
    save_json({**record, "cases": len(ordered), "of": total or len(ordered), **summarize(ordered)}, out / "result.json")
    save_picture(sheet(pairs, rows), out / "contact.png")


METRICS = ("SC", "PQ", "overall", "ImgEdit", "CLIP-T", "CLIP-I", "DINO")


def summarize(rows: Sequence[dict]) -> dict:
    """Per set (full, and intersection where it is another one): each metric's mean of group means, mean of cases and means by group, over
    the cases that have it; and how many of the judge's answers could not be read."""
    sets = {"full": list(rows)}
    if not all(r["intersection"] for r in rows):
        sets["intersection"] = [r for r in rows if r["intersection"]]
    out: dict = {"sets": {}, "unreadable": sum("said" in r and "overall" not in r for r in rows)}
    for name, chosen in sets.items():
        out["sets"][name] = found = {"n": len(chosen)}
        for metric in METRICS:
            groups = defaultdict(list)
            for row in chosen:
                if metric in row:
                    groups[row["group"]].append(row[metric])
            if groups:
                means = {g: sum(v) / len(v) for g, v in sorted(groups.items())}
                values = [v for part in groups.values() for v in part]
                found[metric] = {"average": sum(means.values()) / len(means), "mean": sum(values) / len(values), "n": len(values), "groups": means}
    return out


def compare(here: Path, there: Path) -> dict:
    """Two finished runs case by case, over the cases that both have: per metric both means, the mean difference, its standard error and the
    share of cases in which `here` is better, ties counted half. Raises InputError for runs whose numbers do not compare."""
    check_record(saved(here / "record.json") or {}, there)
    rows, others = ({row["key"]: row for path in sorted(folder.glob("cases/*.json")) if (row := saved(path))} for folder in (here, there))
    alike = lambda a, b: all(a.get(k) == b.get(k) for k in ("instruction", "question"))
    shared = [(row, others[key]) for key, row in rows.items() if key in others and alike(row, others[key])]
    out: dict = {"here": str(here), "there": str(there), "cases": len(shared), "metrics": {}}
    for metric in METRICS:
        pairs = torch.tensor([(a[metric], b[metric]) for a, b in shared if metric in a and metric in b], dtype=torch.float64)
        if len(pairs):
            off = pairs[:, 0] - pairs[:, 1]
            error = float(off.std() / len(off) ** 0.5) if len(off) > 1 else None
            better = float(((off > 0) + 0.5 * (off == 0)).double().mean())
            here_mean, there_mean = pairs.mean(0).tolist()
            out["metrics"][metric] = {"here": here_mean, "there": there_mean, "difference": float(off.mean()), "standard error": error, "better": better, "n": len(pairs)}
    return out


def sheet(pairs: Sequence[tuple[Case, Path]], rows: dict[str, dict]) -> Image.Image:
    """References and edits with their scores, evenly spaced over the benchmark."""
    step = -(-len(pairs) // SHOWN)
    strips = []
    for case, path in pairs[::step]:
        row = rows[case.key]
        scores = [f"{m} {row[m]:.2f}" for m in METRICS if m in row]
        label = "\n".join("  ".join(scores[i : i + 2]) for i in range(0, len(scores), 2)) or "no readable answer"
        strips.append(strip([to_view(case.reference(), 192), to_view(open_picture(path), 192)], [case.group, label], case.instruction))
    return contact_sheet(strips, 4)
