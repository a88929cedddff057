"""Run by test_engine.py under a launcher: train a smoke teacher and leave each process's weights and steps in the out folder."""

import sys

import torch
from safetensors.torch import save_file

from vlmedit.train import teacher
from vlmedit.train.config import TeacherConfig
from vlmedit.train.engine import Checkpoints, make_accelerator

torch.set_num_threads(1)
out, steps = sys.argv[1], int(sys.argv[2])
config = TeacherConfig.make("smoke", out=out, side=16, steps=steps, batch=3, precision="no", save_every=100)
accelerator = make_accelerator(config)
kept = {}
save = Checkpoints.save


def keep(self, step):  # the weights of this process, whichever it is, at every checkpoint
    kept.update({k: v.detach().clone() for k, v in self.modules["model"].state_dict().items()})
    save(self, step)


Checkpoints.save = keep
config = TeacherConfig.make("smoke", out=out, side=16, steps=steps, batch=3, precision="no", save_every=100)
losses = [step.metrics["loss"] for step in teacher.train_teacher(config, accelerator)]
kept["losses"] = torch.tensor(losses)
kept["processes"] = torch.tensor(accelerator.num_processes)
save_file({k: v.contiguous() for k, v in kept.items()}, f"{out}/rank{accelerator.process_index}.safetensors")
