"""From settings to loaded roles, judge and codec, once `vlmedit.networks.checks` has found nothing wrong; and a trained student back to disk.

Precision: frozen weights in bf16, trained ones in fp32 under autocast (adapters are trained, their base is not); the autoencoder as
`codec_precision` says. Loading goes one model at a time, and each is put in its place (device, CPU, shards) before the next.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from diffusers import ConfigMixin, ModelMixin
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from vlmedit.errors import ConfigError
from vlmedit.networks.backbones import families, family_of
from vlmedit.networks.checks import own_code, read_json
from vlmedit.networks.codec import AutoencoderCodec, PixelCodec
from vlmedit.networks.judges import Ensemble, Judge, Shapes, load_judge
from vlmedit.networks.lora import LORA_FILE, AdapterRole, Roles, adapter_roles, save_adapter, transformer_of
from vlmedit.networks.prompts import PromptEmbeddings, PromptTable, Words
from vlmedit.networks.sharding import blocks, shard, to_device
from vlmedit.protocols import Backbone, Codec, Prompts
from vlmedit.seeds import seed_torch

DTYPE = "dtype" if hasattr(diffusers.utils.deprecation_utils, "_TORCH_DTYPE_DEPRECATION_MESSAGE") else "torch_dtype"  # renamed in diffusers


@contextmanager
def written() -> Iterator[None]:
    """A full disk as safetensors tells it, in Python's own words."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error)) from error


def frozen_dtype(config) -> torch.dtype:
    """Of weights that are not trained."""
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def prompts_of(config, texts: list[str]) -> Prompts:
    """What a run's batches carry for these texts: a table of prompts to be encoded, or the words that the backbone reads by itself.
    Raises `ConfigError` where it has no other unconditional prompt than an empty one."""
    about = read_json(config.backbone, "transformer/config.json")
    if family_of(about["_class_name"]).adapter:
        return PromptTable(config.negative_prompt, texts)
    if config.negative_prompt:
        raise ConfigError(f"negative_prompt is {config.negative_prompt!r}, and {config.backbone} reads an empty one: negative_prompt=''")
    return Words(about["text_length"], PreTrainedTokenizerFast.from_pretrained(config.backbone, subfolder="tokenizer"))


# networks


class ModelConfig(ConfigMixin):
    """Reads a model's config.json, whatever its class."""

    config_name = "config.json"


def load_transformer(folder: str | os.PathLike, subfolder: str | None = None, **kwargs) -> ModelMixin:
    """A saved transformer of a known family, its class read from config.json before any weight is. `folder` may be an id of the Hub.
    Raises ValueError for a class without an adapter, FileNotFoundError for a folder or an id that does not lead to a model."""
    place = f"{folder}" + (f"/{subfolder}" if subfolder else "")
    try:
        config = ModelConfig.load_config(str(folder), subfolder=subfolder)
    except OSError as error:
        raise FileNotFoundError(f"no model config at {place}: give a folder with config.json, or an id of the Hub and a network ({str(error).splitlines()[0]})") from error
    name = config.get("_class_name", "a model without a class name")
    family = family_of(name)
    try:
        return family.model_class().from_pretrained(str(folder), subfolder=subfolder, **kwargs)
    except (OSError, SafetensorError) as error:
        raise FileNotFoundError(f"{place} has a config but not all of its weights; download it again ({str(error).splitlines()[0]})") from error


def backbone_of(transformer: ModelMixin, prompts: PromptEmbeddings | None, checkpointing: bool = False) -> Backbone:
    """The backbone of a loaded transformer: its family's adapter around it, or itself, whose words need no encoding."""
    family = family_of(type(transformer).__name__)
    if family.adapter:
        return family.adapter(transformer, prompts, checkpointing)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer


@torch.no_grad()
def widen(transformer: ModelMixin) -> ModelMixin:
    """A copy of a transformer that takes its reference as channels, with room for it: twice the input channels, the new weights zero, so
    that it draws what it drew before. Raises ValueError for another class, or one that is widened already."""
    family = family_of(type(transformer).__name__)
    if not family.widened:
        some = " and ".join(f.transformer for f in families().values() if f.widened)
        raise ValueError(f"{type(transformer).__name__} takes its reference as tokens; only {some} are widened")
    config = transformer.config
    channels, out = config.in_channels, config.out_channels or config.in_channels
    if channels != out:
        raise ValueError(f"{type(transformer).__name__} takes {channels} channels and returns {out}: it is widened already")
    with torch.device(transformer.device):
        wide = type(transformer).from_config({**config, "in_channels": 2 * channels, "out_channels": out})
    weights = transformer.state_dict()
    key = f"{family.adapter.entry}.weight"
    weights[key] = torch.cat((weights[key], torch.zeros_like(weights[key])), 1)
    wide.load_state_dict(weights)
    return wide if wide.dtype == transformer.dtype else wide.to(transformer.dtype)


def load_part(config, part: str, dtype: torch.dtype) -> ModelMixin:
    """Transformer or autoencoder of the backbone; its own code is run where the settings trust it."""
    settings = {"subfolder": part, DTYPE: dtype}
    if config.trust_remote_code and (own := own_code(config.backbone).get(part)):
        module, name = own
        own_class = get_class_from_dynamic_module(config.backbone, f"{module}.py", subfolder=part, class_name=name, trust_remote_code=True)
        return own_class.from_pretrained(config.backbone, **settings)
    return load_transformer(config.backbone, **settings) if part == "transformer" else diffusers.AutoModel.from_pretrained(config.backbone, **settings)


def load_codec(config, device: torch.device) -> Codec:
    """The backbone's autoencoder; none for a family that works on pixels."""
    if family_of(read_json(config.backbone, "transformer/config.json")["_class_name"]).pixels:
        return PixelCodec()
    dtype = torch.bfloat16 if config.codec_precision == "bf16" else torch.float32
    autoencoder = load_part(config, "vae", dtype)
    recompute = "codec" in config.checkpointing and autoencoder._supports_gradient_checkpointing
    return AutoencoderCodec(autoencoder, recompute).to(device)


def load_backbone(config, prompts: PromptEmbeddings | None, dtype: torch.dtype, place: str | None = None, checkpointing: bool = True) -> Backbone:
    """The backbone with its settings; a family without a slot for a reference is widened. Raises `ConfigError` for `omni`
    with a family that has no such mode."""
    transformer = load_transformer(place, **{DTYPE: dtype}) if place else load_part(config, "transformer", dtype)
    if family_of(type(transformer).__name__).widened and not place:
        transformer = widen(transformer)
    backbone = backbone_of(transformer, prompts, checkpointing and "backbone" in config.checkpointing)
    if config.omni:
        if "omni" not in getattr(backbone, "modes", ()):
            having = ", ".join(f.title for f in families().values() if f.adapter and "omni" in f.adapter.modes)
            raise ConfigError(f"omni is a mode of {having}, and {config.backbone} is {type(backbone).__name__}; leave it out")
        backbone.omni = True
    return backbone


def start_adapter(student: nn.Module, folder: str) -> None:
    """Fill the student's adapter from a saved one. Raises ConfigError for an adapter of another rank or backbone."""
    path = Path(folder) / LORA_FILE
    if not path.is_file():
        raise ConfigError(f"start is {folder!r}, which has no {LORA_FILE}; with roles 'adapters' it is the model folder of an earlier run of adapters")
    state, own = load_file(path), student.state_dict()
    names = {n: n.replace(".student.", ".") for n in own}
    wrong = sorted(set(names.values()) ^ state.keys()) or [key for n, key in names.items() if state[key].shape != own[n].shape]
    if wrong:
        raise ConfigError(f"start is {folder!r}, an adapter of another rank or backbone: {len(wrong)} matrices differ, the first {wrong[0]}; start from a run of the same settings")
    student.load_state_dict({n: state[key] for n, key in names.items()})


def compile_blocks(model: nn.Module, config) -> None:
    """Compile each repeated block. They share one piece of code, so dynamo counts its variants over all of them: each role's adapter, with
    and without gradient, with and without modulation, and of every shape a fixed and a flexible one; past its limit (8) it gives up."""
    shapes = 2 * max(2, len(config.buckets))  # with and without a reference
    variants = 3 * 2 * 2 * 2 * shapes
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, variants)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * variants)
    for block in blocks(model):
        block.compile(backend=config.compile)


def placed(model: Backbone, config, accelerator: Accelerator, sharded: bool, waits: bool = False) -> Backbone:
    """A loaded backbone, compiled if that is asked for, in its shards or on its device; one that `waits` stays on the CPU."""
    if config.compile:
        compile_blocks(transformer_of(model), config)
    if sharded:
        shard(transformer_of(model), accelerator, config.precision)
    elif not waits:
        model.to(accelerator.device)
    return model


def load_roles(config, prompts: PromptEmbeddings | None, accelerator: Accelerator, sharded: bool = False) -> Roles:
    """Student, fake score and teacher, each in its place."""
    low, high = frozen_dtype(config), torch.float32

    def settled(role: str, model: Backbone) -> Backbone:
        return placed(model, config, accelerator, sharded, role in config.offload)

    if config.roles == "adapters":
        backbone = load_backbone(config, prompts, low)
        seed_torch("adapters", config.seed)  # the same in every process
        roles = adapter_roles(backbone, config.rank, config.alpha)
        for weights in roles.student.shared.weights.values():
            for _, p in weights:
                p.data = p.data.to(high)
        if config.start:
            start_adapter(roles.student, config.start)
        settled("student", backbone)
        roles.student.shared.collect()
        return roles
    student = settled("student", load_backbone(config, prompts, high, config.start))
    fake = settled("fake", load_backbone(config, prompts, high))
    teacher = load_backbone(config, prompts, low, checkpointing=False)
    teacher.requires_grad_(False)
    return Roles(student, fake, settled("teacher", teacher))


def load_judges(config, questions: PromptTable, accelerator: Accelerator, sharded: bool = False) -> Judge | Ensemble:
    """One judge or an ensemble, with one table of questions."""
    found = []
    for place in config.judge:
        judge = load_judge(place, questions, checkpointing="judge" in config.checkpointing, dtype=frozen_dtype(config))
        if sharded and not isinstance(judge, Shapes):  # a few MB, and how often its blocks are called depends on the batch
            shard(judge.model, accelerator, config.precision, root=False)
        if "judge" not in config.offload:
            to_device(judge, accelerator.device)
        found.append(judge)
    return found[0] if len(found) == 1 else Ensemble(found)


# a trained student


def save_student(student: nn.Module, state: dict[str, Tensor], folder: Path) -> Path:
    """A trained student from its whole (gathered, perhaps averaged) state: a diffusers transformer, or its adapter in diffusers' own file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(student, AdapterRole):
        with written():
            save_adapter(student, state, folder)
        return folder
    transformer = transformer_of(student)
    with torch.device("meta"):
        shell = family_of(transformer.config._class_name).model_class().from_config(transformer.config)
    shell.load_state_dict({k.removeprefix("transformer."): v.contiguous() for k, v in state.items()}, assign=True)
    with written():
        shell.save_pretrained(folder)
    return folder
