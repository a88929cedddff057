"""What steps: Muon for matrices with AdamW for the rest, or AdamW for everything; averaged weights; gradients over processes."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlmedit.config import TrainConfig
from vlmedit.errors import ConfigError


def adamw(name: str) -> Any:
    """The optimizer's class. Raises ConfigError where bitsandbytes is not installed."""
    if name in ("adamw", "muon"):
        return torch.optim.AdamW
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"optimizer is {name!r}, which needs bitsandbytes, and that is not installed (pip install bitsandbytes); or use optimizer=adamw")
    import bitsandbytes

    return {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}[name]


def is_matrix(name: str, p: nn.Parameter) -> bool:
    """Whether Muon takes it: a weight of a linear layer, no embedding, not too thin."""
    return p.ndim == 2 and ".weight" in name and "embed" not in name and min(p.shape) >= 16


class Optimizer:
    """The steps of one module, one learning rate for all its parts. "muon": Muon for the matrices of the blocks, AdamW for everything else [X,
    papers/log.md]; otherwise AdamW for everything. Roles that share a base answer `named_parameters` with their own weights alone."""

    def __init__(self, module: nn.Module, config: TrainConfig, lr: float | None = None):
        self.module, self.config, self.lr = module, config, lr or config.lr
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        if config.optimizer != "muon":
            params = [p for _, p in named]
            kind = adamw(config.optimizer)
            self.parts = [kind(params, lr=self.lr, betas=config.betas, weight_decay=config.weight_decay)]
            return
        matrices, others = [], []
        for name, p in named:
            (matrices if is_matrix(name, p) else others).append(p)
        self.parts = [torch.optim.AdamW(others, self.lr, config.betas, weight_decay=0.0)]
        if matrices:
            muon = torch.optim.Muon(matrices, self.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
            self.parts.append(muon)

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to `final_lr` of the peak."""
        c = self.config
        if step < c.warmup:
            return self.lr * (step + 1) / c.warmup
        progress = min(1.0, (step - c.warmup) / max(1, c.steps - c.warmup))
        return self.lr * (c.final_lr + (1 - c.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))

    def gather(self, accelerator: Accelerator) -> float:
        """Average the gradients over the update's batches and processes and clip them. Returns their norm before."""
        params = [p for p in self.module.parameters() if p.grad is not None]
        if self.config.accumulate > 1:
            torch._foreach_mul_([p.grad for p in params], 1 / self.config.accumulate)
        if not any(isinstance(p, DTensor) for p in params):  # shards come averaged
            average_gradients(params, accelerator)
        norm = nn.utils.clip_grad_norm_(params, self.config.clip)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def step(self, index: int, accelerator: Accelerator) -> tuple[float, bool]:
        """Average gradients, clip, and update unless the norm is not finite or spikes. Returns the norm before clipping and whether
        the update was made. Clears the gradients."""
        norm = self.gather(accelerator)
        fine = math.isfinite(norm) and norm < self.config.skip_above
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.rate(index)
            if fine:
                part.step()
            part.zero_grad(set_to_none=True)
        return norm, fine

    def state_dict(self) -> list:
        return [p.state_dict() for p in self.parts]

    def load_state_dict(self, states: list) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def average_gradients(params: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Mean of the gradients over all processes, in one flat message. Works for any number of forward calls
    per update, which wrapping the model would not."""
    params = list(params)
    if accelerator.num_processes == 1 or not params:
        return
    flat = accelerator.reduce(torch.cat([p.grad.flatten() for p in params]), "mean")
    for p, g in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad.copy_(g.view_as(p))


class EMA:
    """Exponential moving average of a model's weights, warmed up so that early steps do not dominate."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            self.shadow[name].lerp_(value, 1 - decay) if value.is_floating_point() else self.shadow[name].copy_(value)

    def load(self, shadow: dict[str, Tensor]) -> None:
        """Take over saved averages, on the device of the present ones."""
        for name, value in self.shadow.items():
            value.copy_(shadow[name])
