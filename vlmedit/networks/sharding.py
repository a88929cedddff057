"""Many processes: FSDP2 for every role.

Each block is sharded by itself (`fully_shard`), then a backbone as a whole. A judge's outer module is never called, only its parts are, so
of a judge the blocks alone are sharded; embeddings and output layer stay whole, because the margin reads two rows of it. The autoencoder
stays whole. A process averages nothing itself: FSDP2 hands it averaged gradients.

accelerate's own `prepare` is not used: it takes one model and its optimizer, calls it through its root, and on a CPU knows no FSDP at all
(`Accelerator` sets distributed_type to MULTI_CPU and drops the plugin). Its configuration files are: they start the processes, name the
precision, and turn FSDP2 on, reshard after forward or not, and offload.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

OUTSIDE = ("encode_text", "hold_reference")  # of a backbone that needs no adapter: called by themselves and not through its root


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
        for method in OUTSIDE:
            if hasattr(model, method):
                register_fsdp_forward_method(model, method)
    return model if root else to_device(model, accelerator.device)


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
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
