"""Run by tests/training/test_trainer.py in every process of torch's launcher: train by each file of settings, one after the other, and leave
this process's final weights and losses in the run's folder.

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
from vlmedit.training.run import make_accelerator

save, kept = Checkpoints.save, {}


def keep(self: Checkpoints, step: int) -> None:
    """The weights of this very process, of which the checkpoint holds the first one's."""
    kept.update({f"{role}/{k}": v.detach().clone() for role, m in self.modules.items() for k, v in m.thing.state_dict().items()})
    save(self, step)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Checkpoints.save = keep
    for file in map(Path, sys.argv[1:]):
        given = json.loads(file.read_text())
        config_class, train = find(given["method"])
        config = config_class.make("smoke", **given["settings"])
        accelerator = make_accelerator(config)
        kept.clear()
        losses = [step.metrics.get("loss", 0.0) for step in train(config, accelerator)]
        found = {"losses": torch.tensor(losses), "processes": torch.tensor(accelerator.num_processes)}
        save_file(kept | found, Path(config.out) / f"rank{accelerator.process_index}.safetensors")
