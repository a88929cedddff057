"""What processes share, as if it were whole: checkpoints that do not depend on how many processes wrote them.

`Gathered` shows a sharded module, average or optimizer as if it were whole: its state is gathered weight by weight into the main process's
memory, and given back to every process's shard.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vlmedit.errors import ConfigError


def wanted(config, accelerator: Accelerator) -> bool:
    """Whether this run shards. Raises ConfigError for FSDP1 and for settings that cannot be sharded."""
    told = accelerator.distributed_type == DistributedType.FSDP
    if told and getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise ConfigError("accelerate is configured for FSDP1; set fsdp_version: 2 in its config file, or use one of vlmedit/configs/accelerate")
    on = config.sharding == "fsdp2" or (config.sharding == "auto" and told)
    if on and accelerator.num_processes == 1:
        return False  # nothing to share
    if on and config.offload:
        raise ConfigError(f"offload is {', '.join(config.offload)} and weights are sharded; use accelerate's fsdp_offload_params instead")
    if on and config.optimizer != "adamw":
        raise ConfigError(f"optimizer is {config.optimizer!r} and weights are sharded; Muon takes whole matrices and bitsandbytes' states cannot be sharded, use adamw")
    return on


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
        return self.gathered(self.thing.state_dict())

    def gathered(self, x):
        """Dictionaries, lists and tensors, every tensor whole."""
        if isinstance(x, dict):
            return {k: self.gathered(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [self.gathered(v) for v in x]
        return whole(x, self.keep) if isinstance(x, Tensor) else x

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
