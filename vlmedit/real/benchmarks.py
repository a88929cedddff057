"""Public benchmarks of instruction editing on local folders: what a judge says of every edit, what CLIP and DINO see, and the sums.

VIEScore [arXiv:2312.14867], as GEdit-Bench uses it [arXiv:2504.17761]: a judge is shown reference and edit and gives two scores in [0, 10],
success and restraint, of which the smaller is SC; it is shown the edit alone and gives naturalness and freedom from artifacts, of which
the smaller is PQ; overall = sqrt(SC PQ) per picture. Averages are over the groups' means, as the benchmark's own script takes them.

| benchmark  | folder, as published                                                         | edits                                                    |
|------------|------------------------------------------------------------------------------|----------------------------------------------------------|
| gedit      | parquet of stepfun-ai/GEdit-Bench, or its rows in metadata.jsonl             | fullset/TASK/LANGUAGE/KEY.png, or KEY.png                |
| imgedit    | singleturn.json or basic_edit.json with pictures; judge_prompt.json [arXiv:2505.20275] | KEY.png                                        |
| dreambooth | SUBJECT/*.jpg and prompts_and_classes.txt of google/dreambooth [arXiv:2208.12242] | SUBJECT/NN.png, NN the prompt's number from 00      |

CLIP-T: cosine of edit and text; CLIP-I and DINO: cosine of edit and reference (DreamBooth: mean over the subject's pictures).
Every case keeps its own JSON with the judge's words. The judge is greedy, and its class, revision and weights are on record, with a digest
of the questions: numbers compare between runs of one record alone. Deviates: the judge is a local model and the questions are in our words,
so that numbers do not compare with those of GPT-4o.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from vlmedit.pictures import FORMATS, InputError, contact_sheet, save_json, save_picture, strip, to_view
from vlmedit.real.datasets import json_rows, parquet_rows
from vlmedit.real.writers import Writer, identity_of, to_tensor
from vlmedit.scores import viescore

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


def open_picture(source: Path | bytes) -> Image.Image:
    """Upright, RGB. Raises InputError for a file that is no picture."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{'a picture of the benchmark' if isinstance(source, bytes) else source}: not a picture ({error}); make it again") from None


# layouts


def read_gedit(folder: Path, language: str = "en") -> Iterator[Case]:
    """GEdit-Bench: parquet, or metadata.jsonl with the same fields and pictures by path."""
    columns = ["task_type", "key", "instruction", "instruction_language", "input_image", "Intersection_exist"]
    shards = sorted(folder.rglob("*.parquet"))
    for file in shards or [folder / "metadata.jsonl"]:
        for row in parquet_rows(file, columns) if shards else json_rows(file):
            if row["instruction_language"] == language:
                picture = row["input_image"]["bytes"] if shards else folder / row["input_image"]
                name, task = f"{row['key']}.png", row["task_type"]
                places = (f"fullset/{task}/{language}/{name}", name)
                yield Case(row["key"], task, row["instruction"], lambda picture=picture: open_picture(picture), places, bool(row["Intersection_exist"]))


def read_imgedit(folder: Path, language: str = "en") -> Iterator[Case]:
    """ImgEdit-Bench, single turn: {key: {"id": picture, "prompt": ..., "edit_type": ...}}."""
    listed = [p for p in (folder / "singleturn.json", folder / "basic_edit.json", *sorted(folder.rglob("singleturn.json"))) if p.is_file()]
    if not listed:
        raise InputError(f"{folder}: has no singleturn.json or basic_edit.json; name the folder of the unpacked benchmark")
    own = listed[0].with_name("judge_prompt.json")
    questions = json.loads(own.read_text(encoding="utf-8")) if own.is_file() else {}
    for key, row in json.loads(listed[0].read_text(encoding="utf-8")).items():
        path = listed[0].parent / row["id"]
        question = questions.get(row["edit_type"], "").replace("<edit_prompt>", row["prompt"])
        yield Case(key, row["edit_type"], row["prompt"], lambda path=path: open_picture(path), (f"{key}.png", f"{key}.jpg"), question=question)


def read_dreambooth(folder: Path, language: str = "en") -> Iterator[Case]:
    """DreamBooth: every subject with the 25 prompts of its kind; the rare token of the prompts is left out."""
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
        for number, prompt in enumerate(prompts[name in ("cat", "dog")] if pictures else ()):
            said = " ".join(prompt.format("", name).split())
            where = f"{subject}/{number:02d}.png"
            yield Case(f"{subject}-{number:02d}", subject, said, lambda path=pictures[0]: open_picture(path), (where, where[:-3] + "jpg"), others=tuple(pictures))


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
    return cases


def find_edits(cases: Sequence[Case], edits: Path, partial: bool = False) -> list[tuple[Case, Path]]:
    """Each case with its edit. Raises InputError where edits are missing, or with `partial` where all are."""
    if not edits.is_dir():
        raise InputError(f"{edits}: no such folder; name the folder of the edited pictures")
    found = [(c, next((edits / e for e in c.edits if (edits / e).is_file()), None)) for c in cases]
    lacking = [c for c, path in found if path is None]
    if lacking and (not partial or len(lacking) == len(cases)):
        remedy = "" if len(lacking) == len(cases) else "; --partial measures the others, but such numbers compare with nothing"
        raise InputError(f"{edits}: {len(lacking)} of {len(cases)} edits are missing, for example {lacking[0].edits[0]}{remedy}")
    return [(c, path) for c, path in found if path is not None]


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


class Encoder(nn.Module):
    """Unit features of pictures, and of texts where the model has words: CLIP, or a DINO by its class token (poolers are not trained)."""

    def __init__(self, folder: str):
        super().__init__()
        try:
            self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
            self.model = AutoModel.from_pretrained(folder, trust_remote_code=False).eval().requires_grad_(False)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if hasattr(self.model, "get_text_features") else None
            if self.tokenizer is None and getattr(self.model, "pooler", None) is not None:
                self.model.pooler = None  # new random weights at every load: DINO's checkpoints have none
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: not a picture encoder of transformers with preprocessor_config.json, by folder or id ({str(error).splitlines()[0]})") from None

    @torch.no_grad()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, d)"""
        x = torch.as_tensor(self.processor(list(images), return_tensors="pt")["pixel_values"]).to(self.model.device, self.model.dtype)
        out = self.model.get_image_features(pixel_values=x) if self.tokenizer else self.model(pixel_values=x).last_hidden_state[:, 0]
        return F.normalize(getattr(out, "pooler_output", out).float(), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, d), cut to the model's length."""
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


def record_of(name: str, judge: Writer | None, clip: Encoder | None, dino: Encoder | None, language: str, side: int = SIDE) -> dict:
    """What the numbers of a run depend on, apart from the pictures."""
    questions = hashlib.sha256(json.dumps([SC, PQ, ANSWER_TOKENS, side]).encode()).hexdigest()[:16]
    parts = {"judge": judge, "clip": clip, "dino": dino}
    return {"benchmark": name, "language": language, "temperature": 0, "questions": questions, **{k: identity_of(v) for k, v in parts.items()}}


def measure(
    name: str, pairs: Sequence[tuple[Case, Path]], out: Path, judge: Writer | None = None, clip: Encoder | None = None, dino: Encoder | None = None, language: str = "en",
    batch: int = 4, side: int = SIDE, total: int | None = None,
) -> Iterator[int]:  # fmt: skip
    """Judge every edit, yield how many are done after each batch, and write cases/KEY.json, result.json and contact.png. What an earlier run
    of the same record said of the same pictures is kept. `total`: cases of the whole benchmark."""
    if not (judge or clip or dino):
        raise InputError("nothing to measure with: name a --judge, a --clip or a --dino")
    record = json.loads(json.dumps(record_of(name, judge, clip, dino, language, side)))
    known = json.loads((out / "record.json").read_text()) if (out / "record.json").is_file() else record
    if known != record:
        raise InputError(f"{out}: holds a run with another {', '.join(k for k in record if known.get(k) != record[k])}; name a new folder")
    save_json(record, out / "record.json")
    rows: dict[str, dict] = {}
    todo = []
    for case, path in pairs:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        file = _file(out, case.key)
        row = json.loads(file.read_text()) if file.is_file() else {}
        if row.get("edit") == digest and row.get("instruction") == case.instruction:
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
            rows[case.key] = {"key": case.key, "group": case.group, "instruction": case.instruction, "intersection": case.intersection, "edit": digest, **said, **seen}
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
