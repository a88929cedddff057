"""Resumed equals straight, bit for bit: after an early stop, after SIGKILL in an update, and after SIGKILL at random
instants."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.killed_at_random import equal, weights

from vlmedit.methods.judge import JudgeConfig, train_judge
from vlmedit.methods.teacher import TeacherConfig, train_teacher

ROOT = Path(__file__).parents[2]
STAGES = {"teacher": (TeacherConfig, train_teacher, dict(side=16)), "judge": (JudgeConfig, train_judge, dict(side=32))}


def smoke(stage: str, out, **overrides):
    """A smoke configuration of six updates, and its trainer."""
    config, train_stage, size = STAGES[stage]
    return config.make(
        "smoke", **{"out": str(out), "steps": 6, "batch": 3, "precision": "no", **size, **overrides}
    ), train_stage


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_a_straight_one(stage, tmp_path):
    """Six updates in one go, and three, an early stop, then the rest: weights, averages and the saved model are equal
    bit for bit, and so are the losses of the updates made after resuming."""
    config, train_stage = smoke(stage, tmp_path / "straight", save_every=3)
    straight = [s.metrics["loss"] for s in train_stage(config)]
    config, train_stage = smoke(stage, tmp_path / "resumed", save_every=3)
    first = train_stage(config)
    early = [next(first).metrics["loss"] for _ in range(4)]  # the fourth is made but not saved
    first.close()
    torch.manual_seed(12345)
    late = [(s.index, s.metrics["loss"]) for s in train_stage(config)]
    assert [i for i, _ in late] == [4, 5, 6]
    assert early + [v for _, v in late[1:]] == straight and late[0][1] == straight[3]
    assert equal(weights(tmp_path / "straight"), weights(tmp_path / "resumed"))
    assert len(weights(tmp_path / "straight")) > 100


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    """SIGKILL in the middle of the fourth update of another process, then resumed here: equal bit for bit to the
    straight run."""
    config, train_stage = smoke("teacher", tmp_path / "straight")
    list(train_stage(config))
    config, train_stage = smoke("teacher", tmp_path / "killed")
    code = f"""
import os, signal, torch
torch.set_num_threads(1)
from vlmedit.methods.teacher import TeacherConfig, train_teacher
from vlmedit.training.optimizer import Optimizer
step = Optimizer.step
def stop(self, index, accelerator):
    if index == 3: os.kill(os.getpid(), signal.SIGKILL)
    return step(self, index, accelerator)
Optimizer.step = stop
list(train_teacher(TeacherConfig.make(**{config.flat()!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert json.loads((tmp_path / "killed/checkpoint/state.json").read_text())["step"] == 3
    assert not (tmp_path / "killed/model").exists()
    assert [s.index for s in train_stage(config)] == [4, 5, 6]
    assert equal(weights(tmp_path / "straight"), weights(tmp_path / "killed"))


def test_save_every_changes_nothing(tmp_path):
    """Saving often or at the end alone gives the same weights, and a finished run started again makes no update."""
    for name, every in (("often", 1), ("once", 100)):
        config, train_stage = smoke("teacher", tmp_path / name, save_every=every)
        list(train_stage(config))
    before = weights(tmp_path / "once")
    assert equal(weights(tmp_path / "often"), before)
    assert list(train_stage(config)) == [] and equal(weights(tmp_path / "once"), before)


def test_updates_depend_on_the_seed(tmp_path):
    """Another seed gives other weights: the equalities above are not those of a constant."""
    for seed in (0, 1):
        config, train_stage = smoke("teacher", tmp_path / str(seed), seed=seed, steps=2)
        list(train_stage(config))
    assert not equal(weights(tmp_path / "0"), weights(tmp_path / "1"))


RANDOM_KILLS = (
    4  # twenty, when something of checkpoints changes: python tests/helpers/killed_at_random.py MODELS FOLDER 20
)


def test_runs_killed_at_random_instants_resume_to_the_same_bits(folder, tmp_path):
    """SIGKILL anywhere in an NP-Edit run of four updates that saves after each, so also within a save: started again it
    ends in the straight run's weights, averages, optimizer states and metrics; a run of another seed does not."""
    command = [
        sys.executable,
        str(ROOT / "tests/helpers/killed_at_random.py"),
        str(folder),
        str(tmp_path),
        str(RANDOM_KILLS),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and f"{RANDOM_KILLS} runs killed, 0 ended otherwise" in done.stdout, (
        done.stdout + done.stderr
    )
