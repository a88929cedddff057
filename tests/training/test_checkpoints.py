"""Checkpoints: killed anywhere, the disk holds a whole one; damaged or of another configuration, it is refused in one
line."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from vlmedit.config import TrainConfig
from vlmedit.errors import ConfigError
from vlmedit.methods.teacher import TeacherConfig, train_teacher
from vlmedit.training import checkpoints as module
from vlmedit.training.checkpoints import Checkpoints
from vlmedit.training.optimizer import EMA, Optimizer
from vlmedit.training.run import begin, make_accelerator


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


OPERATIONS = (
    (module, "save_file"),
    (torch, "save"),
    (os, "replace"),
    (os, "fsync"),
    (shutil, "rmtree"),
    (Path, "mkdir"),
    (Path, "write_text"),
)


@pytest.mark.parametrize("after", (False, True))
def test_killed_at_any_instant_of_a_save(tmp_path, monkeypatch, after):
    """The second save is killed before (or right after) each of its file operations in turn: what is found then is the
    whole first or the whole second checkpoint, never a mixture, and it is the second once the last rename was made."""
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

                def counted(*args, _do=getattr(home, name), _last=instant + 1, **kwargs):
                    nonlocal count
                    count += 1
                    if count == _last and not after:
                        raise Killed
                    result = _do(*args, **kwargs)
                    if count == _last:
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
    """No file may reach its size (as on a full disk, here met by the first or by the largest file): an OSError names
    the checkpoint and the remedy, no partial folder stays, and the previous checkpoint is whole."""
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
    assert (
        str(tmp_path / "checkpoint") in text
        and f"{key}: " in text
        and f"{now} now" in text
        and "choose another out folder or delete it" in text
    )
    assert all((v == 7).all() for v in model.state_dict().values())


def test_folder_and_cadence_may_differ(tmp_path):
    """A run may be moved and saved at another cadence."""
    small(tmp_path / "a")[0].save(2)
    (tmp_path / "a").rename(tmp_path / "b")
    assert small(tmp_path / "b", save_every=7)[0].resume() == 2


# --- damaged, or of another time


FILES = ("model.safetensors", "model.ema.safetensors", "optimizers.pt", "state.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ("cut", "scrambled", "empty"))
def test_a_damaged_checkpoint_is_refused(tmp_path, file, how):
    """A file that is cut in half, of other bytes, or empty: one error names it and the remedy."""
    checkpoints, _ = small(tmp_path)
    checkpoints.save(1)
    path = tmp_path / "checkpoint" / file
    content = path.read_bytes()
    path.write_bytes(
        {"cut": content[: len(content) // 2], "scrambled": bytes(255 - b for b in content), "empty": b""}[how]
    )
    told = f"{file} cannot be read .*delete the folder {path.parent} to begin anew, or choose another out folder"
    with pytest.raises(ConfigError, match=told):
        small(tmp_path)[0].resume()


def test_a_checkpoint_that_lacks_a_role_is_refused(tmp_path):
    """As one has it that was made for other roles; nobody trains on with fresh weights in its place."""
    small(tmp_path)[0].save(1)
    (tmp_path / "checkpoint" / "model.safetensors").rename(tmp_path / "checkpoint" / "critic.safetensors")
    with pytest.raises(ConfigError, match="model.safetensors cannot be read"):
        small(tmp_path)[0].resume()


def test_a_run_of_an_earlier_version_is_refused_by_its_names(tmp_path):
    """One line: the folder, which settings are called otherwise now, and the remedy; nothing is loaded, and `begin`
    asks before models are."""
    checkpoints, model = small(tmp_path)
    checkpoints.save(1)
    file = tmp_path / "checkpoint" / "state.json"
    state = json.loads(file.read_text())
    config = state["config"]
    file.write_text(
        json.dumps(
            {
                **state,
                "config": {**{k: v for k, v in config.items() if k != "skip_above"}, "spike": 300.0, "settled": 0.2},
            }
        )
    )
    fill(model, 7.0)
    names = "settled is fulfilled_share now, spike is skip_above now"
    told = (
        f"^{tmp_path / 'checkpoint'} is of an unfinished run of an earlier version \\({names}\\); "
        "begin it anew in another out folder, or delete it$"
    )
    with pytest.raises(ConfigError, match=told):
        checkpoints.resume()
    with pytest.raises(ConfigError, match=told):
        begin(TrainConfig.make("smoke", out=str(tmp_path), precision="no"))
    assert all((v == 7).all() for v in model.state_dict().values())


def test_another_configuration_is_told_before_anything_is_loaded(tmp_path):
    """A teacher that would have to load weights from nowhere hears of the checkpoint first."""
    config = TeacherConfig.make("smoke", out=str(tmp_path), side=8, batch=2, precision="no", trackers=())
    next(train_teacher(config))
    with pytest.raises(ConfigError, match="belongs to another configuration .start: None there, nowhere now."):
        next(train_teacher(config.replace(start="nowhere")))


class Place:
    """Data with a position."""

    def __init__(self, at: int = 0):
        self.at = at

    def state_dict(self) -> dict:
        return {"at": self.at}

    def load_state_dict(self, state: dict) -> None:
        self.at = state["at"]


def test_modules_without_optimizer_and_positions_in_data_are_kept(tmp_path):
    """A pool or a follower has weights alone, data have a position; both come back, each in the file of its name."""
    checkpoints, _ = small(tmp_path)
    follower = nn.Linear(3, 3)
    checkpoints.register("follower", follower)
    checkpoints.optimizers["data"] = Place(41)
    fill(follower, 5.0)
    checkpoints.save(1)
    assert {p.name for p in (tmp_path / "checkpoint").iterdir()} == {
        "model.safetensors",
        "model.ema.safetensors",
        "follower.safetensors",
        "optimizers.pt",
        "state.json",
    }
    again, _ = small(tmp_path)
    other, place = nn.Linear(3, 3), Place()
    again.register("follower", other)
    again.optimizers["data"] = place
    assert again.resume() == 1 and place.at == 41 and all((p == 5).all() for p in other.parameters())
