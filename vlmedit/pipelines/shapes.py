"""The editor as a diffusers pipeline: picture and instruction in, edited picture out, and a judge to ask about it.

The few-step sampler starts at times 1, (n-1)/n, ..., 1/n, moved by the scheduler's `shift`; its default rule "renoise" is what
the unroll trains and what `FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)` does [conventions and rules: flow.py].
The scheduler holds the schedule; calling it without explicit sigmas would waste the last step.

Shapes: pictures (B, 3, S, S) in [-1, 1]; with n samples per picture (B * n, 3, S, S), a picture's samples side by side.

Randomness: `seed` gives every sample a generator of its own, made from (seed, sample number) alone, so a picture's result does
not depend on which others share its batch; sample 0 equals `generator=torch.Generator().manual_seed(seed)`. Generators are the
CPU's, so noise is the same on every device. `generator` follows diffusers: one for the batch, or one per sample.

Loading: importing this module makes the class known to `DiffusionPipeline.from_pretrained`, which looks names up in diffusers.
A program that has not imported it passes `custom_pipeline="pipeline", trust_remote_code=True`; `save_pretrained` leaves the
one-line pipeline.py which that reads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vlmedit import flow
from vlmedit.io import to_tensor
from vlmedit.networks.dit import DiT
from vlmedit.networks.judge import JudgeModel
from vlmedit.networks.quiet import quiet
from vlmedit.seeds import rng_for
from vlmedit.world.language import Question, edit_question, identity_question, normalise, parse_instruction
from vlmedit.world.tokenizer import build_tokenizer, encode

Pictures = Image.Image | Tensor | Sequence[Image.Image | Tensor]
STAGES = {"editor": "npedit", "warm": "copy_warmup", "teacher": "teacher", "judge": "judge", "second_judge": "judge"}  # checkpoint -> what trains it
JUDGES = tuple(role for role, stage in STAGES.items() if stage == "judge")
OUTPUTS = ("pil", "pt", "np")


@dataclass(frozen=True)
class Answers:
    """The judge's probabilities of the right answers, (B,), and what it was asked."""

    p_edit: Tensor
    p_identity: Tensor
    edit_questions: tuple[Question, ...]
    identity_questions: tuple[Question, ...]

    @property
    def score(self) -> Tensor:
        return self.p_edit * self.p_identity


@dataclass
class EditOutput(BaseOutput):
    """`images`: a list of PIL pictures or a tensor; `answers` and `picked` (sample numbers, (B,)): of `best_of` alone."""

    images: list[Image.Image] | Tensor | np.ndarray
    answers: Answers | None = None
    picked: Tensor | None = None


def to_pixels(image: Pictures, side: int) -> Tensor:
    """Pictures as a tensor (B, 3, side, side) in [-1, 1]. PIL pictures are resized; tensors must already fit.

    Raises ValueError for anything else; `vlmedit.io` prepares files of any mode, size and orientation.
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError("no pictures given; pass at least one")
        return torch.cat([to_pixels(one, side) for one in image])
    if isinstance(image, Image.Image):
        if image.width != image.height:
            raise ValueError(f"a picture is {image.width}x{image.height}; this model reads squares: crop or pad it first")
        small = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        return to_tensor(small)[None]
    if not isinstance(image, Tensor):
        raise ValueError(f"a picture is a {type(image).__name__}; pass PIL pictures or a float tensor (B, 3, {side}, {side}) in [-1, 1]")
    image = image[None] if image.ndim == 3 else image
    if image.shape[1:] != (3, side, side) or not image.is_floating_point():
        raise ValueError(f"the pictures are {tuple(image.shape)} {image.dtype}; this model reads float tensors (B, 3, {side}, {side})")
    if not (image.abs() <= 1.01).all():  # false for NaN too
        raise ValueError(f"the pictures span {image.min():.3g} to {image.max():.3g}; values must lie in [-1, 1]")
    return image


def generators(seed: int | Sequence[int], batch: int, samples: int) -> list[torch.Generator]:
    """One CPU generator per sample, sample-minor, from (seed, sample number)."""
    seeds = [seed] * batch if isinstance(seed, int) else list(seed)
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} pictures; pass one for all, or one for each")
    numbers = [s if n == 0 else rng_for("sample", s, n).getrandbits(62) for s in seeds for n in range(samples)]
    return [torch.Generator().manual_seed(int(n)) for n in numbers]


class EditPipeline(DiffusionPipeline):
    """A few-step editor (`transformer`), its schedule, its tokenizer and, if there is one, its judge."""

    model_cpu_offload_seq = "transformer->judge"
    _optional_components = ["judge"]

    def __init__(
        self,
        transformer: DiT,
        scheduler: FlowMatchEulerDiscreteScheduler,
        tokenizer: PreTrainedTokenizerFast,
        judge: JudgeModel | None = None,
    ):
        super().__init__()
        if judge is not None and judge.config.side != transformer.config.side:
            raise ValueError(f"the judge reads {judge.config.side} pixels, the editor draws {transformer.config.side}; train both at one side")
        self.register_modules(transformer=transformer, scheduler=scheduler, tokenizer=tokenizer, judge=judge)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self.set_progress_bar_config(disable=True)

    @property
    def side(self) -> int:
        return self.transformer.config.side

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        super().save_pretrained(save_directory, **kwargs)
        Path(save_directory, "pipeline.py").write_text("from vlmedit import EditPipeline  # noqa: F401\n")

    def times(self, steps: int) -> list[float]:
        """Start times of a sampler of `steps` network calls, from the scheduler."""
        if steps < 1:
            raise ValueError(f"num_inference_steps is {steps}; a sampler needs at least 1")
        self.scheduler.set_timesteps(sigmas=list(flow.few_step_times(steps)))  # unshifted: the scheduler shifts
        return self.scheduler.sigmas[:-1].tolist()

    def requests(self, image: Pictures, instruction: str | Sequence[str]) -> tuple[Tensor, list[str]]:
        """Pixels (B, 3, S, S) and B instructions in the world's words; one of either serves all of the other."""
        texts = [instruction] if isinstance(instruction, str) else list(instruction)
        for text in texts:
            parse_instruction(text)  # raises UnknownInstruction with the nearest words and the grammar
        pixels = to_pixels(image, self.side).to(self.transformer.device, self.transformer.dtype)
        if len(texts) != len(pixels) and 1 not in (len(texts), len(pixels)):
            raise ValueError(f"{len(pixels)} pictures and {len(texts)} instructions; pass one for all, or one for each")
        batch = max(len(texts), len(pixels))
        texts = [normalise(text) for text in texts]
        return pixels.expand(batch, -1, -1, -1), texts * (batch if len(texts) == 1 else 1)

    def velocity(self, reference: Tensor, texts: list[str], samples: int) -> Callable[[Tensor, Tensor], Tensor]:
        """The student as v(x, t). What a reference contributes is computed once per picture and shared by all steps and samples."""
        dit = self.transformer
        text = dit.encode_text(encode(texts, dit.config.text_length, self.tokenizer).to(dit.device))
        many = lambda part: part.repeat_interleave(samples, 0) if samples > 1 else part
        if dit.config.reference_time == "clean":
            known = [(many(k), many(v)) for k, v in dit.encode_reference(reference, text)]
        else:  # the reference is modulated with the target's time, anew in every call
            known = many(reference)
        text = many(text)
        return lambda x, t: dit(x, t, text, known)

    @torch.no_grad()
    def __call__(
        self,
        image: Pictures,
        instruction: str | Sequence[str],
        num_inference_steps: int = 4,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_samples: int = 1,
        sampler: str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> EditOutput | tuple:
        """Edit pictures. `sampler`: renoise, euler or corrector; by default renoise, unless the scheduler is not stochastic.

        `output_type`: "pil", "np" (B * n, S, S, 3) in [0, 1], or "pt" (B * n, 3, S, S) in [-1, 1], which `ask` accepts.
        Raises ValueError (`UnknownInstruction` for the text) naming what cannot be used.
        """
        if output_type not in OUTPUTS:
            raise ValueError(f"unknown output_type {output_type!r}; known: {', '.join(OUTPUTS)}")
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
        if seed is not None and generator is not None:
            raise ValueError("both seed and generator given; pass one of them")
        sampler = sampler or ("renoise" if self.scheduler.config.stochastic_sampling else "euler")
        times = self.times(num_inference_steps)
        reference, texts = self.requests(image, instruction)
        if seed is not None:
            generator = generators(seed, len(texts), num_samples)
        shape = (len(texts) * num_samples, *reference.shape[1:])
        noise = flow.noise_like(shape, generator, reference.device, reference.dtype)
        student = self.velocity(reference, texts, num_samples)
        with self.progress_bar(total=num_inference_steps) as bar:

            def call(x: Tensor, t: Tensor) -> Tensor:
                bar.update()
                return student(x, t)

            images = flow.sample(call, noise, times, sampler, generator).clamp(-1, 1)
        self.maybe_free_model_hooks()
        images = images if output_type == "pt" else self.image_processor.postprocess(images.float(), output_type)
        return EditOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def ask(self, reference: Pictures, output: Pictures, instruction: str | Sequence[str]) -> Answers:
        """Ask the judge whether the edit was made and the rest kept. `output` may hold several samples per reference, sample-minor."""
        if self.judge is None:
            raise ValueError("this pipeline has no judge to ask; load one that has, or train it: vlmedit train judge")
        judge, place = self.judge, dict(device=self.judge.device, dtype=self.judge.dtype)
        before, texts = self.requests(reference, instruction)
        after = to_pixels(output, self.side).to(**place)
        if len(after) % len(texts):
            raise ValueError(f"{len(after)} outputs for {len(texts)} requests; pass the same number of samples for each")
        samples = len(after) // len(texts)
        before = before.to(**place).repeat_interleave(samples, 0)
        texts = [text for text in texts for _ in range(samples)]
        edits = [edit_question(parse_instruction(text), text) for text in texts]
        identities = [identity_question(parse_instruction(text), text) for text in texts]
        questions = edits + identities
        pair = torch.tensor([q.pair for q in questions], device=after.device)
        which = torch.arange(len(questions), device=after.device) % len(after)  # the row's picture
        features = judge.get_image_features(torch.stack((before, after), 1))[which]
        if not pair.all():
            features[~pair] = judge.get_image_features(after[which[~pair], None])
        ids = encode([q.text for q in questions], judge.config.text_length, self.tokenizer).to(after.device)
        sign = torch.tensor([1.0 if q.answer else -1.0 for q in questions], device=after.device)
        right = (sign * judge.yes_no_margin(ids, image_features=features)).sigmoid()
        p_edit, p_identity = right.cpu().chunk(2)
        return Answers(p_edit, p_identity, tuple(edits), tuple(identities))

    def best_of(self, image: Pictures, instruction: str | Sequence[str], n: int = 8, output_type: str = "pil", **kwargs) -> EditOutput:
        """Of `n` samples per picture, the one the judge likes best (p_edit * p_identity). Other arguments as for a call."""
        if output_type not in OUTPUTS:
            raise ValueError(f"unknown output_type {output_type!r}; known: {', '.join(OUTPUTS)}")
        images = self(image, instruction, num_samples=n, output_type="pt", **kwargs).images
        answers = self.ask(image, images, instruction)
        picked = answers.score.view(-1, n).argmax(1)
        rows = (torch.arange(len(picked)) * n + picked).tolist()
        images = images[rows]
        images = images if output_type == "pt" else self.image_processor.postprocess(images.float(), output_type)
        take = lambda questions: tuple(questions[r] for r in rows)
        chosen = Answers(answers.p_edit[rows], answers.p_identity[rows], take(answers.edit_questions), take(answers.identity_questions))
        return EditOutput(images=images, answers=chosen, picked=picked)


diffusers.EditPipeline = EditPipeline  # where DiffusionPipeline.from_pretrained looks the saved class name up


def checkpoint(family: str, role: str) -> Path:
    """Folder of a shipped checkpoint. Raises ValueError for an unknown role, FileNotFoundError naming the command that trains it."""
    if role not in STAGES:
        raise ValueError(f"unknown role {role!r}; known: {', '.join(STAGES)}")
    folder = Path(str(files("vlmedit"))) / "checkpoints" / family / role
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no {role} checkpoint of {family!r} at {folder}; train it: vlmedit train {STAGES[role]}")
    return folder


@quiet()
def assemble(student: Path, judge: Path | None) -> EditPipeline:
    """A pipeline from a saved DiT, with its scheduler if the folder holds one, and a saved judge with its tokenizer."""
    if (student / "scheduler_config.json").is_file():
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(student)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(judge) if judge else build_tokenizer()
    return EditPipeline(DiT.from_pretrained(student), scheduler, tokenizer, JudgeModel.from_pretrained(judge).eval() if judge else None)


def shipped_judge(family: str = "shapes") -> Path | None:
    try:
        return checkpoint(family, "judge")
    except FileNotFoundError:
        return None


def load(name_or_dir: str | os.PathLike = "shapes", role: str = "editor", device=None) -> EditPipeline:
    """A pipeline from a shipped family's name, a folder of `save_pretrained`, or a student's folder (or its training run's).

    Raises ValueError for an unknown name or role, FileNotFoundError when the checkpoint has not been trained yet.
    """
    if role not in STAGES or role in JUDGES:
        raise ValueError(f"unknown role {role!r}; known: {', '.join(r for r in STAGES if r not in JUDGES)}")
    folder = Path(name_or_dir)
    run = folder / "model"  # where a training run leaves its result
    if str(name_or_dir) == "shapes":
        pipe = assemble(checkpoint("shapes", role), shipped_judge())
    elif (folder / "model_index.json").is_file():
        with quiet():
            pipe = EditPipeline.from_pretrained(folder)
    elif (folder / "config.json").is_file() or (run / "config.json").is_file():
        pipe = assemble(run if (run / "config.json").is_file() else folder, shipped_judge())
    else:
        raise ValueError(f"{str(name_or_dir)!r} is no shipped checkpoint (known: shapes) and no folder with a model_index.json or config.json")
    return pipe.to(device) if device else pipe
