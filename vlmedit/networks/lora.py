"""Student, fake score and teacher: three modules, or one base with two LoRA adapters and none for the teacher [arXiv:2106.09685].

**The adapter-switch trap.** peft keeps one adapter active per model and freezes the others. An update calls the student with a graph,
then teacher and fake score without one, then sends a gradient back through the student: if another role is active by then, the student's
gradients are silently zero, and recomputed blocks (gradient checkpointing) are another role's. Here each call switches to its own role,
nothing ever freezes, and a hook on each output switches back before the backward pass of that call begins: the order of calls is free.

Teacher and fake score see no reference, so a base widened for references draws what it drew before.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmedit.extras import need
from vlmedit.networks.backbones import family_of
from vlmedit.protocols import Backbone, Prompts

ADAPTERS = ("student", "fake")
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Roles:
    """What `vlmedit.methods.npedit.NPEdit` takes besides a judge and a codec."""

    student: nn.Module
    fake: nn.Module
    teacher: nn.Module


def transformer_of(backbone: Backbone) -> ModelMixin:
    """The network that is saved and sharded: what an adapter wraps, or the backbone itself."""
    return backbone if isinstance(backbone, ModelMixin) else backbone.transformer


def module_roles(student: Backbone, teacher: Backbone | None = None) -> Roles:
    """Three modules: the fake score starts as a copy of the teacher, which is the student's start unless given."""

    def twin(backbone: Backbone) -> Backbone:
        network = copy.deepcopy(transformer_of(backbone))
        return network if isinstance(backbone, ModelMixin) else type(backbone)(network, backbone.prompts)

    teacher = twin(student) if teacher is None else teacher
    roles = Roles(student, twin(teacher), teacher)
    for role in (roles.fake, roles.teacher):
        transformer_of(role).gradient_checkpointing = transformer_of(student).gradient_checkpointing
        for mode in getattr(student, "modes", ()):
            setattr(role, mode, getattr(student, mode))
    roles.teacher.requires_grad_(False)
    return roles


def lora_targets(transformer: ModelMixin) -> list[str]:
    """Every linear layer of the repeated blocks; for a family that takes its reference as channels, the patch embedding too."""
    repeated = set(transformer._no_split_modules or ())
    blocks = [(name, m) for name, m in transformer.named_modules() if type(m).__name__ in repeated]
    names = [f"{block}.{name}" for block, module in blocks for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    family = family_of(type(transformer).__name__)
    return [*names, family.adapter.entry] if family.widened else names


class SharedBase:
    """One transformer with an adapter per trained role. `switch` chooses who it is."""

    def __init__(self, backbone: Backbone, rank: int = 16, alpha: float | None = None):
        if rank < 1:
            raise ValueError(f"rank is {rank}; a LoRA adapter needs at least 1, three modules need `module_roles`")
        self.backbone, self.transformer = backbone, transformer_of(backbone)
        self.transformer.requires_grad_(False)
        need("peft")
        from peft import LoraConfig  # an extra: a plain install edits without it
        from peft.tuners.tuners_utils import BaseTunerLayer

        config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=lora_targets(self.transformer))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are meant
            for name in ADAPTERS:
                self.transformer.add_adapter(config, adapter_name=name)
        self.layers = [m for m in self.transformer.modules() if isinstance(m, BaseTunerLayer)]
        self.collect()
        self.switch("student")

    def collect(self) -> None:
        """Find each adapter's weights; again after sharding, which puts others in their place."""
        self.weights = {role: [(n, p) for n, p in self.transformer.named_parameters() if f".{role}." in n] for role in ADAPTERS}

    def switch(self, role: str) -> None:
        """Make the transformer that role; every adapter stays trainable."""
        for layer in self.layers:
            if role == "teacher":
                layer.enable_adapters(False)
            else:
                layer.set_adapter(role)
                layer._disable_adapters = False
        for weights in self.weights.values():
            for _, p in weights:
                p.requires_grad_(True)


class AdapterRole(nn.Module):
    """One role of a `SharedBase`: its parameters are its adapter's alone, the teacher has none."""

    def __init__(self, shared: SharedBase, role: str):
        super().__init__()
        self.role = role
        self._shared = (shared,)  # in a tuple, so that the base is not registered once per role

    @property
    def shared(self) -> SharedBase:
        return self._shared[0]

    @property
    def config(self):
        return self.shared.backbone.config

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ((f"{prefix}.{n}" if prefix else n, p) for n, p in self.shared.weights.get(self.role, ()))

    def requires_grad_(self, requires_grad: bool = True) -> AdapterRole:
        """The teacher has nothing to freeze; a trained role stays trainable as long as it exists."""
        if not requires_grad and self.role != "teacher":
            raise ValueError(f"the {self.role} is one adapter of a shared base and cannot be frozen by itself; leave its parameters out of the optimizer")
        return self

    def state_dict(self, *_, **__) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True):
        own = dict(self.named_parameters())
        if strict and own.keys() != state.keys():
            raise KeyError(f"adapter weights of another model: {sorted(own.keys() ^ state.keys())[:3]}")
        for name, p in own.items():
            p.copy_(state[name])

    @property
    def prompts(self) -> Prompts:
        return self.shared.backbone.prompts

    def call(self, method: Callable, *args) -> Any:
        """A call of the base under this role's adapter, whoever is active before or after."""
        self.shared.switch(self.role)
        return self.back(method(*args))

    def back(self, out: Any) -> Any:
        """Make the base this role again before any gradient of what it gave comes back: it may be somebody else by then."""
        if isinstance(out, Tensor):
            if out.requires_grad:
                out.register_hook(lambda _: self.shared.switch(self.role))
        elif isinstance(out, list | tuple):  # keys and values
            for part in out:
                self.back(part)
        return out

    def encode_text(self, ids: Tensor) -> Any:
        return self.call(self.shared.backbone.encode_text, ids)

    def hold_reference(self, reference: Tensor, text: Any) -> Any:
        return self.call(self.shared.backbone.hold_reference, reference, text)

    def velocity(self, x: Tensor, t: Tensor, text: Any, reference: Any = None) -> Tensor:
        """The base's `velocity` under this role's adapter."""
        return self.call(self.shared.backbone, x, t, text, reference)

    forward = velocity

    def save(self, folder: str | Path) -> None:
        """The adapter in diffusers' own file, pytorch_lora_weights.safetensors, for `load_lora_adapter`."""
        self.shared.transformer.save_lora_adapter(str(folder), adapter_name=self.role)


def save_adapter(student: AdapterRole, state: dict[str, Tensor], folder: Path) -> None:
    """`pytorch_lora_weights.safetensors` with the adapter's configuration in its metadata, for `load_lora_adapter`."""
    transformer = student.shared.transformer
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(transformer, state_dict=state, adapter_name=student.role)
    config = transformer.peft_config[student.role].to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True)}
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / LORA_FILE, metadata)


def adapter_roles(backbone: Backbone, rank: int = 16, alpha: float | None = None) -> Roles:
    """One base and two adapters; both start as the base itself."""
    shared = SharedBase(backbone, rank, alpha)
    return Roles(*(AdapterRole(shared, role) for role in ("student", "fake", "teacher")))


ROLES: dict[str, Callable[..., Roles]] = {"modules": module_roles, "adapters": adapter_roles}
