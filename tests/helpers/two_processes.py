"""Run by tests/training/test_two_processes.py in every process of torch's launcher: train by each file of settings, one
after the other, and leave this process's final weights and its own losses in the run's folder.

Usage: python -m torch.distributed.run --standalone --nproc_per_node 2 two_processes.py SETTINGS.json ...

A file of settings: `method`, and `settings`, flat.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from vlmedit.methods import find
from vlmedit.training.checkpoints import Checkpoints
from vlmedit.training.run import Run, make_accelerator

save, note = Checkpoints.save, Run.note
kept, own = {}, []


def keep(self: Checkpoints, step: int) -> None:
    """The weights of this very process, of which the checkpoint holds the first one's."""
    kept.update(
        {f"{role}/{k}": v.detach().clone() for role, m in self.modules.items() for k, v in m.thing.state_dict().items()}
    )
    save(self, step)


def listen(self: Run, number: int, metrics: dict) -> None:
    """The losses of this very process, of which a step has the mean over all."""
    own.extend(metrics[name] for name in ("loss", "reading_loss") if name in metrics)
    note(self, number, metrics)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Checkpoints.save, Run.note = keep, listen
    for file in map(Path, sys.argv[1:]):
        given = json.loads(file.read_text())
        config_class, train = find(given["method"])
        config = config_class.make("smoke", **given["settings"])
        accelerator = make_accelerator(config)
        kept.clear()
        own.clear()
        steps = [
            {k: v for k, v in step.metrics.items() if not k.startswith(("cpu", "seconds"))}
            for step in train(config, accelerator)
        ]
        found = {"losses": torch.tensor(own), "processes": torch.tensor(accelerator.num_processes)}
        save_file(kept | found, Path(config.out) / f"rank{accelerator.process_index}.safetensors")
        (Path(config.out) / f"steps{accelerator.process_index}.json").write_text(json.dumps(steps))
