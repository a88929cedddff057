"""NP-Edit on real models: the miniature's update (`vlmedit.methods.npedit.NPEdit`) under a loop for large weights [arXiv:2510.14978].

Per update, as released: every process unrolls the student at the same times on its own batches and adds up their gradients; one step of
the student; then `fake_updates` steps of the fake score, each on fresh batches and rollouts (or on the student's own, "shared").

What is added to the miniature's loop: accumulation, weights in two precisions, roles that wait on the CPU, shards, guidance by edit type,
a data position, trackers with picture strips. Randomness is seeded per batch of an update, numbered over all processes: N processes and
one process that accumulates N batches draw the same noise, and a resumed run draws what it would have drawn.

Shapes: pictures (B, 3, H, W) in [-1, 1]; latents (B, C, h, w). Deviates from the released code: see settings.py, whose defaults are its own.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch._dynamo import list_backends

from vlmedit import io as pictures
from vlmedit.data.batches import UnpairedBatch
from vlmedit.data.manifest import Feed, check_questions, read_manifest, texts_of
from vlmedit.equations.unroll import draw_times
from vlmedit.errors import ConfigError, InputError
from vlmedit.flow import flow_matching_loss, guide, logit_normal_time
from vlmedit.io import save_json, to_image
from vlmedit.methods.npedit import NPEdit
from vlmedit.networks.checks import check_backbone, check_judge, check_start
from vlmedit.networks.load import load_backbone, load_codec, load_judges, load_roles, placed, prompts_of, save_student
from vlmedit.networks.lora import Roles
from vlmedit.networks.prompt_cache import encoded
from vlmedit.networks.prompts import PromptEmbeddings, PromptTable
from vlmedit.networks.quiet import quiet
from vlmedit.protocols import Prompts
from vlmedit.seeds import rng_for, seed_torch
from vlmedit.testing import PREFIX, resolve
from vlmedit.training.checkpoints import Checkpoints
from vlmedit.training.gathered import Gathered, wanted
from vlmedit.training.offload import Offloaded
from vlmedit.training.optimizer import EMA, Optimizer, adamw
from vlmedit.training.run import Step, make_accelerator
from vlmedit.training.settings import CopyConfig, RealConfig
from vlmedit.training.trackers import Trackers

STRIP = 4  # pictures of a strip
MODE_FILE = "student.json"  # beside a saved student: the mode it was trained in


class Guided(nn.Module):
    """The teacher under classifier-free guidance, each row with a scale of its own, set before the call. `always`: the unconditional score
    is asked even of a batch whose scales are all 1, because processes that share weights must call them equally often."""

    def __init__(self, teacher: nn.Module, always: bool = False):
        super().__init__()
        self.teacher, self.always, self.scale = teacher, always, torch.ones(1)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        v = self.teacher(x, t, text)
        if not self.always and bool((self.scale == 1).all()):
            return v
        return guide(v, self.teacher(x, t, torch.zeros_like(text)), self.scale.to(x).view(-1, 1, 1, 1))


PRESENT = {  # who is needed while a part of the update runs; the student's graph waits from its unroll to its backward
    "data": (), "student": ("student",), "rollout": ("student",), "teacher": ("student", "teacher", "fake"), "judge": ("student", "judge"), "fake": ("fake",),
}  # fmt: skip


class RealEdit(NPEdit):
    """`NPEdit` with guidance by edit type and roles that wait on the CPU. `seconds` is wall time by part."""

    def __init__(self, config: RealConfig, roles: Roles, judge: nn.Module, codec, device: torch.device):
        always = config.guidance != 1 or (config.guidance_strong != 1 and bool(config.strong_types))
        super().__init__(config.npedit(), roles.student, roles.fake, Guided(roles.teacher, always), judge, codec)
        self.real, self.seconds, self.part = config, {}, self.clock
        modules = dict(student=roles.student, fake=roles.fake, teacher=roles.teacher, judge=judge)
        self.waiting = {role: Offloaded(modules[role], device) for role in config.offload}
        for role in {"student", "fake"} & self.waiting.keys():
            self.waiting[role].enter()  # optimizers and averages are made, or restored, where their weights are

    @contextmanager
    def clock(self, part: str):
        for role, waiting in self.waiting.items():
            if role not in PRESENT[part] and part != "data":
                waiting.leave()
        for role in PRESENT[part]:
            if role in self.waiting:
                self.waiting[role].enter()
        began = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began

    def output_gradients(self, batch: UnpairedBatch, output: Tensor, step: int):
        c = self.real
        self.teacher.scale = torch.tensor([c.guidance_strong if kind in c.strong_types else c.guidance for kind in batch.types])
        return super().output_gradients(batch, output, step)


class RealRun:
    """The frame of a real run: folder, checkpoints, log. `steps()` yields the update indices still to do."""

    def __init__(self, config: RealConfig, accelerator: Accelerator | None = None):
        self.config, self.accelerator = config, accelerator or make_accelerator(config)
        self.device, self.folder = self.accelerator.device, Path(config.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(config, self.accelerator)
        self.writer: Trackers | None = None

    def steps(self) -> Iterator[int]:
        start = self.checkpoints.resume()
        if self.accelerator.is_main_process:
            self.config.save(self.folder / "config.json")
            if self.config.trackers and start < self.config.steps:
                self.writer = Trackers(self.accelerator, self.config, start)
        try:
            for index in range(start, self.config.steps):
                seed_torch("update", self.config.seed, index, self.accelerator.process_index)
                began = time.process_time()
                self.metrics: dict[str, float] = {}
                yield index
                self.metrics["cpu_seconds"] = time.process_time() - began
                if self.writer:
                    self.writer.log(self.metrics, index + 1)
                if (index + 1) % self.config.save_every == 0 or index + 1 == self.config.steps:
                    self.checkpoints.save(index + 1)
        finally:
            if self.writer:
                self.writer.close()

    def done(self, index: int, **shown: Tensor) -> Step:
        """The record of an update."""
        skipped = bool(self.metrics.get("skipped", 0))
        return Step(index + 1, self.config.steps, dict(self.metrics), skipped, {k: v.detach().cpu() for k, v in shown.items()})

    def show(self, index: int, batch: UnpairedBatch, output: Tensor, prompts: Prompts) -> None:
        """A strip of references and edits, into `out`/strips and the trackers."""
        if not self.accelerator.is_main_process:
            return
        shown, labels = [], []
        for reference, edit, words, kind in zip(batch.reference[:STRIP], output[:STRIP], prompts.look_up(batch.instruction), batch.types):
            shown += [to_image(reference), to_image(edit)]
            labels += [kind, words[:60]]
        strip = pictures.strip(shown, labels, f"update {index + 1}")
        (self.folder / "strips").mkdir(exist_ok=True)
        pictures.save_picture(strip, self.folder / "strips" / f"{index + 1:06d}.png")
        if self.writer:
            self.writer.add_strip(strip, index + 1)


def prepared(config: RealConfig, folder: Path | None = None) -> RealConfig:
    """The settings with every "tiny:" place made, in `folder`; by default in the run's own."""
    folder = folder or Path(config.out) / "tiny"
    return dataclasses.replace(
        config, backbone=resolve(config.backbone, folder, "backbone"), judge=tuple(resolve(j, folder, "judge") for j in config.judge),
        data=resolve(config.data, folder, "data"), start=config.start and resolve(config.start, folder, "start"),
    )  # fmt: skip


def check(config: RealConfig, judged: bool = True) -> None:
    """Raise `InputError` or `ConfigError` for anything that can be seen to be wrong before a weight is read."""
    adamw(config.optimizer)
    if config.compile and config.compile not in (known := list_backends(exclude_tags=())):
        raise ConfigError(f"compile is {config.compile!r}; known: {', '.join(known)}")
    given = lambda place: not place.startswith(PREFIX)
    problems = check_backbone(config.backbone, trust=config.trust_remote_code) if given(config.backbone) else []
    for place in filter(given, config.judge if judged else ()):
        problems += check_judge(place, config.questions)
    try:
        given(config.data) and check_questions(read_manifest(config.data), config.questions)
    except InputError as error:
        problems += error.problems
    start = config.start if config.start and given(config.start) else None
    if start and not Path(start).is_dir():
        problems.append(f"start is {start!r}, which is no folder; it is the model folder of an earlier run")
    elif start and (mode := recorded_mode(Path(start))) not in (None, config.omni):
        say = lambda on: str(on).lower()
        problems.append(f"start is {start!r}, whose student was trained with omni={say(mode)}, and omni is {say(config.omni)}: the two modes modulate the reference differently; set omni={say(mode)}, or train the warm-up again with omni={say(config.omni)}")
    if not problems and start and given(config.backbone):
        problems += check_start(config)
    if problems:
        raise InputError(problems)


def recorded_mode(model: Path) -> bool | None:
    """`omni` of a saved student: from its own record, otherwise from its run's configuration; None where neither tells."""
    for file in (model / MODE_FILE, model.parent / "config.json"):
        if file.is_file() and isinstance(mode := json.loads(file.read_text()).get("omni"), bool):
            return mode
    return None


@contextmanager
def told() -> Iterator[None]:
    """What loading finds wrong with a model, as one message instead of a traceback; no loading bars."""
    try:
        with quiet():
            yield
    except (InputError, ConfigError):
        raise
    except (ValueError, OSError, SafetensorError) as error:
        raise InputError(f"{error}") from error


def load_student(config: RealConfig, prompts: PromptEmbeddings | None, accelerator: Accelerator, sharded: bool = False) -> nn.Module:
    """The student alone, in its place. With adapters it is an adapter of the shared base; the fake score's, a few MB, lies idle beside it."""
    if config.roles == "adapters":
        return load_roles(config, prompts, accelerator, sharded).student
    return placed(load_backbone(config, prompts, torch.float32, config.start), config, accelerator, sharded)


class Setup:
    """What both stages share: rows, prompts, run, codec, feed, and who is trained: `roles` where there is a judge, otherwise the `student`
    alone. `blank` (1, L) is the empty prompt, for text dropout."""

    def __init__(self, config: RealConfig, accelerator: Accelerator | None = None, judged: bool = True):
        check(config, judged)
        accelerator = accelerator or make_accelerator(config)
        given = config
        with accelerator.main_process_first():
            self.config = config = prepared(given)
        if config != given:  # "tiny:" places could not be looked at before
            check(config, judged)
        rows = read_manifest(config.data)
        self.run = run = RealRun(config, accelerator)
        run.checkpoints.check()
        self.sharded = wanted(config, run.accelerator)
        self.prompts, self.questions = prompts_of(config, texts_of(rows)), PromptTable()
        self.blank = None if judged else self.prompts.ids([""]).to(run.device)
        process = run.accelerator.process_index, run.accelerator.num_processes
        self.feed = Feed(rows, config, self.prompts, self.questions, *process, device=run.device)
        run.checkpoints.optimizers["data"] = self.feed.order  # its position is saved with the optimizers
        self.embeddings = encoded(config, self.prompts, run.accelerator) if isinstance(self.prompts, PromptTable) else None
        self.codec = load_codec(config, run.device)
        self.roles = load_roles(config, self.embeddings, run.accelerator, self.sharded) if judged else None
        self.student = self.roles.student if judged else load_student(config, self.embeddings, run.accelerator, self.sharded)

    def finish(self, student: nn.Module, ema: EMA | None) -> None:
        """Write the (averaged) student to `out`/model."""
        main = self.run.accelerator.is_main_process
        state = Gathered(ema, main).shadow if ema else Gathered(student, main).state_dict()
        if main:
            save_json({"omni": self.config.omni}, save_student(student, state, self.run.folder / "model") / MODE_FILE)
        self.run.accelerator.wait_for_everyone()


def mean_of(measured: list[dict[str, float]]) -> dict[str, float]:
    """Means of what an update's batches measured, those of all processes."""
    measured = gather_object(measured)
    names = dict.fromkeys(name for m in measured for name in m)
    return {name: sum(m[name] for m in measured if name in m) / sum(name in m for m in measured) for name in names}


def train_real(config: RealConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per student update; pictures are there when a strip is due. The (averaged) student is in `out/model` at the end."""
    with told():
        setup = Setup(config, accelerator)
        judge = load_judges(setup.config, setup.questions, setup.run.accelerator, setup.sharded)
    yield from train_loaded(setup, judge)


def train_loaded(setup: Setup, judge: nn.Module, update: Callable[..., RealEdit] = RealEdit, optimize: Callable[..., Optimizer] = Optimizer) -> Iterator[Step]:
    """The loop of `train_real` over what is loaded already. `update` and `optimize` build what computes and what steps, for a caller who
    measures them (papers/performance.py)."""
    run, roles, config = setup.run, setup.roles, setup.config
    edit = update(config, roles, judge, setup.codec, run.device)
    optimizer, fake_optimizer = optimize(roles.student, config), optimize(roles.fake, config, config.fake_lr)
    ema = EMA(roles.student, config.ema) if config.ema else None
    run.checkpoints.register("model", roles.student, optimizer, ema)
    run.checkpoints.register("fake", roles.fake, fake_optimizer)
    updates = config.fake_updates if config.dmd_weight else 0
    for index in run.steps():
        edit.seconds.clear()
        times = draw_times(rng_for("times", config.seed, index), config.calls, config.sampler_steps, config.sampler_shift)
        with edit.clock("data"):
            parts = setup.feed.parts(index)
        measured, outputs = [], []
        for number, batch in parts:
            seed_torch("student", config.seed, index, number)
            with run.accelerator.autocast():
                output, metrics = edit.student_backward(batch, times, index)
            measured.append(metrics)
            outputs.append(output)
        with edit.clock("student"):
            norm, fine = optimizer.step(index, run.accelerator)
            if ema:
                ema.update(roles.student, index)
        fakes = []
        for k in range(updates):
            again = parts
            if config.fake_rollouts == "fresh":
                with edit.clock("data"):
                    again = setup.feed.parts(index, "fake", k)
            for j, (number, batch) in enumerate(again):
                seed_torch("fake", config.seed, index, k, number)
                with run.accelerator.autocast():
                    samples = outputs[j]
                    if config.fake_rollouts == "fresh":
                        with torch.no_grad(), edit.clock("rollout"):
                            samples = edit.edit(batch, times)
                    fakes.append({"fake_loss": edit.fake_backward(samples, edit.caption(batch), batch)})
            with edit.clock("fake"):
                fake_optimizer.step(index, run.accelerator)
        calls = config.batch * config.accumulate * len(times) * (1 + (updates if config.fake_rollouts == "fresh" else 0))
        run.metrics.update(mean_of(measured), **mean_of(fakes), gradient_norm=norm, skipped=float(not fine), calls=calls)
        run.metrics.update({f"seconds_{part}": seconds for part, seconds in edit.seconds.items()})
        if run.device.type == "cuda":
            run.metrics["peak_gb"] = torch.cuda.max_memory_allocated(run.device) / 1e9
        yield run.done(index, **strips(run, setup, index, parts[0][1], outputs[0]))
    setup.finish(roles.student, ema)


@torch.no_grad()
def strips(run: RealRun, setup: Setup, index: int, batch: UnpairedBatch, latents: Tensor) -> dict[str, Tensor]:
    """References and decoded edits of an update whose strip is due, shown; otherwise nothing."""
    if (index + 1) % run.config.strip_every and index + 1 != run.config.steps:
        return {}
    output = setup.codec.decode(latents[:STRIP])
    run.show(index, batch, output, setup.prompts)
    return {"reference": batch.reference[:STRIP], "output": output}


def train_copy(config: CopyConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per update of the copy warm-up: flow matching with the reference itself as target and its own caption as prompt,
    in a `text_dropout` share of the rows the empty prompt (not the negative one) [R]."""
    with told():
        setup = Setup(config, accelerator, judged=False)
    run, student, config, codec = setup.run, setup.student, setup.config, setup.codec
    optimizer = Optimizer(student, config)
    ema = EMA(student, config.ema) if config.ema else None
    run.checkpoints.register("model", student, optimizer, ema)
    for index in run.steps():
        parts, measured = setup.feed.parts(index), []
        for number, batch in parts:
            seed_torch("copy", config.seed, index, number)
            with run.accelerator.autocast():
                with torch.no_grad():
                    clean = codec.encode(batch.reference)
                dropped = torch.rand(len(clean), 1, device=clean.device) < config.text_dropout
                text = student.encode_text(torch.where(dropped, setup.blank, batch.reference_caption))
                t = logit_normal_time(len(clean), config.time_shift, clean.device)
                loss = flow_matching_loss(lambda x, time: student(x, time, text, clean), clean, t, torch.randn_like(clean)).mean()
            loss.backward()
            measured.append({"loss": loss.item()})
        norm, fine = optimizer.step(index, run.accelerator)
        if ema:
            ema.update(student, index)
        run.metrics.update(mean_of(measured), gradient_norm=norm, skipped=float(not fine))
        yield run.done(index)
    setup.finish(student, ema)
