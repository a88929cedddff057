"""Modules, averages and optimizers that may be sharded, as checkpoints take them: whole. A state is gathered weight by weight into the main
process's memory, and given back to every process's shard."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(x: Tensor, keep: bool = True) -> Tensor | None:
    """A tensor on the CPU, gathered if it is sharded; every process must call it. None where it is not kept."""
    full = x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()
    return full.cpu() if keep else None


def like(x: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, sharded as `model` is."""
    return distribute_tensor(x.to(model.device), model.device_mesh, model.placements) if isinstance(model, DTensor) else x


@torch.no_grad()
def fill(own: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Copy a whole state into weights that may be sharded. Raises KeyError for another model's."""
    if own.keys() != state.keys():
        raise KeyError(f"weights of another model: {sorted(own.keys() ^ state.keys())[:3]}")
    for name, value in own.items():
        value.copy_(like(state[name], value))


class Gathered:
    """A module, an `EMA` or an `Optimizer` as checkpoints take it. `keep`: whether this process holds what it gathers."""

    def __init__(self, thing, keep: bool):
        self.thing, self.keep = thing, keep

    @property
    def shadow(self) -> dict[str, Tensor]:
        return {k: whole(v, self.keep) for k, v in self.thing.shadow.items()}

    def load(self, shadow: dict[str, Tensor]) -> None:
        fill(self.thing.shadow, shadow)

    def state_dict(self):
        if isinstance(self.thing, nn.Module):
            return {k: whole(v, self.keep) for k, v in self.thing.state_dict().items()}
        walk = lambda x: {k: walk(v) for k, v in x.items()} if isinstance(x, dict) else [walk(v) for v in x] if isinstance(x, list | tuple) else whole(x, self.keep) if isinstance(x, Tensor) else x
        return walk(self.thing.state_dict())

    def load_state_dict(self, state) -> None:
        if isinstance(self.thing, nn.Module):
            return fill(self.thing.state_dict(), state)
        if not hasattr(self.thing, "parts"):
            return self.thing.load_state_dict(state)
        for part, saved in zip(self.thing.parts, state, strict=True):
            params = [p for group in part.param_groups for p in group["params"]]
            for number, values in saved["state"].items():
                p = params[number]
                saved["state"][number] = {k: like(v, p) if isinstance(v, Tensor) and v.shape == p.shape else v for k, v in values.items()}
        self.thing.load_state_dict(state)
