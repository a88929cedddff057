"""From settings to loaded roles, judge and codec: everything small is checked before anything large is read.

Precision: frozen weights in bf16, trained ones in fp32 under autocast (adapters are trained, their base is not); the autoencoder as
`codec_precision` says. Loading goes one model at a time, and each is put in its place (device, CPU, shards) before the next.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import cached_file

from vlmedit.data import seed_torch
from vlmedit.models.codec import AutoencoderCodec
from vlmedit.pictures import InputError
from vlmedit.real import judges
from vlmedit.real.backbones import Backbone, Channels, ZImage, backbone_of, family_of, load_transformer, widen
from vlmedit.real.cache import DTYPE
from vlmedit.real.export import LORA_FILE
from vlmedit.real.hub import reachable
from vlmedit.real.judges import Ensemble, Judge, answer_token, load_judge, preprocessor_settings
from vlmedit.real.requests import Book
from vlmedit.real.roles import Roles, adapter_roles
from vlmedit.real.sharding import blocks, shard
from vlmedit.real.text import TextBank
from vlmedit.train.config import ConfigError

ANSWERS = ("Yes", "No")


def read_json(place: str, file: str) -> dict | None:
    """A small file of a folder or of a model of the Hub; None where there is none."""
    path = Path(place) / file
    if Path(place).is_dir():
        return json.loads(path.read_text()) if path.is_file() else None
    if place.startswith(("/", ".", "~")) or place.count("/") != 1:
        raise InputError(f"{place}: no such folder, and no id of the Hub, which reads OWNER/NAME")
    try:
        found = cached_file(place, Path(file).name, subfolder=str(Path(file).parent) if "/" in file else "", local_files_only=not reachable())
    except OSError as error:
        said = str(error).splitlines()[0]
        if "does not appear to have a file" in said:
            return None
        raise InputError(f"{place}: no such folder, and no model of the Hub that can be reached ({said})") from None
    return json.loads(Path(found).read_text())


def lacking_files(folder: Path) -> list[str]:
    """What a saved model's folder lacks: weights named by its index, or any weights at all."""
    for index in folder.glob("*.index.json"):
        names = set(json.loads(index.read_text()).get("weight_map", {}).values())
        return sorted(n for n in names if not (folder / n).is_file())
    return [] if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")) else ["its weights (*.safetensors)"]


def complete(place: str, part: str = "") -> list[str]:
    """Problems of one part of a local folder; of an id of the Hub nothing can be said before it is downloaded."""
    folder = Path(place) / part
    if not Path(place).is_dir():
        return []
    if not (folder / "config.json").is_file():
        return [f"{folder}: no config.json; give the folder of a whole model, as save_pretrained writes it"]
    lacking = lacking_files(folder)
    return [f"{folder}: half a model, it lacks {', '.join(lacking[:3])}{f' and {len(lacking) - 3} more' if len(lacking) > 3 else ''}; download it again"] if lacking else []


def own_code(place: str) -> dict[str, tuple[str, str]]:
    """Module and class of each part of a pipeline (and of "pipeline" itself) that comes with it as code."""
    index = read_json(place, "model_index.json") or {}
    found = {name: tuple(v) for name, v in index.items() if not name.startswith("_") and isinstance(v, list) and v[0] not in (None, "diffusers", "transformers")}
    for part in ("transformer", "vae"):
        if reference := (read_json(place, f"{part}/config.json") or {}).get("auto_map", {}).get("AutoModel"):
            found[part] = tuple(reference.rsplit(".", 1))
    return found | ({"pipeline": tuple(index["_class_name"])} if isinstance(index.get("_class_name"), list) else {})


def load_part(config, part: str, dtype: torch.dtype) -> ModelMixin:
    """Transformer or autoencoder of the backbone; its own code is run where the settings trust it."""
    settings = {"subfolder": part, DTYPE: dtype}
    if config.trust_remote_code and (own := own_code(config.backbone).get(part)):
        module, name = own
        own_class = get_class_from_dynamic_module(config.backbone, f"{module}.py", subfolder=part, class_name=name, trust_remote_code=True)
        return own_class.from_pretrained(config.backbone, **settings)
    return load_transformer(config.backbone, **settings) if part == "transformer" else diffusers.AutoModel.from_pretrained(config.backbone, **settings)


def check_backbone(place: str, encoder: bool = True, trust: bool = False) -> list[str]:
    """What is wrong with a pipeline's folder, by its small files alone. `trust` allows code of its own."""
    try:
        config = read_json(place, "transformer/config.json")
    except InputError as error:
        return [f"backbone: {error}"]
    if config is None:
        return [f"backbone: {place} has no transformer/config.json; give the folder or the id of a diffusers pipeline"]
    problems = []
    if (own := own_code(place)) and not trust:
        problems.append(f"backbone: {place} brings code of its own ({', '.join(own)}), which is not run; use a checkpoint whose classes diffusers has, or read it and set trust_remote_code=true")
    try:
        family_of(config.get("_class_name", "a model without a class name"))
    except ValueError as error:
        problems.append(f"backbone: {place}: {error}")
    for part in ("transformer", "vae"):
        problems += [f"backbone: {p}" for p in complete(place, part)]
    if encoder:
        index = read_json(place, "model_index.json")
        if index is None:
            problems.append(f"backbone: {place} has no model_index.json, and the prompts are not encoded yet; give the whole pipeline")
    return problems


def check_judge(place: str) -> list[str]:
    """What is wrong with a judge's folder, by its small files alone."""
    try:
        config = read_json(place, "config.json")
    except InputError as error:
        return [f"judge: {error}"]
    if config is None:
        return [f"judge: {place} has no config.json; give the folder or the id of a vision-language model"]
    name = (config.get("architectures") or ["a model without architectures"])[0]
    if name not in judges.FAMILIES:
        known = ", ".join(judges.FAMILIES)
        if "auto_map" in config:
            return [f"judge: {place} is {name}, code of its own, which is not run; use the checkpoint whose class transformers has (of InternVL the one ending with -hf); known: {known}"]
        return [f"judge: {place}: no adapter for {name}; known: {known}"]
    problems = [f"judge: {p}" for p in complete(place)]
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        for word in ANSWERS:
            answer_token(tokenizer, word)
        preprocessor_settings(place)
    except (ValueError, OSError) as error:
        problems.append(f"judge: {str(error).splitlines()[0]}")
    return problems


def frozen_dtype(config) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


class ExactCodec(AutoencoderCodec):
    """A codec that works in its own precision whatever autocast says, and hands out fp32."""

    def _exact(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return work(x.to(self.autoencoder.dtype)).float()

    def encode(self, pixels: Tensor) -> Tensor:
        return self._exact(super().encode, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return self._exact(super().decode, latents)


def load_codec(config, device: torch.device) -> ExactCodec:
    dtype = torch.bfloat16 if config.codec_precision == "bf16" else torch.float32
    autoencoder = load_part(config, "vae", dtype)
    recompute = "codec" in config.checkpointing and autoencoder._supports_gradient_checkpointing
    return ExactCodec(autoencoder, recompute).to(device)


def load_backbone(config, bank: TextBank, dtype: torch.dtype, place: str | None = None, checkpointing: bool = True) -> Backbone:
    """The backbone with its settings; a family without a slot for a reference is widened."""
    transformer = load_transformer(place, **{DTYPE: dtype}) if place else load_part(config, "transformer", dtype)
    if issubclass(family_of(type(transformer).__name__), Channels) and not place:
        transformer = widen(transformer)
    backbone = backbone_of(transformer, bank, checkpointing and "backbone" in config.checkpointing)
    if config.omni:
        if not isinstance(backbone, ZImage):
            raise ConfigError(f"omni is a mode of Z-Image, and {config.backbone} is {type(backbone).__name__}; leave it out")
        backbone.omni = True
    return backbone


def start_adapter(student: nn.Module, folder: str) -> None:
    """Fill the student's adapter from a saved one."""
    path = Path(folder) / LORA_FILE
    if not path.is_file():
        raise ConfigError(f"start is {folder!r}, which has no {LORA_FILE}; with roles 'adapters' it is the model folder of an earlier run of adapters")
    state = load_file(path)
    student.load_state_dict({n: state[key] for n in student.state_dict() if (key := n.replace(".student.", ".")) in state})


def load_roles(config, bank: TextBank, accelerator: Accelerator, sharded: bool = False) -> Roles:
    """Student, fake score and teacher, each in its place."""
    low, high = frozen_dtype(config), torch.float32

    def settle(role: str, model: Backbone) -> Backbone:
        if config.compile:
            for block in blocks(model.transformer):
                block.compile(backend=config.compile)
        if sharded:
            shard(model.transformer, accelerator, config.precision)
        elif role not in config.offload:
            model.to(accelerator.device)
        return model

    if config.roles == "adapters":
        backbone = load_backbone(config, bank, low)
        seed_torch("adapters", config.seed)  # the same in every process
        roles = adapter_roles(backbone, config.rank, config.alpha)
        for weights in roles.student.shared.weights.values():
            for _, p in weights:
                p.data = p.data.to(high)
        if config.start:
            start_adapter(roles.student, config.start)
        settle("student", backbone)
        roles.student.shared.collect()
        return roles
    student = settle("student", load_backbone(config, bank, high, config.start))
    fake = settle("fake", load_backbone(config, bank, high))
    teacher = load_backbone(config, bank, low, checkpointing=False)
    teacher.requires_grad_(False)
    return Roles(student, fake, settle("teacher", teacher))


def load_judges(config, book: Book, accelerator: Accelerator, sharded: bool = False) -> Judge | Ensemble:
    """One judge or an ensemble, with one book of questions."""
    found = []
    for place in config.judge:
        judge = load_judge(place, book, checkpointing="judge" in config.checkpointing, dtype=frozen_dtype(config))
        if sharded:
            shard(judge.model, accelerator, config.precision, root=False)
        if "judge" not in config.offload:
            judge.to(accelerator.device)
        found.append(judge)
    return found[0] if len(found) == 1 else Ensemble(found)
