"""What the unpaired rivals without a VLM share."""

from __future__ import annotations

from dataclasses import dataclass

from vlmedit.config import TrainConfig


@dataclass(frozen=True)
class CycleConfig(TrainConfig):
    """What the unpaired rivals without a VLM share: requests with their inverse, and a cycle back to the reference."""

    world = {"side": 32, "fulfilled_share": 0.2, "request_limit": None}  # as NPEditConfig's: the same requests

    teacher: str = "runs/teacher/model"
    student: str = "runs/copy_warmup/model"
    steps: int = 2000
    batch: int = 32
    lr: float = 1.0e-3
    betas: tuple[float, float] = (0.5, 0.98)
    weight_decay: float = 0.0
    warmup: int = 20
    final_lr: float = 0.1
    ema: float = 0.99
    cycle_weight: float = 1.0  # CycleGAN-Turbo: 1
    nothing_weight: float = 1.0  # CycleGAN-Turbo's identity term, 1: of the distance to the reference where nothing is to be done

    @classmethod
    def tiers(cls):
        return {**super().tiers(), "gpu": dict(side=64, batch=128)}
