"""What a run with these settings would hold and compute, per role, before anything is loaded: `vlmedit train npedit --config F --dry-run`.
The copy warm-up (`CopyConfig`) is counted as it runs: the student and the autoencoder alone. The encoded prompts' place on disk is counted too.

Every model is called once with shapes alone (`vlmedit.cost.calls`). Memory follows the trainer's own rules: trained weights, gradients and
moments in fp32 (moments in 8 bits with bitsandbytes), frozen weights in `precision`, activations by what is recomputed. Not counted: the block
under recomputation, kernels' workspaces, fragmentation, and the text encoder, which is gone before training. Units: bytes; FLOPs, a
multiply-add is 2.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from vlmedit.cost import counting
from vlmedit.cost.calls import (
    WORDS,
    backbone_call,
    decoder_call,
    encoder_flops,
    judge_calls,
    meta_codec,
    meta_judge,
    meta_transformer,
)
from vlmedit.cost.counting import Call
from vlmedit.data.manifest import read_manifest, texts_of
from vlmedit.errors import InputError
from vlmedit.networks.backbones import family_of
from vlmedit.networks.codec import AutoencoderCodec, PixelCodec
from vlmedit.networks.load import frozen_dtype
from vlmedit.networks.lora import lora_targets
from vlmedit.networks.prompts import PromptTable
from vlmedit.networks.sharding import blocks
from vlmedit.training.real_models import PRESENT, prepared
from vlmedit.training.settings import CopyConfig, RealConfig

MOMENTS = {"adamw": 8, "muon": 4, "adamw8bit": 2, "paged_adamw8bit": 2}  # bytes per parameter; of Muon, of matrices, which are nearly all


@dataclass
class RoleBudget:
    """One role's share of an update, on one process before sharding."""

    role: str
    parameters: int
    weights: int = 0
    gradients: int = 0
    moments: int = 0
    average: int = 0
    activations: int = 0
    flops: float = 0.0
    whole: int = 0  # of the weights: what every process holds for itself, sharded or not
    notes: list[str] = field(default_factory=list)

    @property
    def standing(self) -> int:
        return self.weights + self.gradients + self.moments + self.average


@dataclass(frozen=True)
class Prompts:
    """The cache of encoded prompts on disk."""

    count: int
    tokens: int  # of each
    bytes: int
    assumed: bool  # `tokens` is, where prompts keep their own lengths


def prompts_of(config: RealConfig, transformer: nn.Module) -> Prompts | None:
    """How many prompts the manifest asks for and what their states take; None where it cannot be read."""
    adapter = family_of(type(transformer).__name__).adapter
    if adapter is None:
        return Prompts(0, 0, 0, False)  # a batch carries the words themselves
    try:
        table = PromptTable(config.negative_prompt, texts_of(read_manifest(config.data)))
    except InputError:
        return None
    if isinstance(config, CopyConfig):
        table.number("")
    count, tokens = len(table.texts), min(WORDS, config.text_length) if adapter.masked else config.text_length
    numbers = tokens * adapter.text_width(transformer.config) + (adapter.pooled_width(transformer.config) or 0)
    return Prompts(count, tokens, count * numbers * frozen_dtype(config).itemsize, adapter.masked)


@dataclass
class Plan:
    """Budgets of all roles, and what follows from them."""

    config: RealConfig
    processes: int
    sharded: bool
    roles: list[RoleBudget]
    prompts: Prompts | None = None  # none where the manifest cannot be read

    @property
    def parts(self) -> tuple[str, ...]:
        """What an update consists of."""
        return ("student",) if isinstance(self.config, CopyConfig) else ("student", "teacher", "judge", "fake")

    def memory(self, part: str) -> float:
        """Bytes on one device while a part of the update runs: who is there, and every graph that waits. Sharded, processes share
        all but what is whole on every device: the autoencoder, and of a judge what lies outside its blocks [sharding.py]."""
        c, total = self.config, 0.0
        for r in self.roles:
            waiting = r.role in c.offload and r.role not in PRESENT[part] and len(self.parts) > 1
            standing = r.standing - r.weights if waiting else r.standing
            whole = min(r.whole, standing) if self.sharded else standing
            total += whole + (standing - whole) / self.processes
        held = {"student": ("student",), "rollout": (), "teacher": ("student",), "judge": ("student", "judge", "autoencoder"), "fake": ("fake",)}[part]
        return total + sum(r.activations for r in self.roles if r.role in held)

    @property
    def peak(self) -> float:
        return max(map(self.memory, self.parts))

    def table(self) -> list[dict]:
        names = ("parameters", "weights", "gradients", "moments", "average", "activations", "flops")
        return [{"role": r.role, **{n: getattr(r, n) for n in names}, "notes": "; ".join(r.notes)} for r in self.roles]

    def report(self) -> dict:
        parts = {part: self.memory(part) for part in self.parts}
        prompts = dataclasses.asdict(self.prompts) if self.prompts else None
        return {
            "roles": self.table(), "memory_by_part": parts, "peak_bytes": self.peak, "flops_per_update": sum(r.flops for r in self.roles),
            "processes": self.processes, "sharded": self.sharded, "pictures_per_update": self.config.batch * self.config.accumulate * self.processes,
            "prompts": prompts,
        }  # fmt: skip


def plan(config: RealConfig, processes: int | None = None, sharded: bool | None = None) -> Plan:
    """Count a run. `processes` and `sharded` default to what the launcher and the settings say. Nothing is left on the disk."""
    with TemporaryDirectory() as folder:
        return dataclasses.replace(_plan(prepared(config, Path(folder)), processes, sharded), config=config)


def _plan(config: RealConfig, processes: int | None, sharded: bool | None) -> Plan:
    processes = processes or int(os.environ.get("WORLD_SIZE", 1))
    if sharded is None:
        told = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
        sharded = processes > 1 and (config.sharding == "fsdp2" or (config.sharding == "auto" and told))
    transformer, note = meta_transformer(config.backbone)
    codec, codec_note = meta_codec(config.backbone)
    notes, codec_notes = [note] if note else [], [codec_note] if codec_note else []
    if isinstance(config, CopyConfig):
        roles = copy_roles(config, transformer, codec, notes, codec_notes)
    else:
        roles = [*network_roles(config, transformer, notes), decoder_role(config, codec, codec_notes), judge_role(config)]
    return Plan(config, processes, sharded, roles, prompts_of(config, transformer))


def largest(config: RealConfig) -> tuple[int, int]:
    """Width and height of the largest pictures."""
    return max(config.sizes, key=lambda size: size[0] * size[1])


def latent_of(config: RealConfig, codec: AutoencoderCodec | PixelCodec) -> tuple[int, int]:
    """Height and width of their latents."""
    width, height = largest(config)
    return height // codec.downscale, width // codec.downscale


def frozen_bytes(config: RealConfig) -> int:
    """Of a weight that is not trained."""
    return frozen_dtype(config).itemsize


def codec_bytes(config: RealConfig) -> int:
    return 4 if config.codec_precision == "fp32" else 2


def trained_by(config: RealConfig, transformer: nn.Module) -> int:
    """Parameters that one trained role has."""
    if config.roles == "adapters":
        return counting.lora_size(transformer, config.rank, lora_targets(transformer))
    return counting.parameters(transformer)


def learning(config: RealConfig) -> int:
    """Forwards that one trained call costs: forward, input gradient, weight gradient (of an adapter next to nothing), recomputation."""
    return (2 if config.roles == "adapters" else 3) + ("backbone" in config.checkpointing)


def graph_bytes(config: RealConfig, call: Call, part: str) -> int:
    """What a graph over the batch keeps."""
    return config.batch * (call.recomputed if part in config.checkpointing else call.activations) * frozen_bytes(config) // 2


def trained_role(config: RealConfig, role: str, trained: int, **more) -> RoleBudget:
    """Weights, gradients and moments in fp32."""
    return RoleBudget(role, trained, weights=4 * trained, gradients=4 * trained, moments=MOMENTS[config.optimizer] * trained, **more)


def network_roles(config: RealConfig, transformer: nn.Module, notes: list[str]) -> list[RoleBudget]:
    """Student, fake score and teacher."""
    latent = latent_of(config, meta_codec(config.backbone)[0])
    with_reference, without = (backbone_call(transformer, latent, reference) for reference in (True, False))
    base, trained, n = counting.parameters(transformer), trained_by(config, transformer), config.batch * config.accumulate
    calls = {"one": 1.0, "two": 2.0, "mixed": 2 - 1 / config.sampler_steps, "all": float(config.sampler_steps)}[config.calls]
    most = {"one": 1, "two": 2, "mixed": 2, "all": config.sampler_steps}[config.calls]
    updates = config.fake_updates if config.dmd_weight else 0
    rollout = calls * with_reference.flops if config.fake_rollouts == "fresh" else 0.0
    read = without.flops if config.dmd_weight else 0.0
    guided = 2 if max(config.guidance, config.guidance_strong) != 1 else 1
    return [
        trained_role(
            config, "student", trained, average=4 * trained if config.ema else 0, activations=most * graph_bytes(config, with_reference, "backbone"),
            flops=n * calls * with_reference.flops * learning(config), notes=notes,
        ),
        trained_role(
            config, "fake", trained, activations=graph_bytes(config, without, "backbone"),
            flops=n * (updates * (rollout + without.flops * learning(config)) + read),
        ),
        RoleBudget(
            "teacher", base, weights=frozen_bytes(config) * base, flops=n * guided * read,
            notes=["the base of both adapters"] if config.roles == "adapters" else [],
        ),
    ]  # fmt: skip


def decoder_role(config: RealConfig, codec: AutoencoderCodec | PixelCodec, notes: list[str]) -> RoleBudget:
    """The autoencoder, whose decoder sends the judge's gradient back."""
    call, size, recomputed = decoder_call(codec, latent_of(config, codec)), counting.parameters(codec), "codec" in config.checkpointing
    kept = (call.recomputed if recomputed else call.activations) * codec_bytes(config) // 2
    flops = config.batch * config.accumulate * call.flops * (2 + recomputed) if config.judge_weight else 0.0
    whole = codec_bytes(config) * size
    return RoleBudget("autoencoder", size, weights=whole, whole=whole, activations=config.batch * kept, flops=flops, notes=notes)


def judge_role(config: RealConfig) -> RoleBudget:
    """All judges together."""
    judge, low = RoleBudget("judge", 0), frozen_bytes(config)
    for place in config.judge:
        model, told = meta_judge(place)
        vision, words, notes = judge_calls(model, place, largest(config))
        size = counting.parameters(model)
        judge.parameters += size
        judge.weights += low * size
        judge.whole += low * (size - sum(map(counting.parameters, blocks(model))))
        judge.activations += graph_bytes(config, vision, "judge") + graph_bytes(config, words, "judge")
        passes = 2 + ("judge" in config.checkpointing)
        seen = vision.flops * (passes + 1)  # the reference is seen once, without a graph
        judge.flops += config.batch * config.accumulate * (seen + words.flops * passes) if config.judge_weight else 0.0
        judge.notes += [x for x in (told, *notes) if x]
    return judge


def copy_roles(config: CopyConfig, transformer: nn.Module, codec: AutoencoderCodec, notes: list[str], codec_notes: list[str]) -> list[RoleBudget]:
    """Who the warm-up holds: the student, with adapters their base too (and the fake score's adapter, idle), and the autoencoder, which only
    encodes, without a graph."""
    call, trained = backbone_call(transformer, latent_of(config, codec), True), trained_by(config, transformer)
    n, size, base = config.batch * config.accumulate, counting.parameters(codec), counting.parameters(transformer)
    student = trained_role(
        config, "student", trained, average=4 * trained if config.ema else 0, activations=graph_bytes(config, call, "backbone"),
        flops=n * call.flops * learning(config), notes=notes,
    )  # fmt: skip
    idle = "of the adapter, and the fake score's, idle"
    frozen = [RoleBudget("base", base, weights=frozen_bytes(config) * base + 4 * trained, notes=[idle])] if config.roles == "adapters" else []
    width, height = largest(config)
    whole, flops = codec_bytes(config) * size, n * encoder_flops(codec, (height, width))
    return [student, *frozen, RoleBudget("autoencoder", size, weights=whole, whole=whole, flops=flops, notes=codec_notes)]
