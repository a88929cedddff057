"""Run by test_trainer.py under torch's launcher: train a smoke teacher and leave the final weights of every process in `out`.

Usage: python -m torch.distributed.run --standalone --nproc_per_node 2 two_processes.py OUT STEPS
"""

import sys

import torch
from safetensors.torch import save_file

from vlmedit.methods.teacher import TeacherConfig, train_teacher
from vlmedit.training.checkpoints import Checkpoints
from vlmedit.training.run import Run, make_accelerator

torch.set_num_threads(1)
out, steps = sys.argv[1], int(sys.argv[2])
config = TeacherConfig.make("smoke", out=out, side=16, steps=steps, batch=3, precision="no", save_every=100)
accelerator = make_accelerator(config)
save, kept = Checkpoints.save, {}


def keep(self, step):
    kept.update({k: v.detach().clone() for k, v in self.modules["teacher"].thing.state_dict().items()})
    save(self, step)


Checkpoints.save = keep  # sees the trained weights before the averaged ones replace them
note, losses = Run.note, []


def listen(self, number, metrics):
    losses.append(metrics["loss"])  # this process's own; a step has the mean
    note(self, number, metrics)


Run.note = listen
list(train_teacher(config, accelerator))
kept |= {"losses": torch.tensor(losses), "processes": torch.tensor(accelerator.num_processes)}
save_file(kept, f"{out}/rank{accelerator.process_index}.safetensors")
