"""Roles whose weights wait on the CPU while others work."""

from __future__ import annotations

import torch
from torch import nn


class Offloaded:
    """A module whose weights stay on the CPU until they are called for. Frozen weights are never copied back, trained ones are."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.module, self.device, self.homes = module, device, {}
        for m in module.modules():
            for name, buffer in m._buffers.items():  # small, and asked where the module is
                m._buffers[name] = buffer if buffer is None else buffer.to(device)

    def enter(self) -> None:
        if self.homes:
            return
        for p in self.module.parameters():
            self.homes[p] = p.data
            p.data = p.data.to(self.device, non_blocking=True, copy=True)
            if p.grad is not None:
                p.grad = p.grad.to(self.device)

    def leave(self) -> None:
        for p, home in self.homes.items():
            p.data = home.copy_(p.data) if p.requires_grad else home
            if p.grad is not None:
                p.grad = p.grad.to(home.device)
        self.homes = {}
