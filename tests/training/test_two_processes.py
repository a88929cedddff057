"""Two processes over gloo are one on the joint batch: to the bit one that accumulates two batches, in every method."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.killed_at_random import equal, weights
from safetensors.torch import load_file

from vlmedit.data.batches import TEXT_LENGTH
from vlmedit.data.world import captioned_batch
from vlmedit.flow import interpolate, logit_normal_time, velocity_target
from vlmedit.methods import find
from vlmedit.methods._base import drop_text
from vlmedit.methods.teacher import TeacherConfig, train_teacher
from vlmedit.networks.dit import DiT
from vlmedit.networks.judge import ground_loss
from vlmedit.seeds import seed_torch
from vlmedit.training.optimizer import Optimizer
from vlmedit.training.run import make_accelerator
from vlmedit.world.scene import GROUND_CLASSES
from vlmedit.world.tokenizer import build_tokenizer

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests" / "helpers"
TINY = dict(side=16, steps=2, batch=4, warmup=1, save_every=2, precision="no", trackers=[])
LAUNCHED = {  # by label: a method and its settings, of places in the folder of tiny models
    "joint teacher": ("teacher", dict(batch=3, save_every=100)),
    "teacher": ("teacher", {}),
    "judge": ("judge", dict(size="small", attack_from=1, softener=None)),
    "copy_warmup": ("copy_warmup", dict(teacher="teacher", reading_steps=1, reading_batch=4)),
    "npedit, shared rollouts": ("npedit", dict(teacher="teacher", student="student", judge="judge")),
    "npedit, fresh rollouts": (
        "npedit",
        dict(teacher="teacher", student="student", judge="judge", fake_rollouts="fresh"),
    ),
    "sft": ("sft", dict(student="student")),
    "flow_grpo": ("flow_grpo", dict(student="student", judge="judge", group=2)),
    "cyclegan_turbo": ("cyclegan_turbo", dict(teacher="teacher", student="student")),
    "bootstrap": ("bootstrap", dict(teacher="teacher", student="student")),
    "distill": ("distill", dict(teacher="teacher")),
}
ALIKE = [label for label in LAUNCHED if label != "joint teacher"]


def settings_of(label: str, models: Path, out: Path, **more) -> dict:
    places = {role: str(models / role) for role in ("teacher", "student", "judge")}
    given = {k: places.get(v, v) if isinstance(v, str) else v for k, v in LAUNCHED[label][1].items()}
    return {**TINY, **given, "out": str(out), **more}


@pytest.fixture(scope="module")
def launched(folder, tmp_path_factory) -> Path:
    """Every row of the table, trained by two processes over gloo: a folder of each."""
    home = tmp_path_factory.mktemp("two")
    files = []
    for label, (method, _) in LAUNCHED.items():
        files.append(home / f"{label}.json")
        files[-1].write_text(json.dumps({"method": method, "settings": settings_of(label, folder, home / label)}))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(HELPERS / "two_processes.py"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *map(str, files)], cwd=home, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return home


def steps_of(run: Path) -> list[list[dict]]:
    """The metrics of every update, as each process tells them."""
    return [json.loads((run / f"steps{rank}.json").read_text()) for rank in range(2)]


def joint_teacher(config: TeacherConfig, processes: int) -> tuple[DiT, list[float]]:
    """The reference, in one process: gradients of every rank's batch summed by autograd and divided once."""
    accelerator = make_accelerator(config)
    torch.manual_seed(config.seed)
    model = DiT(
        side=config.side, vocab_size=len(build_tokenizer()), text_length=TEXT_LENGTH, ground_classes=GROUND_CLASSES
    )
    optimizer, losses = Optimizer(model, config), []
    for index in range(config.steps):
        for rank in range(processes):
            seed_torch("update", config.seed, index, rank)
            batch = captioned_batch(config.batch, config.side, config.seed, index, rank)
            text = drop_text(batch.caption, config.text_dropout)
            t = logit_normal_time(config.batch, config.time_shift)
            eps = torch.randn_like(batch.image)
            v, seen = model(interpolate(batch.image, eps, t), t, text, with_ground=True)
            loss = (v - velocity_target(batch.image, eps)).square().mean()
            ((loss + config.ground_weight * ground_loss(seen, batch.ground)) / processes).backward()
            losses.append(loss.item())
        optimizer.step(index, accelerator)
    return model, losses


def distance(a: dict, b: dict) -> float:
    """The largest difference of any weight."""
    return max((v - b[k]).abs().max().item() for k, v in a.items())


def test_two_processes_train_as_one_on_the_joint_batch(launched, tmp_path):
    """Two processes over gloo draw different batches, average their gradients and end with the same weights, bit for
    bit; these are the weights of one process on the joint gradient (1e-5; a step is about 1e-3), not those of either
    alone. A step tells the mean loss of both."""
    ranks = [load_file(launched / "joint teacher" / f"rank{r}.safetensors") for r in range(2)]
    losses = [r.pop("losses").tolist() for r in ranks]
    assert [int(r.pop("processes")) for r in ranks] == [2, 2]
    assert equal(*ranks) and losses[0] != losses[1]
    config = TeacherConfig.make("smoke", out=str(tmp_path / "one"), side=16, steps=2, batch=3, precision="no")
    model, expected = joint_teacher(config, 2)
    assert [x for pair in zip(*losses, strict=True) for x in pair] == pytest.approx(expected, rel=1e-5)
    told = [[step["loss"] for step in steps] for steps in steps_of(launched / "joint teacher")]
    assert told[0] == told[1] == pytest.approx([sum(pair) / 2 for pair in zip(*losses, strict=True)], rel=1e-6)
    trained = {k.removeprefix("teacher/"): v for k, v in ranks[0].items()}
    assert distance(trained, model.state_dict()) < 1e-5
    assert distance(trained, joint_teacher(config, 1)[0].state_dict()) > 1e-4
    saved = load_file(launched / "joint teacher" / "checkpoint/teacher.safetensors")
    assert equal(saved, trained)  # one process wrote, once


@pytest.mark.parametrize("label", ALIKE)
def test_two_processes_end_in_the_bits_of_one_that_accumulates_two_batches(folder, launched, tmp_path, label):
    """Every method but the pairs', which has a pool in each process: weights of all roles, averages, the saved model,
    optimizer states and metrics; and both processes have the same weights. One batch alone gives others."""
    config_class, train = find(LAUNCHED[label][0])
    steps, _ = (
        list(train(config_class.make("smoke", **settings_of(label, folder, tmp_path / str(n), accumulate=n))))
        for n in (2, 1)
    )
    told = [{k: v for k, v in step.metrics.items() if not k.startswith(("cpu", "seconds"))} for step in steps]
    one, two = weights(tmp_path / "2"), weights(launched / label)
    assert len(one) > 80 and equal(one, two) and not equal(weights(tmp_path / "1"), two)
    states = [torch.load(f / "checkpoint/optimizers.pt", weights_only=True) for f in (tmp_path / "2", launched / label)]
    assert equal(*states)
    ranks = [load_file(launched / label / f"rank{r}.safetensors") for r in range(2)]
    losses = [r.pop("losses").tolist() for r in ranks]
    assert equal(*ranks) and int(ranks[0]["processes"]) == 2
    assert not losses[0] or losses[0] != losses[1]
    assert steps_of(launched / label) == [told, told]


def test_the_reference_of_that_test_is_the_trainer(tmp_path):
    """With one process the reference loop gives the trainer's own weights, exactly."""
    config = TeacherConfig.make("smoke", out=str(tmp_path), side=16, steps=2, batch=3, precision="no")
    list(train_teacher(config))
    model, _ = joint_teacher(config, 1)
    assert equal(load_file(tmp_path / "checkpoint/teacher.safetensors"), dict(model.state_dict()))
