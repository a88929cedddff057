"""The frame of a run: processes, folder, checkpoints, random streams, parts of an update, trackers."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor

from vlmedit import io
from vlmedit.config import TrainConfig
from vlmedit.errors import ConfigError
from vlmedit.protocols import Data, Method, Phase
from vlmedit.seeds import seed_torch
from vlmedit.training.checkpoints import Checkpoints
from vlmedit.training.gathered import Gathered
from vlmedit.training.offload import Offloaded
from vlmedit.training.optimizer import EMA, Optimizer, adamw
from vlmedit.training.trackers import Trackers, check_trackers

SHOWN, STRIP = 8, 4  # samples in a `Step`, and on a strip
PATIENCE = timedelta(hours=6)  # that processes wait for each other; the default, ten minutes, is less than encoding or loading may differ by


@dataclass(frozen=True)
class Step:
    """One update, detached: losses, gradient norms and whatever else the method measured."""

    index: int  # 1 after the first update
    total: int
    metrics: dict[str, float]
    skipped: bool = False
    pictures: dict[str, Tensor] = field(default_factory=dict)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """An accelerator of the run's precision, with its trackers; accelerate alone would refuse a second precision within one process. Raises
    ConfigError when it counts other processes than were started."""
    check_trackers(config.trackers)
    if AcceleratorState._shared_state.get("_mixed_precision", config.precision) != config.precision:
        AcceleratorState._reset_state()
    hidden = set(os.environ.get("CUDA_VISIBLE_DEVICES", "all").split(",")) <= {"", "-1"}  # as two_cpu.yaml hides GPUs
    started = int(os.environ.get("WORLD_SIZE", 1))
    patient = InitProcessGroupKwargs(timeout=PATIENCE)
    built = Accelerator(
        cpu=hidden and started > 1,
        mixed_precision=config.precision,
        kwargs_handlers=[patient],
        log_with=list(config.trackers) or None,
        project_dir=config.out,
    )
    if built.num_processes != started:
        raise ConfigError(
            f"{started} processes were started, accelerate counts {built.num_processes}; on a CPU use accelerate launch with "
            "vlmedit/configs/accelerate/two_cpu.yaml, or set ACCELERATE_USE_CPU=true"
        )
    return built


def begin(config: TrainConfig, accelerator: Accelerator | None = None) -> Accelerator:
    """What can be seen to be wrong with a run before anything is loaded: its optimizer, trackers, processes, and a checkpoint of another
    configuration in its folder. Returns its accelerator. Raises ConfigError."""
    adamw(config.optimizer)
    accelerator = accelerator or make_accelerator(config)
    Checkpoints(config, accelerator).check()
    return accelerator


class Run:
    """What the loop of `train` calls; see there."""

    def __init__(self, method: Method, data: Data, config: TrainConfig, accelerator: Accelerator | None = None):
        self.method, self.data, self.config = method, data, config
        self.accelerator = accelerator or begin(config)
        self.device = self.accelerator.device
        self.folder = Path(config.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        method.part = self.part
        self.offloaded = {role: Offloaded(self.module(role), self.device) for role in getattr(config, "offload", ())}
        for role in method.trained.keys() & self.offloaded.keys():
            self.offloaded[role].enter()  # optimizers and averages are made, or restored, where their weights are
        self.optimizers = {name: Optimizer(t.module, config, t.lr) for name, t in method.trained.items()}
        self.averages = {name: EMA(t.module, t.ema) for name, t in method.trained.items() if t.ema}
        self.checkpoints = Checkpoints(config, self.accelerator)
        for name, trained in method.trained.items():
            self.checkpoints.register(name, trained.module, self.optimizers[name], self.averages.get(name))
        for name, module in method.kept.items():
            self.checkpoints.register(name, module)
        if data.state_dict():
            self.checkpoints.optimizers["data"] = data
        self.trackers: Trackers | None = None
        self.spent: dict[str, float] = {}
        self.streams: dict[int, tuple] = {}

    def module(self, role: str) -> torch.nn.Module:
        """The module of a role. Raises ConfigError for one that the method does not have."""
        known = {name: t.module for name, t in self.method.trained.items()} | self.method.frozen
        if role not in known:
            raise ConfigError(f"offload names {role!r}, which this method does not have; it has {', '.join(known)}")
        return known[role]

    def updates(self) -> Iterator[int]:
        """The updates still to do: all, or those after the checkpoint of an earlier run of the folder."""
        start = self.checkpoints.resume()
        if self.accelerator.is_main_process:
            self.config.save(self.folder / "config.json")
            if self.config.trackers and start < self.config.steps:
                self.trackers = Trackers(self.accelerator, self.config, start)
        try:
            for index in range(start, self.config.steps):
                self.began = time.process_time()
                self.notes: dict[int, dict[str, float | int]] = defaultdict(dict)
                self.stepped: dict[str, tuple[float, bool]] = {}
                self.streams.clear()
                self.spent.clear()
                yield index
        finally:
            if self.trackers:
                self.trackers.close()

    def draw(self, phase: Phase, index: int) -> list[tuple[int, Any]]:
        """This process's batches of a phase, each with its number over all processes."""
        rank, total = self.accelerator.process_index, self.config.accumulate * self.accelerator.num_processes
        with self.part("data"), self.accelerator.autocast():
            numbered = self.data.batches(
                phase.batch, (index, *phase.key), phase.size or self.config.batch, total, range(rank, total, self.accelerator.num_processes)
            )
            return [(number, batch.to(self.device)) for number, batch in numbered]

    @contextmanager
    def stream(self, index: int, number: int) -> Iterator[None]:
        """Randomness of batch `number` of update `index`: seeded in its first phase, continued in the later ones. So a resumed run repeats
        the uninterrupted one, and N processes draw what one process draws that accumulates N batches."""
        if number in self.streams:
            set_random_state(self.streams[number])
        else:
            seed_torch("update", self.config.seed, index, number)
        yield
        self.streams[number] = random_state()

    def autocast(self):
        return self.accelerator.autocast()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of an update: roles that it does not need wait elsewhere, those that it needs come; its seconds are measured."""
        needed = self.method.resident.get(name, ())
        for role, module in self.offloaded.items():
            if role not in needed and name != "data":
                module.leave()
        for role in needed:
            if role in self.offloaded:
                self.offloaded[role].enter()
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        for kind, seconds in (("cpu", time.process_time() - cpu), ("seconds", time.perf_counter() - wall)):
            self.spent[f"{kind}_{name}"] = self.spent.get(f"{kind}_{name}", 0.0) + seconds

    def note(self, number: int, metrics: dict[str, float | int]) -> None:
        self.notes[number].update(metrics)

    def step(self, phase: Phase, index: int) -> None:
        """One optimizer step of everything that the phase trains."""
        for name in phase.trains:
            with self.part(name):
                norm, fine = self.optimizers[name].step(index, self.accelerator)
            self.stepped[name] = norm, fine and self.stepped.get(name, (norm, True))[1]

    def move_averages(self, index: int) -> None:
        """Once per update, of what was trained in it."""
        for name in self.averages.keys() & self.stepped.keys():
            with self.part(name):
                self.averages[name].update(self.method.trained[name].module, index)

    def record(self, index: int, held: list[tuple[int, Any]], memory: dict[int, dict]) -> Step:
        """The update as the caller sees it, when what is due has been written: checkpoint, strip, trackers."""
        metrics = combined(list(self.notes.values()))
        norm, fine = self.stepped.get(self.method.result, (0.0, True))
        if self.method.result in self.stepped:
            metrics |= {"gradient_norm": norm, "skipped": float(not fine)}
        if self.device.type == "cuda":
            metrics["peak_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        pictures = self.pictures(index, *held[0], memory) if held else {}
        metrics |= self.spent | {"cpu_seconds": time.process_time() - self.began}
        if self.trackers:
            self.trackers.log(metrics, index + 1)
        if (index + 1) % self.config.save_every == 0 or index + 1 == self.config.steps:
            self.checkpoints.save(index + 1)
        return Step(index + 1, self.config.steps, metrics, not fine, pictures)

    @torch.no_grad()
    def pictures(self, index: int, number: int, batch: Any, memory: dict[int, dict]) -> dict[str, Tensor]:
        every = self.config.strip_every
        due = not every or (index + 1) % every == 0 or index + 1 == self.config.steps
        found = self.method.pictures(batch, memory[number]) if due else {}
        shown = {name: pictures[:SHOWN].detach().float().cpu() for name, pictures in found.items()}
        if every and shown and self.accelerator.is_main_process:
            self.show(shown, self.data.labels(batch), index)
        return shown

    def show(self, shown: dict[str, Tensor], labels: list[tuple[str, str]], index: int) -> None:
        """A strip of the first pictures, into `out`/strips and the trackers."""
        pictures, words = [], []
        for row, (kind, request) in zip(zip(*shown.values(), strict=True), labels[:STRIP], strict=False):
            pictures += [io.to_image(picture) for picture in row]
            words += [kind, request[:60]]
        strip = io.strip(pictures, words, f"update {index + 1}")
        (self.folder / "strips").mkdir(exist_ok=True)
        io.save_picture(strip, self.folder / "strips" / f"{index + 1:06d}.png")
        if self.trackers:
            self.trackers.add_strip(strip, index + 1)

    def finish(self) -> None:
        """Write the (averaged) result to `out/model`."""
        name, main = self.method.result, self.accelerator.is_main_process
        module, average = self.method.trained[name].module, self.averages.get(name)
        state = Gathered(average, main).shadow if average else Gathered(module, main).state_dict()
        if main:
            self.method.save(state, self.folder / "model")
        self.accelerator.wait_for_everyone()


def random_state() -> tuple:
    """Of torch's global generators: the CPU's, and the GPU's where there is one."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def set_random_state(state: tuple) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def combined(notes: list[dict[str, float | int]]) -> dict[str, float]:
    """What an update's batches measured, of all processes: floats averaged, ints added up."""
    notes = gather_object(notes)
    names = dict.fromkeys(name for note in notes for name in note)
    found = {name: [note[name] for note in notes if name in note] for name in names}
    return {name: sum(v) if isinstance(v[0], int) else sum(v) / len(v) for name, v in found.items()}
