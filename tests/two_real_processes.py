"""Run by test_real_train.py under torch's launcher: tiny real runs in every process, one after the other, from files of settings.
Each is stopped in its last update and started again.

Usage: python -m torch.distributed.run --standalone --nproc_per_node 2 two_real_processes.py SETTINGS.json ...
"""

import json
import sys
from pathlib import Path

import torch

from vlmedit.cli import typed
from vlmedit.real.settings import RealConfig
from vlmedit.real.sharding import DTensor
from vlmedit.real.train import RealOptimizer, make_accelerator, train_real

torch.set_num_threads(1)
sharded, step = [], RealOptimizer.step


def watch(self, index, accelerator):
    sharded.append(sum(isinstance(p, DTensor) for p in self.model.parameters()))
    return step(self, index, accelerator)


RealOptimizer.step = watch
for file in sys.argv[1:]:
    sharded.clear()
    config = RealConfig.make("laptop", **typed(RealConfig, json.loads(Path(file).read_text())))
    accelerator = make_accelerator(config)
    norms = []
    for s in train_real(config, accelerator):
        norms.append(s.metrics["gradient_norm"])
        if s.index == config.steps:
            break  # killed before its last checkpoint
    norms += [s.metrics["gradient_norm"] for s in train_real(config, accelerator)]
    record = {"norms": norms, "sharded": sharded, "processes": accelerator.num_processes}
    (Path(config.out) / f"rank{accelerator.process_index}.json").write_text(json.dumps(record))
