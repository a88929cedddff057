"""From settings to loaded roles, judge and codec: everything small is checked before anything large is read.

Precision: frozen weights in bf16, trained ones in fp32 under autocast (adapters are trained, their base is not); the autoencoder as
`codec_precision` says. Loading goes one model at a time, and each is put in its place (device, CPU, shards) before the next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import cached_file

from vlmedit.data.requests import Book
from vlmedit.data.world import seed_torch
from vlmedit.errors import ConfigError, InputError
from vlmedit.networks import judges
from vlmedit.networks.backbones import Backbone, Channels, ZImage, backbone_of, family_of, load_transformer, widen
from vlmedit.networks.codec import AutoencoderCodec, PixelCodec
from vlmedit.networks.hub import reachable
from vlmedit.networks.judges import Ensemble, Judge, Shapes, answer_token, check_context, load_judge
from vlmedit.networks.lora import Roles, adapter_roles, lora_targets
from vlmedit.networks.prompt_cache import DTYPE, WORDS_ALONE
from vlmedit.networks.prompts import TextBank
from vlmedit.networks.sharding import blocks, settle, shard
from vlmedit.pipelines.export import LORA_FILE

ENCODERS = ("text_encoder", "image_encoder")  # how a pipeline names its other models; the rest are tokenizers, processors and a scheduler


def read_json(place: str, file: str) -> dict | None:
    """A small JSON file of a folder or of a model of the Hub; None where there is none. Raises `InputError` for a place that leads nowhere,
    and for what is no JSON."""
    path = Path(place) / file
    if Path(place).is_dir():
        return parsed(path) if path.is_file() else None
    if place.startswith(("/", ".", "~")) or place.count("/") != 1:
        raise InputError(f"{place}: no such folder, and no id of the Hub, which reads OWNER/NAME")
    try:
        found = cached_file(place, Path(file).name, subfolder=str(Path(file).parent) if "/" in file else "", local_files_only=not reachable())
    except OSError as error:
        said = str(error).splitlines()[0]
        if "does not appear to have a file" in said:
            return None
        raise InputError(f"{place}: no such folder, and no model of the Hub that can be reached ({said})") from None
    return parsed(Path(found))


def parsed(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}); download it again") from None


def torn(path: Path) -> str | None:
    """What is wrong with a safetensors file, by its header alone: 8 bytes with the header's length n, the header, and the data that it
    describes, which end where the file ends."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 8 + length <= size else {}
        whole = 8 + length + max((about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path.name} has no header of safetensors"
    return None if whole == size else f"{path.name} is cut off or damaged ({size:,} bytes, its header describes {whole:,})"


def lacking_files(folder: Path) -> list[str]:
    """What a saved model's folder lacks: weights named by its index, or any weights at all."""
    for index in folder.glob("*.index.json"):
        names = set(parsed(index).get("weight_map", {}).values())
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
    if lacking:
        return [f"{folder}: half a model, it lacks {', '.join(lacking[:3])}{f' and {len(lacking) - 3} more' if len(lacking) > 3 else ''}; download it again"]
    return [f"{folder}: {problem}; download it again" for path in sorted(folder.glob("*.safetensors")) if (problem := torn(path))]


def lacking_parts(place: str, index: dict) -> list[str]:
    """Problems of what a local pipeline's index names besides transformer and autoencoder: all of it is loaded to encode the prompts."""
    used = {name: v for name, v in index.items() if not name.startswith("_") and isinstance(v, list) and all(v) and name not in ("transformer", "vae")}
    if WORDS_ALONE.get(str(index.get("_class_name"))):
        used.pop("processor", None)  # of pictures
    problems = []
    for name in used if Path(place).is_dir() else ():
        folder = Path(place) / name
        if name.startswith(ENCODERS):
            problems += complete(place, name)
        elif not folder.is_dir() or not any(folder.iterdir()):
            problems.append(f"{folder}: its files are missing, and model_index.json names it; download it again")
    return problems


OURS = ("None", "diffusers", "transformers", "vlmedit")  # whose classes are no foreign code


def own_code(place: str) -> dict[str, tuple[str, str]]:
    """Module and class of each part of a pipeline (and of "pipeline" itself) that comes with it as code."""
    index = read_json(place, "model_index.json") or {}
    found = {name: tuple(v) for name, v in index.items() if not name.startswith("_") and isinstance(v, list) and str(v[0]).split(".")[0] not in OURS}
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
        return _check_backbone(place, encoder, trust)
    except InputError as error:
        return [f"backbone: {error}"]


def _check_backbone(place: str, encoder: bool, trust: bool) -> list[str]:
    config = read_json(place, "transformer/config.json")
    if config is None:
        return [f"backbone: {place} has no transformer/config.json; give the folder or the id of a diffusers pipeline"]
    problems = []
    if (own := own_code(place)) and not trust:
        problems.append(f"backbone: {place} brings code of its own ({', '.join(own)}), which is not run; use a checkpoint whose classes diffusers has, or read it and set trust_remote_code=true")
    parts = ("transformer", "vae")
    try:
        parts = parts[:1] if family_of(config.get("_class_name", "a model without a class name")).pixels else parts
    except ValueError as error:
        problems.append(f"backbone: {place}: {error}")
    for part in parts:
        problems += [f"backbone: {p}" for p in complete(place, part)]
    if encoder:
        index = read_json(place, "model_index.json")
        if index is None:
            problems.append(f"backbone: {place} has no model_index.json, and the prompts are not encoded yet; give the whole pipeline")
        problems += [f"backbone: {p}" for p in lacking_parts(place, index or {})]
    return problems


def check_judge(place: str, questions: str | None = None) -> list[str]:
    """What is wrong with a judge's folder, by its small files alone, and whether it can read these `questions`, if they are told."""
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
    problems, family, here = [f"judge: {p}" for p in complete(place)], judges.FAMILIES[name], not reachable()
    if family is judges.Shapes and questions not in (None, "shapes"):
        problems.append(f"judge: {place} is the judge of shapes, and questions is {questions!r}; it reads its own world's alone: questions=shapes")
    try:
        whole = AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=here)
        settings = family.settings_of(place, whole)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, local_files_only=here)
        ids = [answer_token(tokenizer, word) for word in family.answers]
        if len(set(ids)) == 1:
            raise ValueError(f"{place} writes both answers {family.answers} as token {ids[0]}; take another judge")
        check_context(whole, family.least_tokens(whole, settings), place)
    except (KeyError, TypeError) as error:
        problems.append(f"judge: {place}: its preprocessor settings lack {error}; copy preprocessor_config.json from the checkpoint")
    except (ValueError, OSError) as error:
        problems.append(f"judge: {str(error).splitlines()[0]}")
    return problems


def check_start(config) -> list[str]:
    """What is wrong with the folder that the student starts from, by configurations and headers alone."""
    place = Path(config.start or "")
    if not config.start or not place.is_dir():
        return [f"start is {config.start!r}, which is no folder; it is the model folder of an earlier run"] if config.start else []
    if config.roles != "adapters":
        problems = [f"start: {p}" for p in complete(config.start)]
        if not problems:
            theirs, mine = (read_json(*at).get("_class_name") for at in ((config.start, "config.json"), (config.backbone, "transformer/config.json")))
            if theirs != mine:
                problems.append(f"start is {config.start!r}, a {theirs}, and the backbone is a {mine}; start from a run on the same backbone")
        return problems
    path = place / LORA_FILE
    if not path.is_file():
        return [f"start is {config.start!r}, which has no {LORA_FILE}; with roles 'adapters' it is the model folder of an earlier run of adapters"]
    if problem := torn(path):
        return [f"start: {place}: {problem}; take another copy of it"]
    with safe_open(path, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    ranks = {shape[0] for name, shape in shapes.items() if "lora_A" in name}
    if ranks != {config.rank}:
        return [f"start is {config.start!r}, an adapter of rank {', '.join(map(str, sorted(ranks))) or 'none'}, and rank is {config.rank}; set rank to the adapter's"]
    if wrong := sorted(adapter_names(config.backbone, shapes) ^ shapes.keys()):
        return [f"start is {config.start!r}, an adapter of another backbone than {config.backbone}: they differ in {len(wrong)} matrices, the first {wrong[0]}; start from a run on the same backbone"]
    return []


def adapter_names(place: str, otherwise: dict) -> set[str]:
    """Names of the matrices that an adapter of this backbone has, without its weights; `otherwise` for a class that comes as code."""
    config = read_json(place, "transformer/config.json")
    if "transformer" in own_code(place):
        return set(otherwise)
    with torch.device("meta"):
        shell = getattr(diffusers, config["_class_name"]).from_config(config)
    return {f"{name}.lora_{side}.weight" for name in lora_targets(shell) for side in "AB"}


def encoder_of(config) -> dict[str, str | int]:
    """Whose prompts a cache holds: the backbone's whole place, its text encoders' configurations as a hash, length and precision."""
    place, index = config.backbone, read_json(config.backbone, "model_index.json") or {}
    names = sorted(n for n, v in index.items() if n.startswith("text_encoder") and isinstance(v, list) and all(v))
    told = json.dumps([read_json(place, f"{n}/config.json") for n in names], sort_keys=True)
    where = str(Path(place).resolve()) if Path(place).is_dir() else place
    return {"backbone": where, "text_encoder": hashlib.sha256(told.encode()).hexdigest()[:16], "length": config.text_length, "dtype": str(frozen_dtype(config))}


def frozen_dtype(config) -> torch.dtype:
    """Of weights that are not trained."""
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


def load_codec(config, device: torch.device) -> ExactCodec | PixelCodec:
    """The backbone's autoencoder; none for a family that works on pixels."""
    if family_of(read_json(config.backbone, "transformer/config.json")["_class_name"]).pixels:
        return PixelCodec()
    dtype = torch.bfloat16 if config.codec_precision == "bf16" else torch.float32
    autoencoder = load_part(config, "vae", dtype)
    recompute = "codec" in config.checkpointing and autoencoder._supports_gradient_checkpointing
    return ExactCodec(autoencoder, recompute).to(device)


def load_backbone(config, bank: TextBank, dtype: torch.dtype, place: str | None = None, checkpointing: bool = True) -> Backbone:
    """The backbone with its settings; a family without a slot for a reference is widened. Raises `ConfigError` for `omni`
    with another family than Z-Image."""
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
        compile_blocks(model.transformer, config)
    if sharded:
        shard(model.transformer, accelerator, config.precision)
    elif not waits:
        model.to(accelerator.device)
    return model


def load_roles(config, bank: TextBank, accelerator: Accelerator, sharded: bool = False) -> Roles:
    """Student, fake score and teacher, each in its place."""
    low, high = frozen_dtype(config), torch.float32
    settled = lambda role, model: placed(model, config, accelerator, sharded, role in config.offload)
    if config.roles == "adapters":
        backbone = load_backbone(config, bank, low)
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
    student = settled("student", load_backbone(config, bank, high, config.start))
    fake = settled("fake", load_backbone(config, bank, high))
    teacher = load_backbone(config, bank, low, checkpointing=False)
    teacher.requires_grad_(False)
    return Roles(student, fake, settled("teacher", teacher))


def load_judges(config, book: Book, accelerator: Accelerator, sharded: bool = False) -> Judge | Ensemble:
    """One judge or an ensemble, with one book of questions."""
    found = []
    for place in config.judge:
        judge = load_judge(place, book, checkpointing="judge" in config.checkpointing, dtype=frozen_dtype(config))
        if sharded and not isinstance(judge, Shapes):  # a few MB, and how often its blocks are called depends on the batch
            shard(judge.model, accelerator, config.precision, root=False)
        if "judge" not in config.offload:
            settle(judge, accelerator.device)
        found.append(judge)
    return found[0] if len(found) == 1 else Ensemble(found)
