"""Trackers of a run: accelerate's TensorBoard, W&B and trackio. A resumed run goes on in the tracker's own run; a tracker that
cannot start is one error before anything is loaded, and one that fails later is left out.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from PIL import Image

from vlmedit.config import TrainConfig
from vlmedit.errors import ConfigError
from vlmedit.io import save_json


def check_wandb() -> None:
    """Raise ConfigError where W&B would ask for an account, or not be reached, when everything is loaded."""
    import wandb

    if (os.environ.get("WANDB_MODE") or wandb.setup().settings.mode) != "online":
        return
    try:
        known, why = wandb.login(prompt=False), "no account is known here; run wandb login"
    except Exception as error:
        known, why = False, str(error)
    if not known:
        raise ConfigError(f"trackers names wandb: {why}, or set WANDB_MODE=offline and run wandb sync later")


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for trackers that are not installed, and for W&B where it could not start."""
    for name in names:
        if name not in map(str, get_available_trackers()):
            raise ConfigError(f"trackers names {name}, which is not installed (pip install {name}); installed by default: tensorboard")
    if "wandb" in names and os.environ.get("RANK", "0") == "0":
        check_wandb()


class Trackers:
    """accelerate's trackers. They are started only where they are heard, on the main process. One that fails later is left out, and the run
    goes on."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, start: int):
        self.accelerator = accelerator
        self.close()  # those of an earlier run with this accelerator that was not finished
        name, out = tracked_name(Path(config.out), start), Path(config.out)
        settings = json.loads(json.dumps(config.flat()))
        how = {
            "tensorboard": dict(purge_step=start + 1),  # what a killed run wrote after its checkpoint comes again
            "wandb": dict(id=name, name=name, dir=str(out), resume="allow"),
            "trackio": dict(name=name, resume="allow", config=settings),
        }  # fmt: skip
        try:
            accelerator.init_trackers("vlmedit", init_kwargs=how)
        except Exception as error:
            accelerator.trackers.clear()
            raise ConfigError(f"trackers is {', '.join(config.trackers)}, and they did not start: {error}; WANDB_MODE=offline keeps W&B on this machine, trackers=tensorboard needs no other") from error
        for tracker in accelerator.trackers:
            if tracker.name == "wandb":
                tracker.store_init_configuration(settings)
            elif tracker.name == "tensorboard":  # as words: of settings it makes a run of its own
                tracker.log({"config": "    " + json.dumps(settings, indent=2).replace("\n", "\n    ")}, step=start)

    def log(self, scalars: dict[str, float], step: int) -> None:
        """An update's numbers, as one message."""
        self.each(lambda tracker: tracker.log(scalars, step=step))

    def add_strip(self, strip: Image.Image, step: int) -> None:
        def show(tracker) -> None:
            if tracker.name == "tensorboard":
                tracker.log_images({"edits": np.asarray(strip)[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"edits": [strip]}, step=step)
            elif tracker.name == "trackio":
                import trackio

                tracker.log({"edits": trackio.Image(np.asarray(strip))}, step=step)

        self.each(show)

    def each(self, act: Callable[[object], None]) -> None:
        for tracker in list(self.accelerator.trackers):
            try:
                act(tracker)
            except Exception as error:  # a full disk, a lost network: nothing that weights depend on
                self.accelerator.trackers.remove(tracker)
                print(f"tracker {tracker.name} failed and is left out from now on: {type(error).__name__}: {error}", file=sys.stderr)

    def close(self) -> None:
        """Finish the trackers alone: accelerate's `end_training` would take the processes' connection with them, before the weights are gathered."""
        self.each(lambda tracker: tracker.finish())
        self.accelerator.trackers.clear()


def tracked_name(folder: Path, start: int) -> str:
    """By which trackers know a run: kept in its folder, so that a resumed run goes on in theirs; one that starts at 0 has a new one."""
    file = folder / "tracked.json"
    if start and file.is_file():
        return json.loads(file.read_text())["name"]
    name = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', folder.resolve().name)[:60]}-{secrets.token_hex(4)}"
    save_json({"name": name}, file)
    return name
