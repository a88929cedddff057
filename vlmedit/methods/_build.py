"""From the places of a configuration to roles, judges, codec and data: the world's, or those of a manifest.

The two ways differ in three things alone: which data, which backbone, which judge. All are behind vlmedit/protocols.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from vlmedit.config import WORLD, BackboneConfig
from vlmedit.data.world import WorldData
from vlmedit.errors import ConfigError
from vlmedit.methods._base import Base, load_dit
from vlmedit.networks.codec import PixelCodec
from vlmedit.networks.judge import JudgeModel
from vlmedit.protocols import Codec, Data, Judge
from vlmedit.training.run import begin


@dataclass(frozen=True)
class Loaded:
    """What a method is built from. `blank` is the empty prompt's number."""

    data: Data
    codec: Codec
    student: nn.Module
    fake: nn.Module | None = None
    teacher: nn.Module | None = None
    judges: tuple[Judge, ...] = ()
    blank: int = 0


class BackboneMethod(Base):
    """A method whose result is a backbone."""


def begin_roles(config: BackboneConfig, accelerator: Accelerator | None = None) -> tuple[BackboneConfig, Accelerator]:
    return config, begin(config, accelerator)


def load_judge_model(place: str, device) -> JudgeModel:
    """A judge of the world. Raises ConfigError where there is none."""
    if not (Path(place) / "config.json").is_file():
        raise ConfigError(f"judge is {place!r}, no folder with a judge; train one (vlmedit train judge) or leave it out")
    return JudgeModel.from_pretrained(place).to(device)


def load_student(config: BackboneConfig, accelerator: Accelerator) -> Loaded:
    assert config.data.place == WORLD
    return Loaded(WorldData(config), PixelCodec(), load_dit(config.student or config.teacher, accelerator.device))


def load_roles(config, accelerator: Accelerator) -> Loaded:
    assert config.data.place == WORLD
    load = lambda place: load_dit(place, accelerator.device)
    judges = tuple(load_judge_model(place, accelerator.device) for place in config.judge)
    return Loaded(WorldData(config), PixelCodec(), load(config.student or config.teacher), load(config.teacher), load(config.teacher), judges)
