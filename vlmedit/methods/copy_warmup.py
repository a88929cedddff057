"""Stage 3: the copy warm-up. Flow matching whose target is the reference itself, so that training starts from identity
[arXiv:2510.14978, Sec. 4; npedit zimage_instruct_refcopy.yaml].

Deviates from the released recipe in the miniature: half the texts are instructions, half the reference's caption (`instruction_share`; there:
captions only); and before copying, the text encoder learns to read instructions, words alone (`reading_steps`): every token state must tell
the edit type and the words of each slot. A real backbone's text encoder has read before; the miniature's has seen captions only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from vlmedit.config import WORLD, BackboneConfig
from vlmedit.data.batches import ReadingBatch, UnpairedBatch
from vlmedit.data.world import SLOTS
from vlmedit.errors import ConfigError
from vlmedit.flow import flow_matching_loss, logit_normal_time
from vlmedit.methods._base import drop_text
from vlmedit.methods._build import BackboneMethod, begin_roles, load_student
from vlmedit.networks.codec import PixelCodec
from vlmedit.networks.text import TextEncoder
from vlmedit.protocols import Codec, Phase, Trained
from vlmedit.training.run import Step
from vlmedit.training.trainer import train


@dataclass(frozen=True)
class CopyWarmupConfig(BackboneConfig):
    """Copy warm-up: flow matching with the reference itself as target [R], from the teacher's weights. The first
    `reading_steps` updates teach the text encoder to read instructions, without pictures: real backbones' encoders can."""

    manifest = {"flip": 0.5, "nothing_share": 0.0}  # [R]; it copies anyway

    out: str = "runs/copy_warmup"
    student: str | None = None
    steps: int = 1500
    batch: int = 48
    lr: float = 1.5e-3
    time_shift: float = 3.0  # of logit-normal times: few-step sampling starts at pure noise, so most copies are learnt there [X]; R: 6
    text_dropout: float = 0.1  # share of empty prompts [R]
    instruction_share: float = 0.5  # of the texts; the others are the reference's caption; R: 0
    reading_steps: int = 500  # R: 0
    reading_batch: int = 128

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.reading_steps < self.steps:
            raise ConfigError(f"reading_steps is {self.reading_steps} of steps {self.steps}; leave some steps for copying")
        if self.reading_steps and self.data.place != WORLD:
            raise ConfigError(f"reading_steps is {self.reading_steps}; instructions to read come from data=world: set reading_steps=0")

    @classmethod
    def tiers(cls):
        base = super().tiers()
        return {**base, "smoke": {**base["smoke"], "reading_steps": 1, "reading_batch": 4}}


def reading_heads(width: int) -> nn.Linear:
    """What reads every slot from a token state (B, L, width)."""
    return nn.Linear(width, sum(len(words) + 1 for words in SLOTS.values()))


def reading_loss(encoder: TextEncoder, heads: nn.Linear, ids: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every slot from every token state; labels (B, slots)."""
    states = encoder(ids)  # (B, L, d)
    parts = heads(states).float().split([len(words) + 1 for words in SLOTS.values()], -1)
    wanted = labels[:, None].expand(-1, states.shape[1], -1)
    return torch.stack([F.cross_entropy(p.flatten(0, 1), wanted[..., i].flatten()) for i, p in enumerate(parts)]).mean()


class CopyWarmup(BackboneMethod):
    """Reading, then copying. `heads` are there when there is something to read; `blank` is the empty prompt's number."""

    def __init__(self, config: CopyWarmupConfig, student: nn.Module, codec: Codec | None = None, heads: nn.Linear | None = None, blank: int = 0):
        trained = {"student": Trained(student, ema=config.ema)}
        super().__init__(trained | ({"heads": Trained(heads)} if heads is not None else {}))
        self.config, self.student, self.heads, self.blank = config, student, heads, blank
        self.codec = codec or PixelCodec()

    def phases(self, index: int) -> Iterator[Phase]:
        if index < self.config.reading_steps:
            yield Phase("reading", ("student", "heads"), ReadingBatch, size=self.config.reading_batch)
        else:
            yield Phase("student", ("student",), UnpairedBatch)

    def backward(self, phase: Phase, batch: ReadingBatch | UnpairedBatch, memory: dict, index: int) -> dict[str, float | int]:
        if phase.name == "reading":
            loss = reading_loss(self.student.text, self.heads, batch.instruction, batch.labels)
            loss.backward()
            return {"reading_loss": loss.item()}
        loss = self.copy_loss(batch)
        loss.backward()
        return {"loss": loss.item()}

    def copy_loss(self, batch: UnpairedBatch) -> Tensor:
        """Flow matching of the reference's latents, given the reference: a scalar."""
        c, device = self.config, batch.reference.device
        with torch.no_grad():
            clean = self.codec.encode(batch.reference)
        as_instruction = torch.rand(len(clean), 1, device=device) < c.instruction_share
        ids = drop_text(torch.where(as_instruction, batch.instruction, batch.reference_caption), c.text_dropout, self.blank)
        t = logit_normal_time(len(clean), c.time_shift, device)
        eps = torch.randn_like(clean)
        text = self.student.encode_text(ids)
        return flow_matching_loss(lambda x, time: self.student(x, time, text, clean), clean, t, eps).mean()


def train_copy_warmup(config: CopyWarmupConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per update; the averaged student is saved to `out/model` at the end."""
    config, accelerator = begin_roles(config, accelerator)
    torch.manual_seed(config.seed)  # of the heads' initial weights
    loaded = load_student(config, accelerator)
    heads = reading_heads(loaded.student.config.width).to(accelerator.device) if config.reading_steps else None
    method = CopyWarmup(config, loaded.student, loaded.codec, heads, loaded.blank)
    yield from train(method, loaded.data, config, accelerator)
