"""What every training stage shares: optimizer, averaging, guard, logging, checkpoints, exact resume.

A stage is a generator: it yields a `Step` per update and knows nothing of progress bars, plots or early stops.
All randomness of update k is seeded from (seed, k, rank), so resuming from a checkpoint of weights and optimizer state
repeats the uninterrupted run exactly.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmedit.config import TrainConfig
from vlmedit.data.world import seed_torch
from vlmedit.errors import ConfigError


@dataclass(frozen=True)
class Step:
    """One update, detached: losses, gradient norms and whatever else the stage measured."""

    index: int  # 1 after the first update
    total: int
    metrics: dict[str, float]
    skipped: bool = False
    pictures: dict[str, Tensor] = field(default_factory=dict)


def make_accelerator(config: TrainConfig, **settings) -> Accelerator:
    """An accelerator of the stage's precision; accelerate alone would refuse a second precision within one process. Raises ConfigError when
    it counts other processes than were started."""
    if AcceleratorState._shared_state.get("_mixed_precision", config.precision) != config.precision:
        AcceleratorState._reset_state()
    hidden = set(os.environ.get("CUDA_VISIBLE_DEVICES", "all").split(",")) <= {"", "-1"}  # as two_cpu.yaml hides GPUs
    started = int(os.environ.get("WORLD_SIZE", 1))
    built = Accelerator(cpu=hidden and started > 1, mixed_precision=config.precision, **settings)
    if built.num_processes != started:
        raise ConfigError(f"{started} processes were started, accelerate counts {built.num_processes}; on a CPU use accelerate launch with vlmedit/configs/accelerate/two_cpu.yaml, or set ACCELERATE_USE_CPU=true")
    return built


class Optimizer:
    """Muon for the matrices of the blocks, AdamW for everything else, one learning rate for both [X, papers/log.md]."""

    def __init__(self, model: nn.Module, config: TrainConfig, lr: float | None = None):
        self.model, self.config, self.lr = model, config, lr or config.lr
        matrices, others = [], []
        for name, p in model.named_parameters():
            if p.requires_grad:
                is_matrix = p.ndim == 2 and ".weight" in name and "embed" not in name and min(p.shape) >= 16
                (matrices if is_matrix else others).append(p)
        self.parts = [torch.optim.AdamW(others, self.lr, config.betas, weight_decay=0.0)]
        if matrices:
            muon = torch.optim.Muon(matrices, self.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
            self.parts.append(muon)

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to `final_lr` of the peak."""
        c = self.config
        if step < c.warmup:
            return self.lr * (step + 1) / c.warmup
        progress = min(1.0, (step - c.warmup) / max(1, c.steps - c.warmup))
        return self.lr * (c.final_lr + (1 - c.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))

    def gather(self, accelerator: Accelerator) -> float:
        """Average the gradients over processes and clip them. Returns their norm before."""
        params = [p for p in self.model.parameters() if p.grad is not None]
        average_gradients(params, accelerator)
        return float(nn.utils.clip_grad_norm_(params, self.config.clip))

    def step(self, index: int, accelerator: Accelerator) -> tuple[float, bool]:
        """Average gradients over processes, clip, and update unless the norm is not finite or spikes.
        Returns the norm before clipping and whether the update was made. Clears the gradients."""
        norm = self.gather(accelerator)
        fine = math.isfinite(norm) and norm < self.config.spike
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.rate(index)
            if fine:
                part.step()
            part.zero_grad(set_to_none=True)
        return norm, fine

    def state_dict(self) -> list:
        return [p.state_dict() for p in self.parts]

    def load_state_dict(self, states: list) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def average_gradients(params: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Mean of the gradients over all processes, in one flat message. Works for any number of forward calls
    per update, which wrapping the model would not."""
    params = list(params)
    if accelerator.num_processes == 1 or not params:
        return
    flat = accelerator.reduce(torch.cat([p.grad.flatten() for p in params]), "mean")
    for p, g in zip(params, flat.split([p.numel() for p in params])):
        p.grad.copy_(g.view_as(p))


class EMA:
    """Exponential moving average of a model's weights, warmed up so that early steps do not dominate."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            self.shadow[name].lerp_(value, 1 - decay) if value.is_floating_point() else self.shadow[name].copy_(value)

    def load(self, shadow: dict[str, Tensor]) -> None:
        """Take over saved averages, on the device of the present ones."""
        for name, value in self.shadow.items():
            value.copy_(shadow[name])


class Checkpoints:
    """Atomic checkpoints `out/checkpoint` of named modules, optimizers and averages.

    Written beside, flushed and renamed, so a run killed at any instant leaves either the old or the new one.
    Raises ConfigError when a checkpoint belongs to another configuration.
    """

    IGNORED = ("out", "save_every", "steps")  # may differ between the runs that share a checkpoint

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.folder = Path(config.out) / "checkpoint"
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Optimizer] = {}
        self.averages: dict[str, EMA] = {}

    def identity(self, config: TrainConfig | None = None) -> dict:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config or self.config).items() if k not in self.IGNORED}

    def save(self, step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        fresh = self.folder.with_name("checkpoint.partial")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        try:
            for name, module in self.modules.items():
                save_file({k: v.contiguous() for k, v in module.state_dict().items()}, fresh / f"{name}.safetensors")
            for name, ema in self.averages.items():
                save_file({k: v.contiguous() for k, v in ema.shadow.items()}, fresh / f"{name}.ema.safetensors")
            torch.save({k: o.state_dict() for k, o in self.optimizers.items()}, fresh / "optimizers.pt")
            (fresh / "state.json").write_text(json.dumps({"step": step, "steps": self.config.steps, "config": self.identity()}, indent=2))
            for file in fresh.iterdir():
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
        except (OSError, SafetensorError, RuntimeError) as error:  # a full disk, as each of the three writers reports it
            shutil.rmtree(fresh, ignore_errors=True)
            raise OSError(f"cannot write the checkpoint {self.folder}: {error}; free disk space and repeat the command to resume") from error
        old = self.folder.with_name("checkpoint.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            os.replace(self.folder, old)
        os.replace(fresh, self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def check(self) -> None:
        """Raise ConfigError when the newest checkpoint belongs to another configuration."""
        found = next((f / "state.json" for f in (self.folder, self.folder.with_name("checkpoint.old")) if f.exists()), None)
        if found is None:
            return
        state = json.loads(found.read_text())
        newer = self.identity(type(self.config)())  # a setting that did not exist yet had what is now its default
        mine, theirs = self.identity(), newer | state["config"]
        wrong = [k for k in mine if mine[k] != theirs.get(k)]
        if wrong or state["steps"] != self.config.steps:
            what = ", ".join(f"{k}: {theirs.get(k)} there, {mine[k]} now" for k in wrong) or f"steps: {state['steps']} there, {self.config.steps} now"
            raise ConfigError(f"{self.folder} belongs to another configuration ({what}); choose another out folder or delete it")

    def resume(self) -> int:
        """Restore the newest whole checkpoint and return its step, 0 when there is none."""
        self.check()
        old = self.folder.with_name("checkpoint.old")
        if self.accelerator.is_main_process and not self.folder.exists() and old.exists():  # killed between the two renames
            os.replace(old, self.folder)
        self.accelerator.wait_for_everyone()
        if not self.folder.exists():
            return 0
        state = json.loads((self.folder / "state.json").read_text())
        for name, module in self.modules.items():
            module.load_state_dict(load_file(self.folder / f"{name}.safetensors"))
        for name, ema in self.averages.items():
            ema.load(load_file(self.folder / f"{name}.ema.safetensors"))
        states = torch.load(self.folder / "optimizers.pt", weights_only=True, map_location="cpu", mmap=True)  # shared by the processes of a machine
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(states[name])
        return state["step"]


class Run:
    """The frame of a stage: device, folder, checkpoints, log. `steps()` yields the update indices still to do."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator | None = None):
        self.config = config
        self.accelerator = accelerator or make_accelerator(config)
        self.device = self.accelerator.device
        self.folder = Path(config.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(config, self.accelerator)
        self.start = 0

    def register(self, name: str, module: nn.Module, optimizer: Optimizer | None = None, ema: EMA | None = None) -> None:
        self.checkpoints.modules[name] = module
        if optimizer is not None:
            self.checkpoints.optimizers[name] = optimizer
        if ema is not None:
            self.checkpoints.averages[name] = ema

    def key(self, index: int) -> tuple:
        """Seed parts of update `index` on this process."""
        return self.config.seed, index, self.accelerator.process_index

    def steps(self) -> Iterable[int]:
        self.start = self.checkpoints.resume()
        if self.accelerator.is_main_process:
            self.config.save(self.folder / "config.json")
        writer = self._writer()
        for index in range(self.start, self.config.steps):
            seed_torch("update", *self.key(index))
            began = time.process_time()
            self.metrics: dict[str, float] = {}
            yield index
            self.metrics["cpu_seconds"] = time.process_time() - began
            for name, value in self.metrics.items():
                writer and writer.add_scalar(name, value, index + 1)
            if (index + 1) % self.config.save_every == 0 or index + 1 == self.config.steps:
                self.checkpoints.save(index + 1)
        writer and writer.close()

    def _writer(self):
        if not self.accelerator.is_main_process:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder / "tensorboard"))

    def done(self, index: int, **pictures: Tensor) -> Step:
        """The record of an update."""
        skipped = bool(self.metrics.get("skipped", 0))
        return Step(index + 1, self.config.steps, dict(self.metrics), skipped, {k: v.detach().cpu() for k, v in pictures.items()})
