"""What a run with these settings would hold and compute, per role, before anything is loaded: `vlmedit train npedit --config F --dry-run`.
The copy warm-up (`CopyConfig`) is counted as it runs: the student and the autoencoder alone. The encoded prompts' place on disk is counted too.

Every model is built from its config.json on the meta device, where weights have shapes and no data, and called once with shapes alone
(`vlmedit.cost.counting`). Where a model's file cannot be reached, its published configuration stands in if this package knows it. Parts
that cannot be called without data are estimated by 2 FLOPs per weight and token, and say so.

Memory follows the trainer's own rules: trained weights, gradients and moments in fp32 (moments in 8 bits with bitsandbytes), frozen
weights in `precision`, activations by what is recomputed. Not counted: the block under recomputation, kernels' workspaces, fragmentation,
and the text encoder, which is gone before training. Units: bytes, GB are 1e9; FLOPs, a multiply-add is 2.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import diffusers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

from vlmedit.cost import counting
from vlmedit.cost.counting import GB, Call
from vlmedit.data.manifest import book_of, read_manifest
from vlmedit.errors import InputError
from vlmedit.networks import judges
from vlmedit.networks.backbones import Channels, backbone_of, family_of
from vlmedit.networks.codec import AutoencoderCodec, PixelCodec
from vlmedit.networks.hub import reachable
from vlmedit.networks.judge import JudgeModel
from vlmedit.networks.judges import recompute
from vlmedit.networks.load import frozen_dtype, read_json
from vlmedit.networks.lora import lora_targets
from vlmedit.networks.prompts import Text, TextBank
from vlmedit.networks.sharding import blocks
from vlmedit.training.real_models import PRESENT, prepared
from vlmedit.training.settings import CopyConfig, RealConfig

PUBLISHED = {  # class defaults and configurations of counting.py, for ids whose files cannot be reached
    "Tongyi-MAI/Z-Image": counting.z_image, "Tongyi-MAI/Z-Image-Turbo": counting.z_image, "black-forest-labs/FLUX.1-Kontext-dev": counting.flux_kontext,
    "Qwen/Qwen-Image-Edit": counting.qwen_image_edit, "OpenGVLab/InternVL3-14B-hf": counting.internvl3_14b,
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": counting.llava_onevision_7b, "Qwen/Qwen2.5-VL-7B-Instruct": counting.qwen2_5_vl_7b,
    "black-forest-labs/FLUX.2-klein-base-4B": counting.flux2_klein, "black-forest-labs/FLUX.2-klein-4B": counting.flux2_klein,
    "Qwen/Qwen3-VL-8B-Instruct": counting.qwen3_vl_8b,
}  # fmt: skip
CODECS = {counting.flux2_klein: (counting.flux2_autoencoder, "FLUX.2's autoencoder"), counting.qwen_image_edit: (counting.qwen_autoencoder, "Qwen-Image's autoencoder")}
WORDS = 128  # tokens of a prompt and of a question's words
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


def _known(place: str, error: Exception | None, what: str):
    if place in PUBLISHED:
        return PUBLISHED[place](), "published configuration"
    raise InputError(f"{what}: {place}: no configuration to count with ({error or 'no config.json'}); give its folder, or a network") from None


@lru_cache(maxsize=8)
def meta_transformer(place: str) -> tuple[nn.Module, str]:
    """The transformer on the meta device, and a note where its configuration is not the place's own."""
    try:
        config = read_json(place, "transformer/config.json")
    except InputError as error:
        return _known(place, error, "backbone")
    if config is None:
        return _known(place, None, "backbone")
    name = config["_class_name"]
    if issubclass(family_of(name), Channels) and config["in_channels"] == (config.get("out_channels") or config["in_channels"]):
        config = {**config, "in_channels": 2 * config["in_channels"], "out_channels": config["in_channels"]}  # as `widen` makes it
    return counting._meta(lambda: getattr(diffusers, name).from_config(config)), ""


@lru_cache(maxsize=8)
def meta_codec(place: str) -> tuple[AutoencoderCodec | PixelCodec, str]:
    """The autoencoder on the meta device, and a note where its configuration is not the place's own."""
    if family_of(type(meta_transformer(place)[0]).__name__).pixels:
        return PixelCodec(), "none: it works on pixels"
    try:
        config = read_json(place, "vae/config.json")
    except InputError:
        config = None
    if config is None:
        if place not in PUBLISHED:
            raise InputError(f"backbone: {place} has no vae/config.json; give the folder or the id of a diffusers pipeline")
        build, note = CODECS.get(PUBLISHED[place], (counting.autoencoder, "FLUX.1's autoencoder"))
        return AutoencoderCodec(build()), note
    return AutoencoderCodec(counting._meta(lambda: getattr(diffusers, config["_class_name"]).from_config(config))), ""


@lru_cache(maxsize=8)
def meta_judge(place: str) -> tuple[nn.Module, str]:
    """The judge on the meta device, and a note where its configuration is not the place's own."""
    try:
        config = read_json(place, "config.json")
    except InputError as error:
        return _known(place, error, "judge")
    if config is None:
        return _known(place, None, "judge")
    if (name := (config.get("architectures") or ["a model without architectures"])[0]) not in judges.FAMILIES:
        raise InputError(f"judge: {place}: no adapter for {name}; known: {', '.join(judges.FAMILIES)}")
    full = AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=not reachable())
    return counting._meta(lambda: AutoModelForImageTextToText.from_config(full)), ""


def shapes(*size: int) -> Tensor:
    """A tensor of that size without data, in bf16."""
    return torch.empty(*size, device="meta", dtype=torch.bfloat16)


class _Words(Text):
    """Prompts as shapes: all of one length."""

    def rows(self) -> list[Tensor]:
        return list(self.states)


@lru_cache(maxsize=8)
def backbone_call(transformer: nn.Module, latent: tuple[int, int], reference: bool) -> Call:
    """One picture through the backbone, with and without its reference."""
    family = family_of(type(transformer).__name__)
    width = family.text_width(SimpleNamespace(config=transformer.config))
    pooled = transformer.config.pooled_projection_dim if family.pooled else None
    backbone = backbone_of(transformer, TextBank([torch.zeros(1, width)], [torch.zeros(pooled)] if pooled else None))
    words = transformer.config.get("text_length", WORDS)  # the suite's own counts positions
    text = _Words(shapes(1, words, width), torch.ones(1, words, dtype=torch.bool, device="meta"), shapes(1, pooled) if pooled else None)
    x = shapes(1, backbone.channels, *latent)
    known = shapes(1, backbone.channels, *latent) if reference else None
    switch = lambda on: transformer.enable_gradient_checkpointing() if on else transformer.disable_gradient_checkpointing()
    return counting.count(transformer, lambda: backbone(x, shapes(1), text, known), switch)


@lru_cache(maxsize=8)
def decoder_call(codec: AutoencoderCodec, latent: tuple[int, int]) -> Call:
    """One picture decoded, for its gradient with respect to the latents."""
    if isinstance(codec, PixelCodec):
        return Call(0.0, 0, 0)
    latents, autoencoder = shapes(1, codec.channels, *latent).requires_grad_(), codec.autoencoder
    switch = lambda on: autoencoder.enable_gradient_checkpointing() if on else autoencoder.disable_gradient_checkpointing()
    return counting.count(autoencoder, lambda: codec.decode(latents), switch if autoencoder._supports_gradient_checkpointing else None)


@lru_cache(maxsize=8)
def encoder_flops(codec: AutoencoderCodec, size: tuple[int, int]) -> float:
    """One picture encoded, without a graph."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        codec.encode(shapes(1, 3, *size))
    return counter.get_total_flops()


def estimated(model: nn.Module, tokens: int, width: int, layers: int) -> Call:
    """2 FLOPs per weight and token; 16 activations of a layer's width per token, one with recomputation."""
    return Call(2.0 * counting.parameters(model) * tokens, 2 * 16 * tokens * width * layers, 2 * tokens * width * layers)


@lru_cache(maxsize=8)
def judge_calls(model: nn.Module, place: str, picture: tuple[int, int]) -> tuple[Call, Call, list[str]]:
    """One picture through the vision tower and two questions of it through the language model."""
    name, notes = type(model).__name__, []
    family = judges.FAMILIES[name]
    judge = family.__new__(family)
    nn.Module.__init__(judge)
    judge.config, judge.model = model.config, model
    if family is judges.Shapes:
        return *shape_judge_calls(model), notes
    try:
        judge.settings = judges.preprocessor_settings(place)
    except (OSError, FileNotFoundError):
        side = getattr(model.config.vision_config, "image_size", 448)
        patch = getattr(model.config.vision_config, "patch_size", 14)
        side, patch = (v if isinstance(v, int) else v[0] for v in (side, patch))
        judge.settings = {"size": {"height": side, "width": side, "shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}, "patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    with torch.device("meta"):
        judge.mean, judge.std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    shown = torch.empty(3, picture[1], picture[0], device="meta", requires_grad=True)
    try:
        seen = judge.tokens(shown)
    except (ValueError, KeyError, AttributeError, TypeError):
        seen, _ = 512, notes.append("512 tokens per picture assumed")
    model.requires_grad_(False)
    inner = model.model
    language = inner.language_model if hasattr(inner, "language_model") else inner.text_model
    tower = nn.ModuleList([m for n, m in inner.named_children() if m is not language])

    def switch(on: bool):
        model.train(on)
        recompute(model, on)

    try:
        vision = counting.count(tower, lambda: torch.cat([f.pooler_output.flatten() for f in judge.encode([shown])]), switch)
    except Exception:  # reads data, which shapes do not have
        config = model.config.vision_config
        layers = next((getattr(config, k) for k in ("num_hidden_layers", "depth") if hasattr(config, k)), 24)
        vision, _ = estimated(tower, 4 * seen, config.hidden_size, layers), notes.append("vision tower estimated")
    length = 2 * seen + WORDS
    try:
        words = counting.language_call(model, length, 2)
    except Exception:
        config = language.config
        words, _ = estimated(language, 2 * length, config.hidden_size, config.num_hidden_layers), notes.append("language model estimated")
    return vision, words, notes


def shape_judge_calls(model: JudgeModel) -> tuple[Call, Call]:
    """The same of the suite's own judge: a pair through its vision layers, two questions through its text layers."""
    model.requires_grad_(False)
    side, length = model.config.side, model.config.text_length

    def switch(on: bool):
        model.train(on)
        recompute(model, on)

    pair = shapes(1, 2, 3, side, side).requires_grad_()
    seen = shapes(2, (side // 4) ** 2, model.config.width).requires_grad_()
    ids = torch.zeros(2, length, dtype=torch.long, device="meta")
    return counting.count(model, lambda: model.get_image_features(pair), switch), counting.count(model, lambda: model.hidden(ids, seen), switch)


@dataclass(frozen=True)
class Prompts:
    """The cache of encoded prompts on disk."""

    count: int
    tokens: int  # of each
    bytes: int
    assumed: bool  # `tokens` is, where prompts keep their own lengths


def prompts_of(config: RealConfig, transformer: nn.Module) -> Prompts | None:
    """How many prompts the manifest asks for and what their states take; None where it cannot be read."""
    try:
        book = book_of(read_manifest(config.data), config.negative_prompt)
    except InputError:
        return None
    if isinstance(config, CopyConfig):
        book.number("")
    family = family_of(type(transformer).__name__)
    tokens = min(WORDS, config.text_length) if family.masked else config.text_length
    numbers = tokens * family.text_width(SimpleNamespace(config=transformer.config)) + (transformer.config.pooled_projection_dim if family.pooled else 0)
    return Prompts(len(book.texts), tokens, len(book.texts) * numbers * frozen_dtype(config).itemsize, family.masked)


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
    width, height = max(config.sizes, key=lambda s: s[0] * s[1])
    down = codec.downscale
    with_reference = backbone_call(transformer, (height // down, width // down), True)
    codec_bytes = 4 if config.codec_precision == "fp32" else 2
    low = 2 if config.precision == "bf16" else 4
    adapters = config.roles == "adapters"
    base = counting.parameters(transformer)
    trained = counting.lora_size(transformer, config.rank, lora_targets(transformer)) if adapters else base
    moments = MOMENTS[config.optimizer] * trained
    recomputed = {part: part in config.checkpointing for part in ("backbone", "judge", "codec")}
    again = 1 if recomputed["backbone"] else 0
    learns = 2 if adapters else 3  # forward, input gradient, weight gradient (of an adapter next to nothing)
    calls = {"one": 1.0, "two": 2.0, "mixed": 2 - 1 / config.sampler_steps, "all": float(config.sampler_steps)}[config.calls]
    most = {"one": 1, "two": 2, "mixed": 2, "all": config.sampler_steps}[config.calls]
    pictures = config.batch
    if isinstance(config, CopyConfig):
        return Plan(config, processes, sharded, copy_roles(config, transformer, codec, with_reference, trained, [x for x in (note,) if x], codec_note), prompts_of(config, transformer))
    without = backbone_call(transformer, (height // down, width // down), False)
    decoder = decoder_call(codec, (height // down, width // down))
    decoder = Call(decoder.flops, decoder.activations * codec_bytes // 2, decoder.recomputed * codec_bytes // 2)
    kept = lambda call, part: pictures * (call.recomputed if recomputed[part] else call.activations) * low // 2
    updates = config.fake_updates if config.dmd_weight else 0
    rollout = calls * with_reference.flops if config.fake_rollouts == "fresh" else 0.0
    guided = 2 if max(config.guidance, config.guidance_strong) != 1 else 1
    n = pictures * config.accumulate
    role = lambda name, size, **kw: RoleBudget(name, size, **kw)
    found = [
        role("student", trained, weights=4 * trained, gradients=4 * trained, moments=moments, average=4 * trained if config.ema else 0, activations=most * kept(with_reference, "backbone"), flops=n * calls * with_reference.flops * (learns + again), notes=[note] if note else []),
        role("fake", trained, weights=4 * trained, gradients=4 * trained, moments=moments, activations=kept(without, "backbone"), flops=n * (updates * (rollout + without.flops * (learns + again)) + (without.flops if config.dmd_weight else 0))),
        role("teacher", base, weights=low * base, flops=n * guided * without.flops if config.dmd_weight else 0.0, notes=["the base of both adapters"] if adapters else []),
        role("autoencoder", counting.parameters(codec), weights=codec_bytes * counting.parameters(codec), whole=codec_bytes * counting.parameters(codec), activations=pictures * (decoder.recomputed if recomputed["codec"] else decoder.activations), flops=n * decoder.flops * (2 + (1 if recomputed["codec"] else 0)) if config.judge_weight else 0.0, notes=[codec_note] if codec_note else []),
    ]  # fmt: skip
    judge = role("judge", 0)
    for place in config.judge:
        model, told = meta_judge(place)
        vision, words, notes = judge_calls(model, place, (width, height))
        size = counting.parameters(model)
        judge.parameters += size
        judge.weights += low * size
        judge.whole += low * (size - sum(map(counting.parameters, blocks(model))))
        judge.activations += kept(vision, "judge") + kept(words, "judge")
        passes = 2 + (1 if recomputed["judge"] else 0)
        judge.flops += n * (vision.flops * (passes + 1) + words.flops * passes) if config.judge_weight else 0.0  # the reference is seen once, without a graph
        judge.notes += [x for x in (told, *notes) if x]
    return Plan(config, processes, sharded, [*found, judge], prompts_of(config, transformer))


def copy_roles(config: CopyConfig, transformer: nn.Module, codec: AutoencoderCodec, call: Call, trained: int, notes: list[str], codec_note: str) -> list[RoleBudget]:
    """Who the warm-up holds: the student, with adapters their base too (and the fake score's adapter, idle), and the autoencoder, which only
    encodes, without a graph. `call` is one forward of a picture with its reference."""
    adapters, recomputed = config.roles == "adapters", "backbone" in config.checkpointing
    low, codec_bytes = 2 if config.precision == "bf16" else 4, 4 if config.codec_precision == "fp32" else 2
    n, size = config.batch * config.accumulate, counting.parameters(codec)
    student = RoleBudget(
        "student", trained, weights=4 * trained, gradients=4 * trained, moments=MOMENTS[config.optimizer] * trained, average=4 * trained if config.ema else 0,
        activations=config.batch * (call.recomputed if recomputed else call.activations) * low // 2, flops=n * call.flops * ((2 if adapters else 3) + recomputed), notes=notes,
    )  # fmt: skip
    base = counting.parameters(transformer)
    frozen = [RoleBudget("base", base, weights=low * base + 4 * trained, notes=["of the adapter, and the fake score's, idle"])] if adapters else []
    width, height = max(config.sizes, key=lambda s: s[0] * s[1])
    autoencoder = RoleBudget("autoencoder", size, weights=codec_bytes * size, whole=codec_bytes * size, flops=n * encoder_flops(codec, (height, width)), notes=[codec_note] if codec_note else [])
    return [student, *frozen, autoencoder]


def show(plan: Plan) -> None:
    """Print the plan."""
    from rich.console import Console
    from rich.table import Table

    c = plan.config
    what = f"with {', '.join(c.judge)}" if len(plan.parts) > 1 else "copying its reference"
    table = Table(title=f"{c.backbone} {what}: {c.roles}, batch {c.batch} x {c.accumulate} x {plan.processes} processes{', sharded' if plan.sharded else ''}")
    for name in ("role", "parameters", "weights", "gradients", "moments", "average", "activations", "TFLOP", "notes"):
        table.add_column(name, justify="left" if name in ("role", "notes") else "right")
    gb = lambda b: f"{b / GB:.2f} GB" if b else ""
    for r in plan.roles:
        notes = [*r.notes, *(["waits on the CPU"] if r.role in c.offload and len(plan.parts) > 1 else [])]
        table.add_row(r.role, f"{r.parameters / 1e9:.3f} B" if r.parameters >= 1e7 else f"{r.parameters:,}", *(gb(getattr(r, k)) for k in ("weights", "gradients", "moments", "average", "activations")), f"{r.flops / 1e12:.1f}", "; ".join(notes))
    Console(width=max(140, Console().width)).print(table)
    parts = ", ".join(f"{part} {plan.memory(part) / GB:.1f}" for part in plan.parts)
    print(f"memory per device while each part runs, GB: {parts}; peak {plan.peak / GB:.1f}")
    print(f"one update: {sum(r.flops for r in plan.roles) / 1e12:.1f} TFLOP per process; {c.steps} updates")
    if p := plan.prompts:
        print(f"prompts on disk: {p.count:,} x {p.tokens} tokens{' (assumed)' if p.assumed else ''}, {p.bytes / GB:.3g} GB in {c.text_cache or f'{c.out}/text'}")
    else:
        print(f"prompts on disk: not counted, because {c.data} cannot be read; data=MANIFEST names one")
    print("not counted: the block under recomputation, workspaces, fragmentation, the text encoder (it is gone before training)")
