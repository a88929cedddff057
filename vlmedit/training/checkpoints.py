"""Checkpoints: atomic, of whole weights whatever the number of processes, and refused where they are damaged or belong
to another configuration."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmedit.config import RENAMED, TrainConfig
from vlmedit.errors import ConfigError
from vlmedit.protocols import Data
from vlmedit.training.gathered import Gathered
from vlmedit.training.optimizer import EMA, Optimizer

STATE = "state.json"


def write(state: dict, file: Path | None) -> None:
    """Weights into a file, on the process that has one."""
    if file is not None:
        save_file({k: v.contiguous() for k, v in state.items()}, file)


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A file of a checkpoint, to be read. Raises ConfigError where it is missing or damaged."""
    try:
        yield file
    except (OSError, SafetensorError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); delete the folder {file.parent} to begin anew, or choose another out folder") from error


def read(file: Path) -> dict[str, Tensor]:
    with whole(file):
        return load_file(file)


class Checkpoints:
    """`out/checkpoint`: named modules, optimizers, averages and the position in the data.

    Written beside, flushed and renamed, so a run killed at any instant leaves either the old or the new one.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.folder = Path(config.out) / "checkpoint"
        self.modules: dict[str, Gathered] = {}
        self.optimizers: dict[str, Gathered | Data] = {}
        self.averages: dict[str, Gathered] = {}

    def register(self, name: str, module: nn.Module, optimizer: Optimizer | None = None, ema: EMA | None = None) -> None:
        keep = self.accelerator.is_main_process
        for table, thing in ((self.modules, module), (self.optimizers, optimizer), (self.averages, ema)):
            if thing is not None:
                table[name] = Gathered(thing, keep)

    def save(self, step: int) -> None:
        """Write the state after `step` updates. Every process takes part, in the same order, because shards are
        gathered part by part. Raises OSError where the disk is full."""
        main, fresh = self.accelerator.is_main_process, self.folder.with_name("checkpoint.partial")
        if main:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
        try:
            for name, module in self.modules.items():
                write(module.state_dict(), fresh / f"{name}.safetensors" if main else None)
            for name, average in self.averages.items():
                write(average.shadow, fresh / f"{name}.ema.safetensors" if main else None)
            optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
            if main:
                torch.save(optimizers, fresh / "optimizers.pt")
                about = {"step": step, "steps": self.config.steps, "config": self.config.flat()}
                (fresh / STATE).write_text(json.dumps(about, indent=2))
                self.replace(fresh)
        except (OSError, SafetensorError, RuntimeError) as error:  # a full disk, as each of the three writers reports it
            shutil.rmtree(fresh, ignore_errors=True)
            raise OSError(f"cannot write the checkpoint {self.folder}: {error}; free disk space and repeat the command to resume") from error
        self.accelerator.wait_for_everyone()

    def replace(self, fresh: Path) -> None:
        """Flush what was written and put it in the place of the last one."""
        for file in fresh.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        old = self.folder.with_name("checkpoint.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            os.replace(self.folder, old)
        os.replace(fresh, self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def found(self) -> dict | None:
        """What the newest checkpoint says of itself."""
        for folder in (self.folder, self.folder.with_name("checkpoint.old")):
            if (folder / STATE).exists():
                with whole(folder / STATE) as file:
                    return json.loads(file.read_text())
        return None

    def check(self) -> None:
        """Raise ConfigError when the newest checkpoint belongs to another configuration, or to a version that named
        settings otherwise."""
        if (state := self.found()) is None:
            return
        if former := sorted(state["config"].keys() & RENAMED.keys() - self.config.flat().keys()):
            names = ", ".join(f"{name} is {RENAMED[name]} now" for name in former)
            raise ConfigError(f"{self.folder} is of an unfinished run of an earlier version ({names}); begin it anew in another out folder, or delete it")
        wrong = self.config.differences(state["config"])
        if state["steps"] != self.config.steps:
            wrong.setdefault("steps", (state["steps"], self.config.steps))
        if wrong:
            what = ", ".join(f"{name}: {then} there, {now} now" for name, (then, now) in wrong.items())
            raise ConfigError(f"{self.folder} belongs to another configuration ({what}); choose another out folder or delete it")

    def resume(self) -> int:
        """Restore the newest whole checkpoint and return its step, 0 when there is none. Raises ConfigError as `check`
        does, and for a damaged one."""
        self.check()
        old = self.folder.with_name("checkpoint.old")
        if self.accelerator.is_main_process and not self.folder.exists() and old.exists():  # killed between the two renames
            os.replace(old, self.folder)
        self.accelerator.wait_for_everyone()
        if not self.folder.exists():
            return 0
        for name, module in self.modules.items():
            module.load_state_dict(read(self.folder / f"{name}.safetensors"))
        for name, average in self.averages.items():
            average.load(read(self.folder / f"{name}.ema.safetensors"))
        with whole(self.folder / "optimizers.pt") as file:
            states = torch.load(file, weights_only=True, map_location="cpu", mmap=True)  # shared by a machine's processes
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(states[name])
        return self.found()["step"]
