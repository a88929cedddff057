"""Editors that `vlmedit export` wrote, as `vlmedit edit` uses them: a whole pipeline or an adapter, in a folder or under an id of the Hub.

A picture of any size is shown to the model at about as many pixels as it was trained at (or with `side` pixels along its longer side), its
aspect ratio kept to within the backbone's multiple; the edit comes back at the picture's own size. Noise is drawn on the CPU from a seed per
sample, as the miniature's is [models/pipeline.py], the re-noising of the sampler included: the picture is that of the card's program after
`torch.manual_seed(seed)` on a CPU in the same precision (here float32, the card's is the exported one). A judge, where one is named, is asked
the questions of the training [requests.py].

Code that comes with a folder is run only if it is, byte for byte, the file that `vlmedit export` writes there, or if the user trusts it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from PIL import Image
from torch import Tensor

from vlmedit.data.requests import Request
from vlmedit.errors import InputError
from vlmedit.io import _decode, to_rgb, to_tensor
from vlmedit.networks.backbones import families, family_of
from vlmedit.networks.backbones._base import Family
from vlmedit.networks.checks import check_backbone, complete, looks_like_id, reachable, read_json
from vlmedit.networks.codec import downscale_of
from vlmedit.networks.judges import Judge
from vlmedit.networks.load import DTYPE
from vlmedit.networks.lora import LORA_FILE
from vlmedit.networks.quiet import quiet
from vlmedit.pipelines.export import ABOUT, CODE, HUB_ERRORS, KINDS, code_of, pipeline_class
from vlmedit.pipelines.shapes import Answers, EditOutput, generators
from vlmedit.world.language import Question

SMALL = ["*.json", "*.py", "*.md", "*.txt", "*.jinja"]  # what is downloaded before everything has been checked
FREE_SHARE = 0.8  # of a device's free memory that the weights may fill; more than that, and they wait on the CPU
LIBRARIES = ("diffusers", "transformers")
FORMER = ("c490e53861ccbce470ac971483cd53efe7eb5e675d72b309c84dc9b5d3ed1833",)  # SHA-256 of the files that earlier versions wrote


def local(model: str, whole: bool = False) -> Path:
    """The folder itself, or that of an id of the Hub: its small files, or all of them if `whole`. Raises `InputError` for an id that
    leads nowhere."""
    if not looks_like_id(model):
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=None if whole else SMALL, local_files_only=not reachable()))
    except HFValidationError:
        raise InputError(f"--model {model}: no such folder, and no id of the Hub, which reads OWNER/NAME") from None
    except (*HUB_ERRORS, ValueError) as error:  # no network, no such repository, a private one
        raise InputError(f"--model {model}: no such folder, and no model of the Hub that can be reached ({str(error).splitlines()[0].split('. ')[0]})") from None


@dataclass(frozen=True)
class Exported:
    """An exported editor, known by its small files."""

    name: str  # as it was given
    folder: Path
    kind: str  # full or adapter
    transformer: str
    steps: int
    text_length: int  # tokens
    pixels: int  # of a picture of the training, at most
    multiple: int  # of a picture's width and height
    base: str = ""  # of an adapter
    foreign: tuple[str, ...] = ()  # code that is not ours
    trust: bool = False  # run it

    @property
    def family(self) -> Family:
        return family_of(self.transformer)

    def working_size(self, width: int, height: int, side: int | None = None) -> tuple[int, int]:
        """Width and height at which a picture is shown to the model."""
        scale = side / max(width, height) if side else (self.pixels / (width * height)) ** 0.5
        return tuple(max(1, round(length * scale / self.multiple)) * self.multiple for length in (width, height))


def ours(path: Path, family: Family) -> bool:
    """Whether a file is the one that `vlmedit export` writes for a family, or that an earlier version wrote."""
    code, text = code_of(family), path.read_bytes()
    return code is not None and (text == code.encode() or hashlib.sha256(text).hexdigest() in FORMER)


def foreign_code(folder: Path, family: Family) -> list[str]:
    """Files of code that are not the one `vlmedit export` writes, and components of libraries other than diffusers and transformers."""
    own = folder / CODE
    found = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*.py")) if p != own or not ours(p, family)]
    index = folder / "model_index.json"
    parts = json.loads(index.read_text()) if index.is_file() else {}
    used = [f"{name} of {value[0]}" for name, value in parts.items() if not name.startswith("_") and isinstance(value, list) and value[0] not in (None, *LIBRARIES)]
    return found + used


def find(model: str, trust: bool = False) -> Exported:
    """What the small files of a folder or an id say. Raises `InputError` with everything that is wrong, before any weight is read."""
    folder, known = local(model), {f.transformer for f in families().values() if f.adapter}
    whole = looks_like_id(model)  # the Hub's weights are not here yet
    try:
        about = json.loads((folder / ABOUT).read_text())
        kind, transformer, base = about["kind"], about["transformer"], about.get("base", "")
        counts = {name: int(about[name]) for name in ("steps", "text_length", "pixels")}
        if kind not in KINDS or transformer not in known or min(counts.values()) < 1 or (kind == "adapter") != bool(base):
            raise ValueError(about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--model {model}: its {ABOUT} is not what vlmedit export writes ({type(error).__name__}: {error}); export the run again") from None
    needed = ["scheduler/scheduler_config.json", *(["model_index.json", "vae/config.json"] if kind == "full" else [] if whole else [LORA_FILE])]
    problems = [f"half an editor, it lacks {name}; export the run again" for name in needed if not (folder / name).is_file()]
    if kind == "adapter":
        problems += [f"its base {p.removeprefix('backbone: ')} ({ABOUT} names it)" for p in check_backbone(base, trust=trust)]
    elif not whole:
        problems += [p for part in ("transformer", "vae") for p in complete(str(folder), part)]
    foreign = foreign_code(folder, family_of(transformer))
    if foreign and not trust:
        problems.append(f"brings code of its own ({', '.join(foreign)}), which is not run; read it, and pass --trust-remote-code if you trust it")
    if problems:
        raise InputError([f"--model {model}: {p}".replace("set trust_remote_code=true", "pass --trust-remote-code") for p in problems])
    autoencoder = read_json(base or str(folder), "vae/config.json")
    multiple = downscale_of(autoencoder) * family_of(transformer).multiple
    return Exported(model, folder, kind, transformer, multiple=multiple, base=base, foreign=tuple(foreign), trust=trust, **counts)


@dataclass(frozen=True)
class Fitted:
    """A picture of any size and how it is shown to the model; its pixels are read when they are needed."""

    path: Path
    size: tuple[int, int]  # width and height of the upright original
    shown: tuple[int, int]

    @property
    def view(self) -> Image.Image:
        return to_rgb(_decode(self.path)).resize(self.shown, Image.Resampling.LANCZOS)

    def restore(self, edited: Image.Image) -> Image.Image:
        """An edit at the original's size."""
        return edited.convert("RGB").resize(self.size, Image.Resampling.LANCZOS)


def fit(exported: Exported, path: Path, side: int | None = None) -> Fitted:
    """Check one picture. Raises `InputError` naming the file, what is wrong with it and the remedy."""
    size = _decode(path).size
    shown = exported.working_size(*size, side)
    least = stock.least if (stock := exported.family.stock) else 0
    if min(shown) < least:
        raise InputError(f"{path}: shown at {shown[0]} x {shown[1]}; {exported.transformer} needs {least} pixels along both sides: choose a larger --side")
    return Fitted(path, size, shown)


class Editor:
    """A loaded editor with the methods of the miniature's pipeline that `vlmedit edit` calls."""

    def __init__(self, pipe: DiffusionPipeline, exported: Exported, judge: Judge | None = None):
        self.pipe, self.exported, self.judge = pipe, exported, judge
        pipe.set_progress_bar_config(disable=True)

    def draw(self, view: Image.Image, instruction: str, steps: int, generator: torch.Generator) -> Image.Image:
        """One edit, at the view's size. Raises `InputError` where the memory does not suffice."""
        width, height = view.size
        settings = dict(height=height, width=width, num_inference_steps=steps, max_sequence_length=self.exported.text_length, generator=generator)
        if stock := self.exported.family.stock:
            settings |= {"guidance_scale": 1.0, **stock.settings(width, height)}
        try:
            with noise_from(self.pipe.scheduler, generator):
                return self.pipe(image=view, prompt=instruction, **settings).images[0]
        except torch.OutOfMemoryError:
            raise InputError(f"--model {self.exported.name}: the device's memory does not hold an edit of {width} x {height} pixels; choose a smaller --side") from None
        except (ValueError, TypeError) as error:
            raise InputError(f"--model {self.exported.name}: cannot draw {width} x {height} pixels in {steps} steps: {error}") from error

    def __call__(self, view: Image.Image, instruction: str, num_inference_steps: int, seed: int, num_samples: int = 1) -> EditOutput:
        """One sample after the other: a picture's edits do not depend on how many are drawn."""
        return EditOutput(images=[self.draw(view, instruction, num_inference_steps, g) for g in generators(seed, 1, num_samples)])

    @torch.no_grad()
    def ask(self, view: Image.Image, images: list[Image.Image], instruction: str) -> Answers:
        """The judge's probabilities of the right answers, as in training: was the edit made, is the rest the same?"""
        edit, answer, pair, identity = Request(instruction, instruction, instruction).questions()
        before, found = self.pixels(view), []
        for image in images:
            after = self.pixels(image)
            found.append(self.judge.logit_margin([[before, after] if pair else [after], [before, after]], [edit, identity]).float().cpu().sigmoid())
        p_edit, p_identity = torch.stack(found, 1)
        repeat = lambda question: (question,) * len(images)
        return Answers(p_edit if answer else 1 - p_edit, p_identity, repeat(Question(edit, answer, pair)), repeat(Question(identity, True, True)))

    def pixels(self, image: Image.Image) -> Tensor:
        """(3, H, W) in [-1, 1], where the judge is."""
        return to_tensor(image).to(self.judge.mean.device)

    def best_of(self, view: Image.Image, instruction: str, n: int, **settings) -> EditOutput:
        """Of `n` samples the one the judge likes best (p_edit * p_identity)."""
        images = self(view, instruction, num_samples=n, **settings).images
        answers = self.ask(view, images, instruction)
        k = int(answers.score.argmax())
        chosen = Answers(answers.p_edit[k : k + 1], answers.p_identity[k : k + 1], answers.edit_questions[:1], answers.identity_questions[:1])
        return EditOutput(images=[images[k]], answers=chosen, picked=torch.tensor([k]))


@contextmanager
def noise_from(scheduler: FlowMatchEulerDiscreteScheduler, generator: torch.Generator) -> Iterator[None]:
    """Let the scheduler's fresh noise come from this generator: diffusers' own pipelines pass it none."""
    scheduler.step = functools.partial(scheduler.step, generator=generator)
    try:
        yield
    finally:
        del scheduler.step


def load_pipeline(exported: Exported, dtype: torch.dtype) -> DiffusionPipeline:
    """The exported folder itself, or an adapter upon its base. Code of its own is run only where `exported` says that it may be."""
    folder, settings = local(exported.name, whole=True), {DTYPE: dtype}
    stock = pipeline_class(exported.family)
    if exported.kind == "full":
        loader = DiffusionPipeline if exported.foreign else stock  # foreign code is here only if the user trusts it
        trust = {"trust_remote_code": True} if exported.foreign or not exported.family.stock else {}  # any other code equals ours
        return loader.from_pretrained(folder, **trust, **settings)
    if CODE in exported.foreign:
        pipe = DiffusionPipeline.from_pretrained(exported.base, custom_pipeline=str(folder / CODE), trust_remote_code=True, **settings)
    else:
        pipe = stock.from_pretrained(exported.base, **({"trust_remote_code": True} if exported.trust else {}), **settings)
    pipe.load_lora_weights(str(folder), weight_name=LORA_FILE)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    return pipe


def load(exported: Exported, judge: Judge | None = None) -> Editor:
    """Read the weights: bf16 on a GPU, fp32 on a CPU. Where the GPU's memory does not hold all of them, parts wait in the CPU's.
    Raises `InputError` where they cannot be read."""
    on_gpu = torch.cuda.is_available()
    said = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # the scheduler's further settings are ours [few_step_scheduler]; warnings of them would frighten
    try:
        with quiet():
            pipe = load_pipeline(exported, torch.bfloat16 if on_gpu else torch.float32)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise InputError(f"--model {exported.name}: cannot be loaded: {str(error).splitlines()[0]}") from error
    finally:
        diffusers_logging.set_verbosity(said)
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    if on_gpu and sum(p.numel() * p.element_size() for part in parts for p in part.parameters()) > FREE_SHARE * torch.cuda.mem_get_info()[0]:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to("cuda" if on_gpu else "cpu")
    return Editor(pipe, exported, judge)
