"""What is wrong with a folder or an id of the Hub, by its small files alone: configurations, indices and the headers of weights.

Everything that can be seen to be wrong is said before anything large is read. Whether the Hub answers is asked once, so that nothing waits
for it in vain.
"""

from __future__ import annotations

import functools
import inspect
import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies

import diffusers
import torch
from huggingface_hub import constants
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import cached_file

from vlmedit.errors import InputError
from vlmedit.networks.backbones import family_of
from vlmedit.networks.lora import LORA_FILE, lora_targets

if TYPE_CHECKING:
    from vlmedit.networks.backbones._base import Family

ENCODERS = ("text_encoder", "image_encoder")  # how a pipeline names its other models; the rest are tokenizers, processors and a scheduler


def looks_like_id(place: str) -> bool:
    """Whether this is no folder but reads OWNER/NAME, as an id of the Hub does."""
    return place.count("/") == 1 and all(place.split("/")) and not place.startswith((".", "~")) and not Path(place).exists()


@functools.cache
def reachable() -> bool:
    """Whether the Hub answers, asked once: its client alone would try half a minute for every file. Behind a proxy it is believed to."""
    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or (80 if address.scheme == "http" else 443)), timeout=5).close()
    except OSError:
        return False
    return True


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


def text_pipeline(index: dict, family: Family) -> str | None:
    """The diffusers pipeline that encodes a checkpoint's words; None: the class that its index names, which may be code of its own."""
    return None if isinstance(index.get("_class_name"), list) else family.text_pipeline


def lacking_parts(place: str, index: dict, family: Family | None) -> list[str]:
    """Problems of what a local pipeline's index names besides transformer and autoencoder: all of it is loaded to encode the prompts, but for
    what the family's own pipeline of words has no use."""
    used = {name for name, v in index.items() if not name.startswith("_") and isinstance(v, list) and all(v)} - {"transformer", "vae"}
    if family and (pipeline := text_pipeline(index, family)):
        used &= set(inspect.signature(getattr(diffusers, pipeline)).parameters)
    problems = []
    for name in sorted(used) if Path(place).is_dir() else ():
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
    family = None
    try:
        family = family_of(config.get("_class_name", "a model without a class name"))
    except ValueError as error:
        problems.append(f"backbone: {place}: {error}")
    for part in ("transformer",) if family and family.pixels else ("transformer", "vae"):
        problems += [f"backbone: {p}" for p in complete(place, part)]
    if encoder:
        index = read_json(place, "model_index.json")
        if index is None:
            problems.append(f"backbone: {place} has no model_index.json, and the prompts are not encoded yet; give the whole pipeline")
        problems += [f"backbone: {p}" for p in lacking_parts(place, index or {}, family)]
    return problems


def check_judge(place: str, questions: str | None = None) -> list[str]:
    """What is wrong with a judge's folder, by its small files alone, and whether it can read these `questions`, if they are told."""
    from vlmedit.networks import judges  # which asks this module whether the Hub answers

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
        ids = [judges.answer_token(tokenizer, word) for word in family.answers]
        if len(set(ids)) == 1:
            raise ValueError(f"{place} writes both answers {family.answers} as token {ids[0]}; take another judge")
        judges.check_context(whole, family.least_tokens(whole, settings), place)
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
        shell = family_of(config["_class_name"]).model_class().from_config(config)
    return {f"{name}.lora_{side}.weight" for name in lora_targets(shell) for side in "AB"}


