"""The trainer: resumed equals straight, killed anywhere leaves a whole checkpoint, guards guard, two processes equal one."""

import dataclasses
import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vlmedit import config as stated
from vlmedit.config import TIERS, TrainConfig
from vlmedit.data.batches import TEXT_LENGTH, CaptionedBatch, PairedBatch
from vlmedit.data.world import WorldData, captioned_batch
from vlmedit.errors import ConfigError
from vlmedit.flow import interpolate, logit_normal_time, velocity_target
from vlmedit.methods import find, names
from vlmedit.methods._base import Base, drop_text
from vlmedit.methods.judge import JudgeConfig, train_judge
from vlmedit.methods.teacher import TeacherConfig, train_teacher
from vlmedit.networks.dit import DiT
from vlmedit.networks.judge import ground_loss
from vlmedit.protocols import Phase, Trained
from vlmedit.seeds import seed_torch
from vlmedit.training import checkpoints as saving
from vlmedit.training.checkpoints import Checkpoints
from vlmedit.training.optimizer import EMA, Optimizer
from vlmedit.training.run import Run, make_accelerator
from vlmedit.training.trainer import train as train_method
from vlmedit.world.scene import GROUND_CLASSES
from vlmedit.world.tokenizer import build_tokenizer

ROOT = Path(__file__).parents[2]
ALL_STAGES = {name: find(name) for name in names()}
STAGES = {"teacher": (TeacherConfig, train_teacher, dict(side=16)), "judge": (JudgeConfig, train_judge, dict(side=32))}


def smoke(stage: str, out, **overrides):
    """A smoke configuration of six updates, and its trainer."""
    config, train, size = STAGES[stage]
    return config.make("smoke", **{"out": str(out), "steps": 6, "batch": 3, "precision": "no", **size, **overrides}), train


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Everything a finished run leaves: trained, averaged and saved weights."""
    out = {}
    for file in sorted([*folder.glob("checkpoint/*.safetensors"), *folder.glob("model/*.safetensors")]):
        out |= {f"{file.parent.name}/{file.name}/{k}": v for k, v in load_file(file).items()}
    return out


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- resume


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_a_straight_one(stage, tmp_path):
    """Six updates in one go, and four, an early stop, then the rest: weights, averages and the saved model are equal bit for
    bit, and so are the losses of the updates made after resuming. An update is saved before it is handed out."""
    config, train = smoke(stage, tmp_path / "straight")
    straight = [s.metrics["loss"] for s in train(config)]
    config, train = smoke(stage, tmp_path / "resumed")
    first = train(config)
    early = [next(first).metrics["loss"] for _ in range(4)]
    first.close()
    torch.manual_seed(12345)
    late = [(s.index, s.metrics["loss"]) for s in train(config)]
    assert [i for i, _ in late] == [5, 6]
    assert early + [v for _, v in late] == straight
    assert equal(weights(tmp_path / "straight"), weights(tmp_path / "resumed"))
    assert len(weights(tmp_path / "straight")) > 100


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    """SIGKILL in the middle of the fourth update of another process, then resumed here: equal bit for bit to the straight run."""
    config, train = smoke("teacher", tmp_path / "straight")
    list(train(config))
    config, train = smoke("teacher", tmp_path / "killed")
    code = f"""
import os, signal, torch
torch.set_num_threads(1)
from vlmedit.methods.teacher import TeacherConfig
from vlmedit.training.optimizer import Optimizer
from vlmedit.methods.teacher import train_teacher
step = Optimizer.step
def stop(self, index, accelerator):
    if index == 3: os.kill(os.getpid(), signal.SIGKILL)
    return step(self, index, accelerator)
Optimizer.step = stop
list(train_teacher(TeacherConfig.make('laptop', **{config.flat()!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert json.loads((tmp_path / "killed/checkpoint/state.json").read_text())["step"] == 3
    assert not (tmp_path / "killed/model").exists()
    assert [s.index for s in train(config)] == [4, 5, 6]
    assert equal(weights(tmp_path / "straight"), weights(tmp_path / "killed"))


def test_save_every_changes_nothing(tmp_path):
    """Saving often or at the end alone gives the same weights, and a finished run started again makes no update."""
    for name, every in (("often", 1), ("once", 100)):
        config, train = smoke("teacher", tmp_path / name, save_every=every)
        list(train(config))
    before = weights(tmp_path / "once")
    assert equal(weights(tmp_path / "often"), before)
    assert list(train(config)) == [] and equal(weights(tmp_path / "once"), before)


def test_updates_depend_on_the_seed(tmp_path):
    """Another seed gives other weights: the equalities above are not those of a constant."""
    for seed in (0, 1):
        config, train = smoke("teacher", tmp_path / str(seed), seed=seed, steps=2)
        list(train(config))
    assert not equal(weights(tmp_path / "0"), weights(tmp_path / "1"))


# --- checkpoints


class Killed(BaseException):
    """The process ends here."""


def small(tmp_path, **overrides) -> tuple[Checkpoints, nn.Module]:
    """Checkpoints of one small layer with optimizer and average."""
    config = TrainConfig.make("smoke", out=str(tmp_path), precision="no", **overrides)
    torch.manual_seed(0)
    model = nn.Linear(20, 20)
    checkpoints = Checkpoints(config, make_accelerator(config))
    checkpoints.register("model", model, Optimizer(model, config), EMA(model, 0.9))
    return checkpoints, model


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)


OPERATIONS = ((saving, "save_file"), (torch, "save"), (os, "replace"), (os, "fsync"), (saving.shutil, "rmtree"), (Path, "mkdir"), (Path, "write_text"))


@pytest.mark.parametrize("after", (False, True))
def test_killed_at_any_instant_of_a_save(tmp_path, monkeypatch, after):
    """The second save is killed before (or right after) each of its file operations in turn: what is found then is the whole
    first or the whole second checkpoint, never a mixture, and it is the second once the last rename was made."""
    found = []
    for instant in range(100):
        folder = tmp_path / str(instant)
        checkpoints, model = small(folder)
        fill(model, 1.0)
        checkpoints.averages["model"].load(model.state_dict())
        checkpoints.save(1)
        fill(model, 2.0)
        checkpoints.averages["model"].load(model.state_dict())
        count, killed = 0, False
        with monkeypatch.context() as patch:
            for home, name in OPERATIONS:

                def counted(*args, _do=getattr(home, name), **kwargs):
                    nonlocal count
                    count += 1
                    if count == instant + 1 and not after:
                        raise Killed
                    result = _do(*args, **kwargs)
                    if count == instant + 1:
                        raise Killed
                    return result

                patch.setattr(home, name, counted)
            try:
                checkpoints.save(2)
            except Killed:
                killed = True
        again, model = small(folder)
        step = again.resume()
        assert step in (1, 2)
        assert all((v == step).all() for v in model.state_dict().values())
        assert all((v == step).all() for v in again.averages["model"].shadow.values())
        again.save(3)  # whatever lies around, the next save works
        assert small(folder)[0].resume() == 3
        found.append(step)
        if not killed:
            break
    assert len(found) > 8 and found[0] == 1 and found[-1] == 2 and found == sorted(found)


def test_no_checkpoint_means_step_zero(tmp_path):
    """A fresh folder, or one where the very first save was cut short, starts from 0."""
    checkpoints, _ = small(tmp_path)
    assert checkpoints.resume() == 0
    (tmp_path / "checkpoint.partial").mkdir()
    assert checkpoints.resume() == 0


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no file size limit on this system")
@pytest.mark.parametrize("file", ("model.safetensors", "optimizers.pt"))
def test_a_full_disk_is_one_clear_error(tmp_path, file):
    """No file may reach its size (as on a full disk, here met by the first or by the largest file): an OSError names the
    checkpoint and the remedy, no partial folder stays, and the previous checkpoint is whole."""
    checkpoints, model = small(tmp_path)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    checkpoints.optimizers["model"].thing.step(0, checkpoints.accelerator)
    fill(model, 1.0)
    checkpoints.save(1)
    limit = (tmp_path / "checkpoint" / file).stat().st_size - 1
    assert (file == "optimizers.pt") == (limit > (tmp_path / "checkpoint/model.safetensors").stat().st_size)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="cannot write the checkpoint .*free disk space"):
            checkpoints.save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]
    again, model = small(tmp_path)
    assert again.resume() == 1 and all((v == 1).all() for v in model.state_dict().values())


@pytest.mark.parametrize("changed", (dict(lr=1e-4), dict(seed=5), dict(side=64), dict(betas=(0.5, 0.9)), dict(steps=9)))
def test_a_checkpoint_of_another_config_is_refused(tmp_path, changed):
    """The message names the folder, the setting, both values and the remedy; nothing is loaded."""
    small(tmp_path)[0].save(1)
    other, model = small(tmp_path, **changed)
    fill(model, 7.0)
    ((key, value),) = changed.items()
    with pytest.raises(ConfigError) as error:
        other.resume()
    text = str(error.value)
    now = list(value) if isinstance(value, tuple) else value
    assert str(tmp_path / "checkpoint") in text and f"{key}: " in text and f"{now} now" in text and "choose another out folder or delete it" in text
    assert all((v == 7).all() for v in model.state_dict().values())


def test_folder_and_cadence_may_differ(tmp_path):
    """A run may be moved and saved at another cadence."""
    small(tmp_path / "a")[0].save(2)
    (tmp_path / "a").rename(tmp_path / "b")
    assert small(tmp_path / "b", save_every=7)[0].resume() == 2


def test_stages_of_different_precision_follow_each_other_in_one_process(tmp_path):
    """bf16 and full precision take turns: each stage's matrix products have its own type, whatever ran before."""
    for precision, dtype in (("bf16", torch.bfloat16), ("no", torch.float32), ("bf16", torch.bfloat16)):
        run = layer_run(tmp_path / precision, precision=precision)
        with run.accelerator.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


class OneLayer(Base):
    """A method of one linear layer, whose loss draws what is random in it."""

    batch, result = CaptionedBatch, "layer"

    def __init__(self, ema: float = 0.0):
        super().__init__({"layer": Trained(nn.Linear(4, 4), ema=ema)})
        self.drawn: list[float] = []

    def backward(self, phase: Phase, batch: CaptionedBatch, memory: dict, index: int) -> dict:
        memory["out"] = self.trained["layer"].module(torch.ones(1, 4))
        memory["out"].square().mean().backward()
        self.drawn.append(torch.rand(1).item())
        return {"loss": 1.5, "calls": 2}

    def pictures(self, batch: CaptionedBatch, memory: dict) -> dict:
        return {"grid": memory["out"]}

    def save(self, state: dict, folder: Path) -> None:
        folder.mkdir()


def layer_run(out: Path, **settings) -> Run:
    """A run of one layer."""
    config = TrainConfig.make("smoke", out=str(out), **{"precision": "no", "side": 16, **settings})
    return Run(OneLayer(), WorldData(config), config)


# --- the optimizer


def layer(**overrides) -> tuple[nn.Module, Optimizer, TrainConfig]:
    torch.manual_seed(0)
    config = TrainConfig.make("smoke", **overrides)
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 3))
    return model, Optimizer(model, config), config


@pytest.mark.parametrize("value", (math.nan, math.inf, 1e4))
def test_guard_skips_spikes_and_non_finite_gradients(value):
    """A gradient that is not finite, or whose norm exceeds `skip_above`, changes neither weights nor optimizer state, is reported,
    and is cleared; the next sound one is applied."""
    model, optimizer, config = layer()
    accelerator = make_accelerator(config)

    def update(g):
        for p in model.parameters():
            p.grad = torch.full_like(p, g)
        return optimizer.step(0, accelerator)

    assert update(0.01)[1]
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, json.dumps(str(optimizer.state_dict()))
    norm, made = update(value)
    assert not made and not (norm < config.skip_above)
    assert equal(dict(model.state_dict()), before) and json.dumps(str(optimizer.state_dict())) == state
    assert all(p.grad is None for p in model.parameters())
    norm, made = update(0.01)
    assert made and not equal(dict(model.state_dict()), before) and math.isfinite(norm)


def test_norm_is_that_before_clipping_and_clipping_bounds_the_step():
    """The reported norm is the closed form of a constant gradient; beyond `clip` the gradient's size no longer matters."""
    out = []
    for g in (1.0, 10.0):
        model, optimizer, config = layer(clip=0.5)
        count = sum(p.numel() for p in model.parameters())
        for p in model.parameters():
            p.grad = torch.full_like(p, g)
        norm, made = optimizer.step(0, make_accelerator(config))
        assert made and norm == pytest.approx(g * count**0.5, rel=1e-5)
        out.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(out[0], out[1], atol=1e-6, rtol=0)


def test_rate_warms_up_and_falls_as_a_cosine():
    """Linear to the peak at the end of the warm-up, half way down in the middle, `final_lr` of it at the end and after."""
    config = TrainConfig.make(steps=1100, warmup=100, lr=0.01, final_lr=0.1)
    optimizer = Optimizer(nn.Linear(2, 2), config)
    assert [optimizer.rate(k) for k in (0, 49, 99)] == pytest.approx([1e-4, 5e-3, 1e-2])
    assert optimizer.rate(100) == pytest.approx(0.01)
    assert optimizer.rate(600) == pytest.approx(0.01 * (0.1 + 0.9 / 2))
    assert optimizer.rate(1100) == optimizer.rate(5000) == pytest.approx(1e-3)


def test_matrices_go_to_muon_and_everything_goes_somewhere():
    """Every trainable parameter of the DiT is in exactly one optimizer; embeddings, biases and convolutions are AdamW's."""
    model = DiT(side=16, vocab_size=len(build_tokenizer()))
    names = {p: n for n, p in model.named_parameters()}
    optimizer = Optimizer(model, TrainConfig.make())
    adam, muon = ([names[p] for g in part.param_groups for p in g["params"]] for part in optimizer.parts)
    assert sorted(adam + muon) == sorted(names.values())
    assert all(dict(model.named_parameters())[n].ndim == 2 and "embed" not in n for n in muon) and len(muon) > 20
    assert any("embed" in n for n in adam) and all(n not in muon for n in names.values() if n.endswith("bias"))


# --- the average


def test_ema_in_closed_form():
    """After weights w_0 .. w_n the average is the weighted sum with decays min(decay, (1 + k) / (10 + k)), in float64 to 1e-6."""
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.9)
    expected = {k: v.double().clone() for k, v in model.state_dict().items()}
    for k in range(120):
        fill(model, math.sin(k))
        ema.update(model, k)
        decay = min(0.9, (1 + k) / (10 + k))
        expected = {n: decay * v + (1 - decay) * math.sin(k) for n, v in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(ema.shadow[name].double(), value, atol=1e-6, rtol=0)
    assert not torch.equal(ema.shadow["weight"], model.weight)


def test_ema_of_a_constant_and_with_decay_zero():
    """Equal weights are kept to 1e-7, and decay 0 follows the model exactly; counters are copied, not averaged."""
    model = nn.BatchNorm1d(3)
    for decay in (0.9, 0.0):
        ema = EMA(model, decay)
        model.num_batches_tracked += 5
        ema.update(model, 50)
        assert ema.shadow["num_batches_tracked"] == model.num_batches_tracked
        torch.testing.assert_close(ema.shadow["weight"], model.weight.detach(), atol=1e-7, rtol=0)
    fill(model, 3.0)
    ema.update(model, 50)
    assert torch.equal(ema.shadow["weight"], model.weight)


def test_ema_does_not_share_memory_with_the_model():
    """Training the model in place leaves its average alone."""
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.9)
    before = ema.shadow["weight"].clone()
    fill(model, 9.0)
    assert torch.equal(ema.shadow["weight"], before)


# --- two processes


def joint_teacher(config: TeacherConfig, processes: int) -> tuple[DiT, list[float]]:
    """The reference, in one process: gradients of every rank's batch summed by autograd and divided once."""
    accelerator = make_accelerator(config)
    torch.manual_seed(config.seed)
    model = DiT(side=config.side, vocab_size=len(build_tokenizer()), text_length=TEXT_LENGTH, ground_classes=GROUND_CLASSES)
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


def test_two_processes_train_as_one_on_the_joint_batch(tmp_path):
    """Two processes over gloo draw different batches, average their gradients and end with the same weights, bit for bit;
    these are the weights of one process on the joint gradient (1e-5; a step is about 1e-3), not those of either alone."""
    steps = 2
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(Path(__file__).parents[1] / "helpers" / "two_processes.py"), str(tmp_path), str(steps)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [load_file(tmp_path / f"rank{r}.safetensors") for r in range(2)]
    losses = [r.pop("losses").tolist() for r in ranks]
    assert [int(r.pop("processes")) for r in ranks] == [2, 2]
    assert equal(*ranks) and losses[0] != losses[1]
    config = TeacherConfig.make("smoke", out=str(tmp_path / "one"), side=16, steps=steps, batch=3, precision="no")
    model, expected = joint_teacher(config, 2)
    assert [x for pair in zip(*losses) for x in pair] == pytest.approx(expected, rel=1e-5)
    distance = lambda other: max((v - other[k]).abs().max().item() for k, v in ranks[0].items())
    assert distance(model.state_dict()) < 1e-5
    assert distance(joint_teacher(config, 1)[0].state_dict()) > 1e-4
    saved = load_file(tmp_path / "checkpoint/teacher.safetensors")
    assert equal(saved, ranks[0])  # one process wrote, once


def test_the_reference_of_that_test_is_the_trainer(tmp_path):
    """With one process the reference loop gives the trainer's own weights, exactly."""
    config, train = smoke("teacher", tmp_path, steps=2)
    list(train(config))
    model, _ = joint_teacher(config, 1)
    assert equal(load_file(tmp_path / "checkpoint/teacher.safetensors"), {k: v for k, v in model.state_dict().items()})


# --- the run and its record


def test_steps_are_detached_records(tmp_path):
    """A Step has plain numbers and detached pictures, counts from 1, and cannot be changed; logs and config are written."""
    config = TrainConfig.make("smoke", out=str(tmp_path), precision="no", side=16, skip_above=1e-9)
    records = list(train_method(OneLayer(), WorldData(config), config))
    assert [(r.index, r.total, r.skipped) for r in records] == [(1, 2, True), (2, 2, True)]
    assert not records[0].pictures["grid"].requires_grad and all(type(v) in (float, int) for r in records for v in r.metrics.values())
    assert all(r.metrics["loss"] == 1.5 and r.metrics["calls"] == 2 and r.metrics["skipped"] == 1 for r in records)
    with pytest.raises(dataclasses.FrozenInstanceError):
        records[0].index = 3
    assert json.loads((tmp_path / "config.json").read_text())["batch"] == config.batch
    assert list((tmp_path / "vlmedit").iterdir()) and (tmp_path / "model").is_dir()


def test_update_randomness_is_of_seed_index_and_number(tmp_path):
    """Inside an update torch's generator starts from (seed, index, number of the batch) whatever came before."""
    drawn = []
    for out in ("a", "b"):
        config = TrainConfig.make("smoke", out=str(tmp_path / out), precision="no", side=16, steps=3)
        method = OneLayer()
        for step in train_method(method, WorldData(config), config):
            torch.manual_seed(len(drawn) + step.index)
        drawn.append(method.drawn)
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3


def test_batches_that_are_accumulated_have_streams_of_their_own(tmp_path):
    """Two batches of an update draw different numbers, floats are averaged over them and ints added up."""
    config = TrainConfig.make("smoke", out=str(tmp_path), precision="no", side=16, accumulate=2)
    method = OneLayer()
    steps = list(train_method(method, WorldData(config), config))
    assert len(set(method.drawn)) == 4 and steps[0].metrics["calls"] == 4 and steps[0].metrics["loss"] == 1.5


def test_data_that_lack_what_a_method_needs_are_refused(tmp_path):
    """A method that asks for batches which the data do not give is told so before an update is made."""
    config = TrainConfig.make("smoke", out=str(tmp_path), precision="no", side=16)
    data = WorldData(config)
    del data.draws[CaptionedBatch]
    with pytest.raises(ConfigError, match="gives no CaptionedBatch"):
        next(train_method(OneLayer(), data, config))
    assert data.gives(PairedBatch)


# --- configuration


def test_the_names_of_choices_are_the_keys_of_their_tables():
    """In the tables' own order, which is the order of the messages; a real run's questions and objectives are some of the miniature's."""
    from vlmedit.data import requests, world
    from vlmedit.equations.matching import OBJECTIVES
    from vlmedit.training import settings
    from vlmedit.world.edits import ALL_TYPES

    assert stated.TASKS == tuple(world.TASKS) and stated.EDIT_TYPES == tuple(ALL_TYPES)
    assert stated.QUESTIONS == settings.QUESTIONS == tuple(requests.QUESTIONS)
    assert set(settings.MATCHING) <= set(OBJECTIVES)


def test_reading_settings_needs_no_torch():
    """What all settings share is there without torch, and with no module of the package but the errors."""
    code = """
import sys, vlmedit.config
heavy = [m for m in ('torch', 'numpy', 'PIL', 'diffusers', 'transformers') if m in sys.modules]
print(heavy, sorted(m for m in sys.modules if m.startswith('vlmedit.')))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1) == ["[]", "['vlmedit.config', 'vlmedit.errors']\n"]


def test_unknown_keys_and_tiers_show_the_nearest():
    """An unknown key names the stage and the nearest keys; an unknown tier names the tiers."""
    with pytest.raises(ConfigError, match="unknown config key 'stpes' of TeacherConfig; nearest: steps"):
        TeacherConfig.make(stpes=3)
    with pytest.raises(ConfigError, match="unknown config key 'zzz' of JudgeConfig; nearest: data, out, seed, steps"):
        JudgeConfig.make(zzz=3)
    with pytest.raises(ConfigError, match="unknown tier 'huge'; known: smoke, laptop, gpu"):
        TrainConfig.make("huge")


@pytest.mark.parametrize("bad", (dict(steps=0), dict(batch=0), dict(side=0), dict(save_every=0), dict(ema=1.0), dict(ema=-0.1), dict(lr=0.0), dict(precision="fp64")))
def test_impossible_settings_are_named(bad):
    """Each message carries the setting's name and value."""
    ((key, value),) = bad.items()
    with pytest.raises(ConfigError, match=f"^{key} is '?{value}"):
        TrainConfig.make(**bad)


IMPOSSIBLE = (
    ("npedit", dict(guidance=float("nan"))), ("npedit", dict(judge_weight=-0.1)), ("npedit", dict(request_limit=0)), ("npedit", dict(sampler_steps=0)), ("npedit", dict(sampler_shift=-1.0)),
    ("npedit", dict(lr="fast")), ("npedit", dict(batch=2.5)), ("npedit", dict(warmup=True)), ("judge", dict(size="huge")), ("judge", dict(attack_share=2)), ("judge", dict(attack_radius=-1)),
    ("flow_grpo", dict(kl_weight=-1)), ("flow_grpo", dict(ratio_clip=0)), ("teacher", dict(text_dropout=1.5)), ("cyclegan_turbo", dict(critic_lr=0.0)),
)  # fmt: skip


@pytest.mark.parametrize("stage, bad", IMPOSSIBLE, ids=[f"{stage} {next(iter(bad))}" for stage, bad in IMPOSSIBLE])
def test_impossible_settings_of_a_stage_are_named(stage, bad):
    ((key, value),) = bad.items()
    with pytest.raises(ConfigError, match=f"^{key} is '?{value}'?; (it must be|it is|known)"):
        ALL_STAGES[stage][0].make(**bad)


@pytest.mark.parametrize("config", (TrainConfig, *(config for config, _ in ALL_STAGES.values())))
def test_every_tier_of_every_stage_exists_and_round_trips(config, tmp_path):
    """Tiers build, overrides win over them, configs are frozen, and the saved file builds the same config."""
    for tier in TIERS:
        made = config.make(tier, seed=9)
        assert made.seed == 9
        made.save(tmp_path / "config.json")
        again = json.loads((tmp_path / "config.json").read_text())
        assert config.make(**{k: tuple(v) if isinstance(v, list) else v for k, v in again.items()}) == made
        with pytest.raises(dataclasses.FrozenInstanceError):
            made.seed = 1
    assert config.make("smoke", steps=5).steps == 5
