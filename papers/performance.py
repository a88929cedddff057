"""What one NP-Edit update costs in our structure and in a straight transcription of the published recipe's, part by part.

    python papers/performance.py                         # on a CPU: tiny random models, ratios only; and the counted budget of the real sizes
    python papers/performance.py --size real --updates 3 # on a GPU: 6B backbone, 14B judge, 512 x 512, random weights made on the device
    python papers/performance.py --kernels               # the same with the fused operations of vlmedit.kernels inside the update
    python papers/performance.py --profile FILE          # and what an update of ours spends its time on, by torch.profiler

Both structures run the same training loop (`vlmedit.training.real_models.train_loaded`) from the same settings; `STRUCTURES` and `FullLogits` make the
difference (table in performance.md). Backbone and judge are recomputed in both, and references seen without a graph. Every unroll has two
calls, the most the recipe draws.

Seconds exclude drawing data. FLOPs: `executed` by torch's counter in an update of its own, recomputation included; `counted` by
vlmedit.cost.plan from shapes alone, without recomputation: the least that a structure must compute. Achieved FLOP/s is the counted over the
seconds. No weights are downloaded. Writes papers/results/performance.json and the tables of papers/performance.md between their markers.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import mean
from unittest import mock

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import flop_counter
from transformers import AutoTokenizer
from vlmedit.kernels.inside import SWAPS, use

from vlmedit.cli._settings import read_settings, typed
from vlmedit.cost import calls, counting, plan
from vlmedit.data.manifest import Feed, read_manifest, texts_of
from vlmedit.errors import ConfigError, InputError
from vlmedit.networks import load as loading
from vlmedit.networks.backbones import family_of
from vlmedit.networks.codec import AutoencoderCodec
from vlmedit.networks.judges import FAMILIES, Judge, preprocessor_settings
from vlmedit.networks.load import load_judges, load_roles
from vlmedit.networks.prompts import PromptEmbeddings, PromptTable
from vlmedit.testing import PREFIX
from vlmedit.testing import random_models as tiny
from vlmedit.training.optimizer import Optimizer
from vlmedit.training.real_models import RealEdit, RealRun, Setup, make_accelerator, prepared, told, train_loaded
from vlmedit.training.settings import RealConfig

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "performance.json", HERE / "performance.md"
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"

STRUCTURES = {  # the rest of the settings is the same
    "ours": dict(roles="adapters", checkpointing=("backbone", "judge", "codec"), fake_updates=2, fake_rollouts="shared"),
    "transcription": dict(roles="modules", checkpointing=("backbone", "judge"), fake_updates=5, fake_rollouts="fresh"),
}
SIZES = {"tiny": ("tiny", ("64x64",)), "real": ("zimage_internvl_lora", ("512x512",))}  # settings and bucket
PARTS = {  # by the clocks of the update
    "student": ("student: unroll, backward, AdamW", ("student",)), "teacher": ("teacher and fake score read", ("teacher",)),
    "judge": ("judge and decoder", ("judge",)), "fake": ("fake score: rollouts, updates, AdamW", ("rollout", "fake")),
}  # fmt: skip
NEVER = 10**9
aten = torch.ops.aten
ATTENTION = {  # CPU kernels that torch's counter does not list
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: flop_counter.sdpa_backward_flop_count(grad, q, k, v),
}


class FullLogits(nn.Module):
    """A judge that answers as a plain forward does: logits of every position and word (N, L, V), of which two numbers are read."""

    def __init__(self, judge: Judge):
        super().__init__()
        self.judge = judge

    def logit_margin(self, images, question) -> Tensor:
        states, lengths = self.judge.states(images, question)
        logits = self.judge.model.get_output_embeddings()(states)  # (N, L, V)
        last = logits[torch.arange(len(states), device=states.device), lengths - 1].float()
        return last[:, self.judge.config.yes_token_id] - last[:, self.judge.config.no_token_id]


class PlainSteps(Optimizer):
    """Steps without moments, where AdamW's do not fit the device: their bytes are then counted, not measured."""

    def __init__(self, model: nn.Module, config: RealConfig, lr: float | None = None):
        self.module, self.config, self.lr = model, config, lr or config.lr
        self.parts = [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=self.lr)]


class Ledger:
    """What each part of an update took: FLOPs and bytes kept for a backward pass in a counted update, time and peak memory in the others."""

    def __init__(self, device: torch.device):
        self.device, self.counting, self.entries, self.own = device, True, {}, set()

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def begin(self, counting: bool) -> None:
        self.counting, self.entries = counting, {}

    def now(self) -> float:
        if not self.cuda:
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def note(self, part: str):
        entry = self.entries.setdefault(part, dict(seconds=0.0, flops=0, saved=0, peak=0))
        with self.count(entry) if self.counting else nullcontext():
            if self.cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
            began = self.now()
            yield
            entry["seconds"] += self.now() - began
            if self.cuda:
                entry["peak"] = max(entry["peak"], torch.cuda.max_memory_allocated(self.device))

    @contextmanager
    def count(self, entry: dict):
        """Distinct storages that autograd saves within the block, weights left out; on a GPU peak memory says it better."""
        seen: dict[int, Tensor] = {}

        def pack(x: Tensor) -> Tensor:
            seen[x.untyped_storage()._cdata] = x  # held, so that no storage is counted twice
            return x

        with ExitStack() as stack:
            flops = stack.enter_context(flop_counter.FlopCounterMode(display=False, custom_mapping=ATTENTION))
            if not self.cuda:
                stack.enter_context(saved_tensors_hooks(pack, lambda x: x))
            yield
        entry["flops"] += flops.get_total_flops()
        entry["saved"] = max(entry["saved"], sum(x.untyped_storage().nbytes() for key, x in seen.items() if key not in self.own))


class Measured(RealEdit):
    """`RealEdit` whose clocks write into a ledger as well."""

    def __init__(self, ledger: Ledger, config, roles, judge, codec, device):
        self.ledger = ledger
        super().__init__(config, roles, judge, codec, device)
        shared = getattr(roles.student, "shared", None)
        for module in (roles.student, roles.fake, roles.teacher, judge, codec, *((shared.transformer,) if shared else ())):
            ledger.own |= {p.untyped_storage()._cdata for p in module.parameters()}

    @contextmanager
    def clock(self, part: str):
        with super().clock(part), self.ledger.note(part):
            yield


# --- random models of a configuration, made where they are used


def random_model(meta: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A twin of a model on the meta device with random weights; the same ones in every role."""
    before, config = torch.get_default_dtype(), copy.deepcopy(meta.config)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = type(meta).from_config(config) if isinstance(meta, ModelMixin) else type(meta)(config)
    finally:
        torch.set_default_dtype(before)
    return tiny.awaken(nn.Module.to(model, dtype))


def judge_around(model: nn.Module, place: str, texts: list[str], book: PromptTable | None = None, checkpointing: bool = False) -> Judge:
    """A judge with a folder's tokenizer and settings, or where only the configuration is known with a tokenizer schooled on its questions
    (about a token per word, as the real one) and the model's own picture size."""
    family = FAMILIES[type(model).__name__]
    if Path(place).is_dir():
        return family(model, AutoTokenizer.from_pretrained(place), preprocessor_settings(place), book, None, checkpointing)
    answers = ["Yes", "No", " Yes", " No", "yes", "no"]
    tokenizer = tiny.tokenizer().train_new_from_iterator([*texts, *answers] * 50, 4000, show_progress=False)
    vision = model.config.vision_config
    side, patch_size = (v if isinstance(v, int) else v[0] for v in (getattr(vision, "image_size", 448), vision.patch_size))
    settings = {
        "size": {"height": side, "width": side, "shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}, "patch_size": patch_size, "merge_size": 2, "temporal_patch_size": 2,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    model.config.image_token_id = tokenizer.convert_tokens_to_ids(family.image_token)
    return family(model, tokenizer, settings, book, None, checkpointing)


class RandomSetup(Setup):
    """`Setup` of random weights. The project's own loaders put the roles and the judge in their places; what they would read is made."""

    def __init__(self, config: RealConfig):
        accelerator = make_accelerator(config)
        self.config = config = prepared(config)
        rows = read_manifest(config.data)
        self.run, self.sharded = RealRun(config, accelerator), False
        self.prompts, self.questions = PromptTable(config.negative_prompt, texts_of(rows)), PromptTable()
        self.texts = [text for r in rows for text in r.request.questions() if isinstance(text, str)]
        self.feed = Feed(rows, config, self.prompts, self.questions, device=self.run.device)
        device, low = self.run.device, loading.frozen_dtype(config)
        transformer, _ = calls.meta_transformer(config.backbone)
        adapter = family_of(type(transformer).__name__).adapter
        width, pooled_width = adapter.text_width(transformer.config), adapter.pooled_width(transformer.config)
        states = [torch.randn(calls.WORDS, width, dtype=low) for _ in self.prompts.texts]
        pooled = [torch.randn(pooled_width, dtype=low) for _ in states] if pooled_width else None
        exact = torch.bfloat16 if config.codec_precision == "bf16" else torch.float32
        autoencoder = random_model(calls.meta_codec(config.backbone)[0].autoencoder, device, exact)
        self.codec = AutoencoderCodec(autoencoder, "codec" in config.checkpointing and autoencoder._supports_gradient_checkpointing).to(device)
        made = lambda place, part=None, **kw: random_model(transformer, device, kw[loading.DTYPE])
        with mock.patch.object(loading, "load_transformer", made):
            self.roles = load_roles(config, PromptEmbeddings(states, pooled), accelerator)

    def judge(self) -> nn.Module:
        def made(place, book, checkpointing, dtype):
            return judge_around(random_model(calls.meta_judge(place)[0], self.run.device, dtype), place, self.texts, book, checkpointing)

        with mock.patch.object(loading, "load_judge", made):
            return load_judges(self.config, self.questions, self.run.accelerator)


# --- settings, and what is counted


def settings(name: str, size: str, structure: str, out: str) -> RealConfig:
    """A structure's settings. Raises `ConfigError` for settings of another size."""
    given = typed(RealConfig, read_settings(Path(name)))
    fixed = dict(
        buckets=SIZES[size][1], batch=1, accumulate=1, calls="two", data="tiny:shapes", start=None, type_shares=None, ema=0.0, nothing_share=0.0, spike=1e30, trackers=(),
        offload=(), steps=NEVER, save_every=NEVER, strip_every=NEVER, out=out, precision="bf16" if size == "real" else "no", warmup=0, final_lr=1.0,
    )  # fmt: skip
    config = RealConfig.make(**{**given, **fixed, **STRUCTURES[structure]})
    small = config.backbone.startswith(PREFIX)
    if small != (size == "tiny"):
        raise ConfigError(f"--config {name} names the backbone {config.backbone} and --size is {size}; use --size {'tiny' if small else 'real'}, or other settings")
    if len(config.judge) > 1:
        raise ConfigError(f"--config {name} names {len(config.judge)} judges; one is measured: name one in judge")
    return config


def full_logits(config: RealConfig) -> tuple[int, float]:
    """Bytes of one (N, L, V) tensor of logits, and FLOPs of forward and input gradient, for two questions per picture."""
    meta, _ = calls.meta_judge(config.judge[0])
    meta = copy.deepcopy(meta)
    width, height = config.sizes[0]
    seen = judge_around(meta, config.judge[0], []).tokens(torch.empty(3, height, width, device="meta"))
    words, wide = meta.get_output_embeddings().weight.shape
    places = 2 * config.batch * (2 * seen + calls.WORDS)
    return places * words * (2 if config.precision == "bf16" else 4), 2.0 * 2 * places * words * wide


def encode_flops(config: RealConfig) -> float:
    """A reference encoded once."""
    codec, _ = calls.meta_codec(config.backbone)
    width, height = config.sizes[0]
    pixels = torch.empty(1, 3, height, width, device="meta", dtype=torch.bfloat16)
    return config.batch * counting.count(codec.autoencoder, lambda: codec.encode(pixels)).flops


def counted(config: RealConfig, whole: bool) -> dict:
    """A structure's budget from shapes alone, on one device. `whole`: with logits over the whole vocabulary."""
    config = prepared(config)
    found, least = plan.plan(config, 1, False), plan.plan(dataclasses.replace(config, checkpointing=()), 1, False)
    size, cost = full_logits(config) if whole else (0, 0.0)
    encode = encode_flops(config)
    updates = config.fake_updates if config.fake_rollouts == "fresh" else 0

    def parts(p: plan.Plan) -> dict[str, float]:
        flops = {r.role: r.flops for r in p.roles}
        read = flops["teacher"] / (2 if max(config.guidance, config.guidance_strong) != 1 else 1)  # guidance reads twice, the fake score once
        return {
            "student": flops["student"] + encode, "teacher": flops["teacher"] + read, "judge": flops["judge"] + flops["autoencoder"] + cost,
            "fake": flops["fake"] - read + updates * encode,
        }  # fmt: skip

    next(r for r in found.roles if r.role == "judge").activations += size
    return {
        "flops": parts(found), "least_flops": parts(least), "memory": {part: found.memory(part) for part in PARTS}, "peak_bytes": found.peak,
        "activations": {r.role: r.activations for r in found.roles}, "moments": sum(r.moments for r in found.roles), "logits_bytes": size,
    }  # fmt: skip


def ladder(name: str, out: str) -> list[dict]:
    """From the transcription to ours, one switch after another, counted at the real size."""
    ours, theirs = (settings(name, "real", s, out) for s in STRUCTURES)
    steps = [
        ("straight transcription", {}, True), ("+ two answer rows instead of all logits", {}, False), ("+ autoencoder recomputed", {"checkpointing": ours.checkpointing}, False),
        ("+ adapters instead of modules", {"roles": ours.roles}, False), ("+ two fake-score updates on the student's rollout", {k: getattr(ours, k) for k in ("fake_updates", "fake_rollouts")}, False),
    ]  # fmt: skip
    rows, config = [], theirs
    for what, change, whole in steps:
        config = dataclasses.replace(config, **change)
        found = counted(config, whole)
        rows.append({"structure": what, "total_flops": sum(found["flops"].values()), "total_least_flops": sum(found["least_flops"].values()), **found})
    return rows


# --- measuring


def measure(config: RealConfig, whole: bool, updates: int, plain: bool = False, profile: Path | None = None) -> dict:
    """Figures per part of one structure: means over `updates`, after one update that is counted and warms up. With `profile` one more update
    runs under torch's profiler, whose table of operations is written there."""
    with told():
        setup = RandomSetup(config)
        judge = setup.judge()
    ledger = Ledger(setup.run.device)
    loop = train_loaded(setup, FullLogits(judge) if whole else judge, partial(Measured, ledger), PlainSteps if plain else Optimizer)
    ledger.begin(counting=True)
    step = next(loop)
    first, timed = ledger.entries, []
    for _ in range(updates):
        ledger.begin(counting=False)
        step = next(loop)
        timed.append(ledger.entries)
    if profile:
        ledger.begin(counting=False)
        profile.write_text(profiled(lambda: next(loop), ledger.cuda), encoding="utf-8")
    loop.close()
    if step.skipped:
        raise SystemExit("an update was skipped: its gradient is not finite, so the optimizer's time is missing")
    least = counted(config, whole)
    found = {}
    for part, (_, clocks) in PARTS.items():
        seconds = mean(sum(entry[c]["seconds"] for c in clocks if c in entry) for entry in timed)
        figures = {
            "seconds": seconds, "executed_flops": sum(first[c]["flops"] for c in clocks if c in first), "counted_flops": least["least_flops"][part],
            "achieved_flops_per_second": least["least_flops"][part] / seconds,
        }  # fmt: skip
        if ledger.cuda:
            figures["peak_bytes"] = max(entry[c]["peak"] for entry in timed for c in clocks if c in entry)
        else:
            figures["saved_bytes"] = max(first[c]["saved"] for c in clocks if c in first)
        found[part] = figures
    total = {key: sum(f[key] for f in found.values()) for key in ("seconds", "executed_flops", "counted_flops")}
    total["achieved_flops_per_second"] = total["counted_flops"] / total["seconds"]
    if ledger.cuda:
        total["peak_bytes"] = max(f["peak_bytes"] for f in found.values())
    else:  # the student's graph waits while the judge has its own
        total["saved_bytes"] = max(found["student"]["saved_bytes"] + found["judge"]["saved_bytes"], found["fake"]["saved_bytes"])
    return {"parts": found, "total": total, "counted": least, "moments": "counted" if plain else "measured"}


def profiled(update: Callable[[], object], cuda: bool, rows: int = 60) -> str:
    """torch.profiler's table of one update: the operations that take most time of the device by themselves (on a GPU with what they allocate)."""
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=kinds, profile_memory=cuda, record_shapes=True) as seen:
        update()
        if cuda:
            torch.cuda.synchronize()
    return seen.key_averages(group_by_input_shape=True).table(sort_by=f"self_{'cuda' if cuda else 'cpu'}_time_total", row_limit=rows)


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """FLOP/s of a square product, the most that can be hoped for."""
    a = torch.randn(side, side, device=device, dtype=dtype)
    ledger = Ledger(device)
    a @ a
    began = ledger.now()
    for _ in range(10):
        a @ a
    return 10 * 2.0 * side**3 / (ledger.now() - began)


def run(size: str, name: str, updates: int, profile: Path | None = None) -> dict:
    """Both structures at one size; `profile` is of ours."""
    if updates < 1:
        raise ConfigError(f"--updates is {updates}; at least 1 is measured after the first, which warms up")
    if size == "real" and not torch.cuda.is_available():
        raise ConfigError("--size is real and there is no GPU; use --size tiny, whose page shows the counted budget of the real sizes, or a machine with CUDA")
    if profile and not profile.absolute().parent.is_dir():
        raise ConfigError(f"--profile {profile}: its folder does not exist; make it first")
    device = torch.device("cuda" if torch.cuda.is_available() and size == "real" else "cpu")
    cuda, found = device.type == "cuda", {}
    with tempfile.TemporaryDirectory() as out:
        configs = {structure: settings(name, size, structure, out) for structure in STRUCTURES}
        for structure, config in configs.items():
            whole = structure == "transcription"
            limit = torch.cuda.get_device_properties(device).total_memory if cuda else None
            plain = cuda and counted(config, whole)["peak_bytes"] > 0.95 * limit
            try:
                found[structure] = measure(config, whole, updates, plain, None if whole else profile)
            except torch.cuda.OutOfMemoryError:
                found[structure] = {"failed": "out of memory", "counted": counted(config, whole)}
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
    rate = matmul_rate(device, torch.bfloat16, 8192) if cuda else matmul_rate(device, torch.float32, 1024)
    config = configs["ours"]
    return {
        "size": size, "config": name, "backbone": config.backbone, "judge": config.judge[0], "bucket": config.buckets[0], "updates": updates, "torch": torch.__version__.split("+")[0],
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}",
        "clock": "wall seconds, synchronized" if cuda else "process CPU-seconds", "matmul_flops_per_second": rate, "structures": found,
    }  # fmt: skip


# --- the page


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1), *("| " + " | ".join(r) + " |" for r in rows)])


def measured_table(found: dict) -> str:
    """Per part: ours, the transcription, and ours as a share of it."""
    cuda = found["size"] == "real"
    memory, unit, scale = ("peak_bytes", "GB", 1e9) if cuda else ("saved_bytes", "kB", 1e3)
    time_scale, time_unit = (1, "s") if cuda else (1e3, "ms")
    flop_scale, flop_unit = (1e12, "TFLOP") if cuda else (1e6, "MFLOP")
    rates, sizes = [], []
    for part in (*PARTS, "total"):
        a, b = ({} if "failed" in f else f["total"] if part == "total" else f["parts"][part] for f in (found["structures"][s] for s in STRUCTURES))
        both = lambda key, scale, digits: [f"{x[key] / scale:.{digits}f}" if x else "-" for x in (a, b)]
        share = lambda key: f"{a[key] / b[key]:.2f}" if a and b and b[key] else "-"
        name = "**update**" if part == "total" else PARTS[part][0]
        rates.append([name, *both("seconds", 1 / time_scale, 2 if cuda else 0), share("seconds"), *both("achieved_flops_per_second", flop_scale, 1 if cuda else 0)])
        sizes.append([name, *both(memory, scale, 1 if cuda else 0), share(memory), *both("counted_flops", flop_scale, 1), share("counted_flops"), *both("executed_flops", flop_scale, 1)])
    first = ["part", f"{time_unit}: ours", "transcription", "ratio", f"achieved {flop_unit}/s: ours", "transcription"]
    second = ["part", f"{'peak' if cuda else 'saved'}, {unit}: ours", "transcription", "ratio", f"counted {flop_unit}: ours", "transcription", "ratio", f"executed {flop_unit}: ours", "transcription"]
    said = f"{found['backbone']}, {found['judge']}, {found['bucket']}, batch 1, {found['device']}, {found['clock']}, mean of {found['updates']} updates; a matrix product alone reaches {found['matmul_flops_per_second'] / flop_scale:.0f} {flop_unit}/s."
    notes = [said]
    for name in STRUCTURES:
        if "failed" in found["structures"][name]:
            notes.append(f"{name}: {found['structures'][name]['failed']}; its counted peak is {found['structures'][name]['counted']['peak_bytes'] / 1e9:.0f} GB.")
        elif found["structures"][name]["moments"] == "counted":
            notes.append(f"AdamW's moments of {name} do not fit the device: measured without them, {found['structures'][name]['counted']['moments'] / 1e9:.0f} GB come on top.")
    return "\n\n".join((" ".join(notes), table(first, rates), table(second, sizes)))


def ladder_table(rows: list[dict]) -> str:
    first = rows[0]
    cells = [
        [r["structure"], f"{r['peak_bytes'] / 1e9:.1f}", f"{r['peak_bytes'] / first['peak_bytes']:.2f}", f"{r['total_flops'] / 1e12:.0f}", f"{r['total_flops'] / first['total_flops']:.2f}", f"{r['total_least_flops'] / 1e12:.0f}"]
        for r in rows
    ]  # fmt: skip
    steps = table(["structure", "peak, GB", "ratio", "TFLOP", "ratio", "TFLOP without recomputation"], cells)
    ends = {"ours": rows[-1], "transcription": first}
    parts = [
        [PARTS[p][0], *(f"{ends[s]['memory'][p] / 1e9:.1f}" for s in STRUCTURES), *(f"{ends[s]['flops'][p] / 1e12:.1f}" for s in STRUCTURES), f"{ends['ours']['flops'][p] / ends['transcription']['flops'][p]:.2f}"]
        for p in PARTS
    ]  # fmt: skip
    return steps + "\n\n" + table(["part", "GB while it runs: ours", "transcription", "TFLOP: ours", "transcription", "ratio"], parts)


def block(figures: dict) -> str:
    """What stands between the markers."""
    out = []
    if "real" in figures:
        out.append("### Measured at the real size\n\n" + measured_table(figures["real"]))
    else:
        out.append(
            "### Measured at the real size\n\nNot measured: there was no GPU. Unknown are time, peak memory and achieved FLOP/s of a 6B backbone with a 14B judge; "
            "`python papers/performance.py --size real` fills this section on a GPU of 141 GB."
        )
    for size, name in (("real_kernels", "at the real size"), ("tiny_kernels", "at tiny size on a CPU, where the references of the operations run")):
        if size in figures:
            out.append(f"### The same with fused operations, {name}\n\nInside the update: {', '.join(figures[size]['kernels'])}.\n\n" + measured_table(figures[size]))
    if "counted" in figures:
        c = figures["counted"]
        out.append(
            f"### Counted at the real size, not measured\n\n{c['backbone']}, {c['judge']}, {c['bucket']}, batch 1, one device, from shapes alone. Not counted: the block under "
            "recomputation, kernels' workspaces, fragmentation. The last step changes the algorithm, the others only how it is computed.\n\n" + ladder_table(c["ladder"])
        )
    if "tiny" in figures:
        out.append(
            "### Measured at tiny size on a CPU\n\nA few thousand random weights: only the ratios say something, and of time they say little, because at this size calls cost more than "
            "arithmetic, adapters most of all. Peak memory of the process means nothing here; in its place stand the bytes that autograd saves for backward passes. A tiny tokenizer spells its questions out, so "
            "the judge executes more than is counted for 128 words.\n\n" + measured_table(figures["tiny"])
        )
    return "\n\n".join(out)


def filled(page: Path, text: str) -> str:
    """The page with the block between its markers. Raises ValueError where it has none."""
    page_text = page.read_text(encoding="utf-8")
    if page_text.count(BEGIN) != 1 or page_text.count(END) != 1:
        raise ValueError(f"{page} needs the markers {BEGIN} and {END}, once each")
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{text}\n{END}", page_text, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="real" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--config", help="settings: a file, or a name of those that ship (default: tiny, or zimage_internvl_lora)")
    parser.add_argument("--updates", type=int, default=3, help="timed ones, after one that warms up")
    parser.add_argument("--kernels", nargs="*", choices=tuple(SWAPS), help="fused operations inside the update (without names: all); stands on the page beside the plain one")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write torch.profiler's table of one more update of ours there")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args(argv)
    inside = None if args.kernels is None else tuple(args.kernels) or tuple(SWAPS)
    try:
        with use(*inside) if inside else nullcontext():
            found = run(args.size, args.config or SIZES[args.size][0], args.updates, args.profile)
        part = {f"{args.size}_kernels": {**found, "kernels": inside}} if inside else {args.size: found}
        figures = {**(json.loads(RESULTS.read_text()) if RESULTS.exists() else {}), **part}
        with tempfile.TemporaryDirectory() as out:
            name = found["config"] if args.size == "real" else SIZES["real"][0]
            config = settings(name, "real", "ours", out)
            figures["counted"] = {"config": name, "backbone": config.backbone, "judge": config.judge[0], "bucket": config.buckets[0], "ladder": ladder(name, out)}
    except (ConfigError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    RESULTS.write_text(json.dumps(figures, indent=2) + "\n")
    PAGE.write_text(filled(PAGE, block(figures)), encoding="utf-8")
    print(json.dumps(figures, indent=2) if args.json else block(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
