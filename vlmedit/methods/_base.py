"""What methods share: the parts of the protocol that most of them answer alike, and what several of them do to texts and models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmedit.networks.dit import DiT
from vlmedit.protocols import Phase, Trained


class Base:
    """A method whose result is its "student", in one phase on fresh batches of `batch`."""

    result = "student"
    batch: type | None = None
    resident: dict[str, tuple[str, ...]] = {}

    def __init__(self, trained: dict[str, Trained], frozen: dict[str, nn.Module] | None = None, kept: dict[str, nn.Module] | None = None):
        self.trained, self.frozen, self.kept = trained, frozen or {}, kept or {}
        self.part: Callable[[str], AbstractContextManager] = lambda name: nullcontext()
        for module in self.frozen.values():
            module.requires_grad_(False).eval()

    def phases(self, index: int) -> Iterator[Phase]:
        yield Phase(self.result, (self.result,), self.batch)

    def after(self, index: int) -> None:
        pass

    def pictures(self, batch: Any, memory: dict) -> dict[str, Tensor]:
        return {}

    def save(self, state: dict[str, Tensor], folder: Path) -> None:
        module = self.trained[self.result].module
        module.load_state_dict(state)
        module.save_pretrained(folder)


def drop_text(ids: Tensor, share: float, empty: int = 0) -> Tensor:
    """Empty a share of the texts (B, L), for guidance: all padding, or the number of the empty prompt."""
    keep = torch.rand(len(ids), 1, device=ids.device) >= share
    return ids.where(keep, empty)


def load_dit(folder: str, device: torch.device) -> DiT:
    return DiT.from_pretrained(folder).to(device)
