"""Real runs that are watched: what every batch held, and every gradient. Run by test_real_processes.py, within its own process and, from
files of settings, one after the other in every process of torch's launcher.

Usage: python -m torch.distributed.run --standalone --nproc_per_node 2 two_real_processes.py SETTINGS.json ...

Settings of a run, and besides: `stage`, npedit or warmup; `stop`, the update in which it is killed before its checkpoint, to be started
again; `crash`, the update in which the second process dies and takes the first one with it.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import torch

from vlmedit.cli._settings import typed
from vlmedit.data.manifest import Feed
from vlmedit.training.gathered import DTensor, whole
from vlmedit.training.optimizer import Optimizer
from vlmedit.training.real_models import make_accelerator, train_copy, train_real
from vlmedit.training.settings import CopyConfig, RealConfig

STAGES = {"npedit": (RealConfig, train_real), "warmup": (CopyConfig, train_copy)}
gather, parts = Optimizer.gather, Feed.parts


class Watch:
    """Looks into a run. `updates` are in order of time and of one role each: key, rows, gradient, its norm and how many weights are shards."""

    def __init__(self, crash: int | None = None):
        self.crash, self.updates, self.key, self.rows = crash, [], "", []

    def parts(self, feed: Feed, *key):
        found = parts(feed, *key)
        look = lambda n, b: (n, b.types, tuple(b.reference.shape), hashlib.sha256(b.reference.numpy().tobytes()).hexdigest(), b.instruction.flatten().tolist())
        self.key, self.rows = "/".join(map(str, key)), [look(*part) for part in found]
        return found

    def gather(self, optimizer: Optimizer, accelerator):
        if self.key == str(self.crash) and accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        norm = gather(optimizer, accelerator)
        grads = [p.grad for p in optimizer.module.parameters() if p.grad is not None]
        shards = sum(isinstance(g, DTensor) for g in grads)
        gradient, lengths = torch.cat([whole(g).flatten() for g in grads]), [g.numel() for g in grads]
        self.updates.append(dict(key=self.key, rows=self.rows, gradient=gradient, lengths=lengths, norm=norm, shards=shards))
        return norm


def watched(given: dict, updates: int | None = None) -> dict:
    """Train by these settings, only so many updates if they are told. What was seen, and the metrics of the last update."""
    given = dict(given)
    stage, stop, crash = given.pop("stage", "npedit"), given.pop("stop", None), given.pop("crash", None)
    config_class, train = STAGES[stage]
    config = config_class.make("laptop", **typed(config_class, given))
    accelerator, watch = make_accelerator(config), Watch(crash and crash - 1)
    with patch.object(Feed, "parts", lambda *a: watch.parts(*a)), patch.object(Optimizer, "gather", lambda *a: watch.gather(*a)):
        for last in (stop or updates, None) if stop else (updates,):
            for step in train(config, accelerator):
                if step.index == last:
                    break
    return {"updates": watch.updates, "metrics": step.metrics, "processes": accelerator.num_processes, "rank": accelerator.process_index}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for file in map(Path, sys.argv[1:]):
        settings = json.loads(file.read_text())
        found = watched(settings)
        torch.save(found, Path(settings["out"]) / f"rank{found['rank']}.pt")
