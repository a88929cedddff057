"""Many processes: FSDP2 for every role, and checkpoints that do not depend on how many processes wrote them.

Each block is sharded by itself (`fully_shard`), then a backbone as a whole. A judge's outer module is never called, only its parts are, so
of a judge the blocks alone are sharded; embeddings and output layer stay whole, because the margin reads two rows of it. The autoencoder
stays whole. A process averages nothing itself: FSDP2 hands it averaged gradients.

`Whole` shows a sharded module, average or optimizer as if it were whole: its state is gathered weight by weight into the main process's
memory, and given back to every process's shard.

accelerate's own `prepare` is not used: it takes one model and its optimizer, calls it through its root, and on a CPU knows no FSDP at all
(`Accelerator` sets distributed_type to MULTI_CPU and drops the plugin). Its configuration files are: they start the processes, name the
precision, and turn FSDP2 on, reshard after forward or not, and offload.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
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


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a diffusers or transformers model."""
    names = set(model._no_split_modules or ())
    for part in model.modules():
        names |= set(getattr(part, "_no_split_modules", None) or ())
    found = [m for m in model.modules() if type(m).__name__ in names and any(True for _ in m.parameters())]
    inner = {id(child) for m in found for child in m.modules() if child is not m}
    return [m for m in found if id(m) not in inner]


def is_sharded(model: nn.Module) -> bool:
    """Whether processes share its weights. Then each call of a block gathers them, and every process must make the same calls, whatever its
    batch holds: where one makes fewer, the others wait for it or are given another block's weights."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def shard(model: nn.Module, accelerator: Accelerator, precision: str, root: bool = True) -> nn.Module:
    """Shard a model in place over all processes. `root`: also what lies outside its blocks; only for a model that is called as a whole."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    half = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if precision == "bf16" else {}
    settings = dict(
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(**half, cast_forward_inputs=False),  # autocast chooses; times stay exact
        offload_policy=CPUOffloadPolicy() if plugin is not None and isinstance(plugin.cpu_offload, CPUOffloadPolicy) else OffloadPolicy(),
    )
    again = True if plugin is None else bool(plugin.reshard_after_forward)
    for block in blocks(model):
        fully_shard(block, reshard_after_forward=again, **settings)
    if root:
        fully_shard(model, **settings)
    return model if root else settle(model, accelerator.device)


def settle(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device, in place, all but its shards: `fully_shard` made them where they are to be, and those that CPUOffloadPolicy
    keeps on the CPU must be found there."""
    if not is_sharded(model):
        return model.to(device)
    moved: dict[nn.Parameter, nn.Parameter] = {}  # a weight with two names stays one
    for part in model.modules():
        for name, p in part._parameters.items():
            if p is not None and not isinstance(p, DTensor):
                part._parameters[name] = moved.setdefault(p, p if p.device == device else nn.Parameter(p.detach().to(device), p.requires_grad))
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer if buffer is None else buffer.to(device)
    return model


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


class Whole:
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
