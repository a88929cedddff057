"""The one trainer carries out the phases that a method names: draws, random streams, steps, averages, records; and
refuses what cannot be."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers.killed_at_random import configuration as tiny_npedit
from helpers.killed_at_random import equal
from safetensors.torch import load_file
from torch import nn

from vlmedit.config import TrainConfig
from vlmedit.data.batches import Batch
from vlmedit.data.world import WorldData
from vlmedit.errors import ConfigError
from vlmedit.methods import find
from vlmedit.methods._base import Base
from vlmedit.methods.npedit import train_npedit
from vlmedit.protocols import Phase, Trained
from vlmedit.seeds import seed_torch
from vlmedit.training.optimizer import EMA, Optimizer
from vlmedit.training.run import Step, make_accelerator
from vlmedit.training.trainer import train


@dataclasses.dataclass(frozen=True)
class Numbers(Batch):
    """Rows of numbers."""

    x: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Letters(Batch):
    """What no data give."""

    x: torch.Tensor


class Toy(Base):
    """Two layers, told apart by their names; what happens is written down."""

    batch = Numbers

    def __init__(self, plan: list[Phase], ema: float = 0.0):
        torch.manual_seed(0)
        self.student, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        super().__init__({"student": Trained(self.student, ema=ema), "other": Trained(self.other, lr=0.5, ema=0.9)})
        self.plan, self.told = plan, []

    def phases(self, index):
        for phase in self.plan:
            self.told.append((index, "phase", phase.name))
            yield phase

    def backward(self, phase, batch, memory, index):
        memory.setdefault("drawn", []).append(torch.rand(1).item())
        self.told.append((index, phase.name, tuple(memory["drawn"]), tuple(batch.x.flatten().tolist())))
        for name in phase.trains:
            (self.trained[name].module(batch.x).square().mean() * 1e-2).backward()
        return {"loss": float(len(memory["drawn"])), "calls": 3}

    def after(self, index):
        self.told.append((index, "after"))

    def pictures(self, batch, memory):
        return {"grid": self.student(batch.x).view(-1, 1, 2, 2).expand(-1, 3, -1, -1)}

    def save(self, state, folder):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / "state.pt")


STUDENT = Phase("student", ("student",), Numbers)


def toy_config(out: Path, **given) -> TrainConfig:
    return TrainConfig.make(
        "smoke", out=str(out), **{"batch": 2, "steps": 2, "precision": "no", "trackers": (), **given}
    )


def toy_data(config: TrainConfig, asked: list | None = None) -> WorldData:
    def draw(size, *key):
        asked.append((size, *key)) if asked is not None else None
        return Numbers(torch.full((size, 4), float(1 + key[1] + 2 * key[2] + 5 * len(key[3:]))))

    return WorldData(config, {Numbers: draw})


def toy(out: Path, *plan: Phase, ema: float = 0.0, **given) -> tuple[Toy, list[Step], list]:
    """A finished run of a toy: the method, its steps, what was drawn."""
    config, method, asked = toy_config(out, **given), Toy(list(plan), ema), []
    return method, list(train(method, toy_data(config, asked), config)), asked


def test_phases_are_carried_out_in_order_and_batches_are_drawn_when_named(tmp_path):
    """A phase with a batch draws anew, by its key and size; one without has the last draw again; each is asked for when
    the one before it is done, and `after` comes once per update, last."""
    plan = (
        STUDENT,
        Phase("other", ("other",)),
        Phase("extra", (), Numbers, key=("extra", 1), size=5),
        Phase("again", ("student", "other")),
    )
    method, steps, asked = toy(tmp_path, *plan)
    assert asked == [(2, 0, 0, 0), (5, 0, 0, 0, "extra", 1), (2, 0, 1, 0), (5, 0, 1, 0, "extra", 1)]
    order = [t[1:3] if t[1] == "phase" else t[1] for t in method.told if t[0] == 0]
    assert order == [
        ("phase", "student"),
        "student",
        ("phase", "other"),
        "other",
        ("phase", "extra"),
        "extra",
        ("phase", "again"),
        "again",
        "after",
    ]
    rows = {t[1]: t[3] for t in method.told if len(t) == 4 and t[0] == 1}
    assert rows["student"] == rows["other"] and rows["extra"] == rows["again"] and len(rows["extra"]) == 20
    assert [s.metrics["loss"] for s in steps] == [
        4.0,
        4.0,
    ]  # the memory lives for one update, and a later phase's word counts
    assert all({"cpu_student", "cpu_other", "cpu_data", "seconds_data"} <= s.metrics.keys() for s in steps)


def test_randomness_is_of_seed_update_and_number_and_goes_on_from_phase_to_phase(tmp_path):
    """The first phase of batch `number` starts at (seed, update, number) whatever was drawn before, the second goes on
    where it stopped, as if nobody had drawn between; numbers of one process that accumulates have streams of their
    own."""
    method, _, _ = toy(tmp_path, STUDENT, Phase("other", ("other",)), accumulate=2)
    found = [t[2] for t in method.told if len(t) == 4 and t[1] == "other"]  # of updates 0, 0, 1, 1, batches 0, 1, 0, 1
    for drawn, (index, number) in zip(found, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        seed_torch("update", 0, index, number)
        assert drawn == (torch.rand(1).item(), torch.rand(1).item())
    assert len({d for pair in found for d in pair}) == 8


def test_only_what_a_phase_trains_moves_each_with_its_own_rate(tmp_path):
    """Weights of a role that no phase trains stay, bit for bit; the peak of a role's own is its optimizer's."""
    fresh = Toy([])
    method, _, _ = toy(tmp_path, STUDENT)
    assert equal(method.other.state_dict(), fresh.other.state_dict()) and not equal(
        method.student.state_dict(), fresh.student.state_dict()
    )
    states = torch.load(tmp_path / "checkpoint/optimizers.pt", weights_only=True)
    assert states.keys() == {"student", "other"}
    assert Optimizer(method.other, toy_config(tmp_path), method.trained["other"].lr).rate(0) == 0.5


def test_averages_move_once_per_update_of_what_was_trained_in_it(tmp_path, monkeypatch):
    """Two steps of the student in an update move its average once, with the weights after both; what was not trained,
    not at all; the model is the average."""
    moved, update = [], EMA.update
    monkeypatch.setattr(
        EMA,
        "update",
        lambda self, module, index: (
            moved.append((module, index, module.weight.detach().clone())) or update(self, module, index)
        ),
    )
    method, _, _ = toy(tmp_path, STUDENT, STUDENT, ema=0.5)
    assert [(m is method.student, index) for m, index, _ in moved] == [(True, 0), (True, 1)]
    assert torch.equal(moved[-1][2], method.student.weight)
    average = load_file(tmp_path / "checkpoint/student.ema.safetensors")
    assert equal(average, torch.load(tmp_path / "model/state.pt")) and not equal(
        average, dict(method.student.state_dict())
    )
    kept = load_file(tmp_path / "checkpoint/other.ema.safetensors")
    assert equal(kept, Toy([]).other.state_dict())


def test_without_an_average_the_model_is_what_was_trained(tmp_path):
    """A decay of 0 keeps none, in memory or on disk."""
    method, _, _ = toy(tmp_path, STUDENT)
    assert not (tmp_path / "checkpoint/student.ema.safetensors").exists()
    assert equal(torch.load(tmp_path / "model/state.pt"), dict(method.student.state_dict()))


def test_a_spike_is_skipped_and_said(tmp_path):
    fresh = Toy([])
    method, steps, _ = toy(tmp_path, STUDENT, skip_above=1e-9)
    assert all(s.skipped and s.metrics["skipped"] == 1.0 and s.metrics["gradient_norm"] > 1e-9 for s in steps)
    assert equal(method.student.state_dict(), fresh.student.state_dict())


def test_floats_are_averaged_over_batches_and_whole_numbers_added_up(tmp_path):
    """Losses are means, counts are sums, whoever accumulates them."""
    _, (step, _), _ = toy(tmp_path, STUDENT, Phase("other", ("other",)), accumulate=3)
    assert step.metrics["calls"] == 9 and step.metrics["loss"] == 2.0


@pytest.mark.parametrize(
    ("plan", "kind", "told"),
    [
        (
            (Phase("student", ("student",), Letters),),
            ConfigError,
            "data is 'world', which gives no Letters; this method needs them: data=world",
        ),
        ((STUDENT, Phase("late", (), Letters)), ConfigError, "which gives no Letters"),
        (
            (Phase("student", ("student",)),),
            ValueError,
            "phase 'student' is an update's first and names no batch to draw",
        ),
        (
            (Phase("judged", ("judge",), Numbers),),
            ValueError,
            "phase 'judged' trains judge, which the method does not; it trains student, other",
        ),
    ],
)
def test_a_phase_that_nobody_can_carry_out_is_refused(tmp_path, plan, kind, told):
    """Before any of its steps is made, and before anything is saved."""
    with pytest.raises(kind, match=told):
        toy(tmp_path, *plan)
    assert not (tmp_path / "checkpoint").exists() and not (tmp_path / "model").exists()


def test_offload_of_a_role_that_is_not_there_is_told(folder, tmp_path):
    config = find("copy_warmup")[0].make(
        "smoke", teacher=str(folder / "teacher"), side=16, out=str(tmp_path), offload="fake", trackers=()
    )
    with pytest.raises(
        ConfigError, match="offload names 'fake', which this method does not have; it has student, heads"
    ):
        next(find("copy_warmup")[1](config))


# --- the run and its record


def test_steps_are_detached_records(tmp_path):
    """A Step has plain numbers and detached pictures, counts from 1, and cannot be changed; logs and config are
    written."""
    _, records, _ = toy(tmp_path, STUDENT, trackers=("tensorboard",))
    assert [(r.index, r.total, r.skipped) for r in records] == [(1, 2, False), (2, 2, False)]
    assert not records[0].pictures["grid"].requires_grad and all(
        type(v) in (float, int) for r in records for v in r.metrics.values()
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        records[0].index = 3
    assert json.loads((tmp_path / "config.json").read_text())["batch"] == 2
    assert list((tmp_path / "vlmedit").glob("events*"))


def test_a_step_is_told_after_its_checkpoint_is_written(tmp_path):
    """Whoever stops at a step that was due finds it saved, and the run does not repeat it."""
    config = toy_config(tmp_path, steps=4, save_every=2)
    for step in train(Toy([STUDENT]), toy_data(config), config):
        state = tmp_path / "checkpoint/state.json"
        assert (json.loads(state.read_text())["step"] if state.exists() else 0) == step.index // 2 * 2
        if step.index == 2:
            break
    assert [s.index for s in train(Toy([STUDENT]), toy_data(config), config)] == [3, 4]


def test_update_randomness_is_of_seed_index_and_process(tmp_path):
    """Inside an update torch's generator starts from (seed, index, process) whatever came before."""
    drawn = []
    for out in ("a", "b"):
        config = toy_config(tmp_path / out, steps=3)
        method = Toy([STUDENT])
        for _ in train(method, toy_data(config), config):
            torch.manual_seed(len(drawn))
        drawn.append([t[2] for t in method.told if len(t) == 4])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3


def test_runs_of_different_precision_follow_each_other_in_one_process(tmp_path):
    """bf16 and full precision take turns: each run's matrix products have its own type, whatever ran before."""
    for precision, dtype in (("bf16", torch.bfloat16), ("no", torch.float32), ("bf16", torch.bfloat16)):
        with make_accelerator(TrainConfig.make("smoke", out=str(tmp_path / precision), precision=precision)).autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_strips_are_drawn_when_they_are_due(folder, tmp_path):
    """Every second update and after the last one, pictures of that update's first batch; otherwise steps carry none; 0
    draws none on disk, and every step carries its pictures."""
    steps = list(train_npedit(tiny_npedit(folder, tmp_path / "some", steps=3, save_every=3, strip_every=2)))
    assert [p.name for p in sorted((tmp_path / "some/strips").iterdir())] == ["000002.png", "000003.png"]
    assert [bool(s.pictures) for s in steps] == [False, True, True]
    steps = list(train_npedit(tiny_npedit(folder, tmp_path / "none", steps=1)))
    assert not (tmp_path / "none/strips").exists() and steps[0].pictures.keys() == {"reference", "output"}
