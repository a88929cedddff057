"""Out of a run: a diffusers pipeline that edits in a few steps without this package installed, its card, and the way to the Hub.

    export(run, out)                  a whole pipeline: the backbone's own parts, the student as its transformer, the few-step scheduler
    export(run, out, kind="adapter")  the LoRA alone, the scheduler beside it

The sampler is diffusers' `FlowMatchEulerDiscreteScheduler` with `stochastic_sampling` and a static shift: at 4 steps it takes the times of
the unroll and re-noises as the unroll does, so the pipeline's pictures are our sampler's. Families with an edit pipeline of diffusers run in
that. The others have none that shows them the reference as it was trained; they run in the frame of `few_step_edit.py` with the calls of their
training, which is written beside the weights as one file that imports torch and diffusers alone. `editor.json` says what the folder is, for
`vlmedit edit`. The suite's own transformer becomes its own pipeline, which `vlmedit.load` reads without such a file.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from vlmedit.errors import InputError
from vlmedit.io import check_space, save_json
from vlmedit.networks.backbones import family_of
from vlmedit.networks.backbones._base import Family
from vlmedit.networks.checks import check_backbone, complete, own_code, parsed, reachable, read_json, torn
from vlmedit.networks.load import load_transformer, widen, written
from vlmedit.networks.lora import LORA_FILE
from vlmedit.networks.prompt_cache import DTYPE
from vlmedit.pipelines.card import TEXT_LENGTH, base_of, card, hub_card
from vlmedit.pipelines.shapes import EditPipeline
from vlmedit.pipelines.standalone import NAME as CODE
from vlmedit.pipelines.standalone import pipeline_of, standalone

KINDS = ("full", "adapter")
ABOUT = "editor.json"  # what an exported folder is
HUB_ERRORS = (*HfHubHTTPError.__bases__, RuntimeError)  # its HTTP client's errors, whichever client its version has, and OSError


def few_step_scheduler(shift: float, steps: int, omni: bool = False, text_length: int = TEXT_LENGTH) -> FlowMatchEulerDiscreteScheduler:
    """The unroll's sampler as a scheduler: called with `num_inference_steps=steps` it takes the times shift(1), shift(1 - 1/steps), ..."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True, use_dynamic_shifting=False)
    scheduler.register_to_config(few_steps=steps, omni=omni, text_length=text_length)  # read by our own pipeline file; diffusers passes over them
    return scheduler


def read_run(run: Path) -> tuple[dict, Path]:
    """A finished real run's settings and its student. Raises InputError for anything else."""
    run = Path(run)
    config, model = run / "config.json", run / "model"
    settings = parsed(config) if config.is_file() else {}
    if not isinstance(settings, dict) or "backbone" not in settings:
        raise InputError(f"{run}: not the folder of a run on real models; train one with vlmedit train npedit --config zimage_internvl")
    if not (model / "config.json").is_file() and not (model / LORA_FILE).is_file():
        raise InputError(f"{run}: no student in {model}; the run is not finished: repeat its command to resume it")
    lora = model / LORA_FILE
    problems = [f"{model}: {p}" for p in [torn(lora)] if p] if lora.is_file() else complete(str(model))
    if problems:
        raise InputError(f"{problems[0].removesuffix('; download it again')}; repeat the run's command, which writes its student again")
    return settings, model


def student_transformer(settings: dict, model: Path, dtype: torch.dtype) -> nn.Module:
    """The student as one transformer: the saved one, or the backbone with the adapter added into its weights."""
    if not (model / LORA_FILE).is_file():
        return load_transformer(model, **{DTYPE: dtype})
    transformer = load_transformer(settings["backbone"], "transformer", **{DTYPE: torch.float32})
    transformer = widen(transformer) if reaches_entry(model) else transformer
    transformer.load_lora_adapter(model, prefix=None, weight_name=LORA_FILE)
    transformer.fuse_lora()
    transformer.unload_lora()
    return nn.Module.to(transformer, dtype)


def reaches_entry(model: Path) -> bool:
    """Whether an adapter reaches a patch embedding that was widened for the reference."""
    return any("lora_A" in k and v.ndim != 2 for k, v in load_file(model / LORA_FILE).items())


def pipeline_class(family: Family) -> type[diffusers.DiffusionPipeline]:
    """The class in which an exported transformer runs."""
    if family.stock:
        return getattr(diffusers, family.stock.name)
    return pipeline_of(family) if family.adapter else EditPipeline


def code_of(family: Family) -> str | None:
    """The file of code that is written beside the weights; None where a class of diffusers or of ours runs them."""
    return None if family.stock or family.adapter is None else standalone(family)


def check_classes(settings: dict) -> None:
    """Raise `InputError` for a run on classes that came with the backbone as code: what is exported runs in diffusers' own."""
    if settings.get("trust_remote_code") and (own := own_code(settings["backbone"])):
        raise InputError(f"{settings['backbone']} brings code of its own ({', '.join(own)}), which diffusers' own classes do not have; a run on it is not exported")


def base_family(settings: dict) -> Family:
    """The family of the backbone's transformer. Raises `InputError` where the backbone is gone, half there, or comes as code."""
    place = settings["backbone"]
    if problems := check_backbone(place, trust=settings.get("trust_remote_code", False)):
        raise InputError([f"the run's {p}" for p in problems])
    check_classes(settings)
    return family_of(read_json(place, "transformer/config.json")["_class_name"])


def about(settings: dict, transformer: str, kind: str) -> dict:
    """What `vlmedit edit` has to know of an exported folder. `pixels`: the most that a picture of the training had."""
    from vlmedit.training.settings import bucket_of

    sizes = [bucket_of(text) for text in settings["buckets"]]
    return {
        "kind": kind, "transformer": transformer, **({"base": base_of(settings)} if kind == "adapter" else {}), "steps": settings["sampler_steps"],
        "text_length": settings["text_length"], "pixels": max(w * h for w, h in sizes),
    }  # fmt: skip


def export(run: str | Path, out: str | Path, kind: str = "full", dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the pipeline (or the adapter) of a finished run to the new folder `out`. Raises InputError for a run that cannot be exported so."""
    out = Path(out)
    if kind not in KINDS:
        raise InputError(f"--kind is {kind!r}; known: {', '.join(KINDS)}")
    settings, model = read_run(run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: not an empty folder; name a new one")
    lora = (model / LORA_FILE).is_file()
    if kind == "adapter" and not lora:
        raise InputError(f"{run}: its student is a whole transformer, not an adapter; export it with --kind full")
    if kind == "adapter" and reaches_entry(model):
        raise InputError(f"{run}: its adapter reaches a patch embedding that was widened for the reference, which its base does not have; export it with --kind full")
    place, family = settings["backbone"], base_family(settings)
    own = family.adapter is None
    if own and kind == "adapter":
        raise InputError(f"{run}: the suite's own pipeline takes no adapter; export it with --kind full")
    dtype = torch.float32 if own else dtype  # megabytes, and run on CPUs
    check_space(out, dtype.itemsize * weights_in(Path(place).glob("*/*.safetensors")) if kind == "full" else 4 * weights_in(model.glob("*.safetensors")))
    partial = out.with_name(f".{out.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with written():
            write_parts(settings, model, family, kind, dtype, partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def weights_in(paths: Iterable[Path]) -> int:
    """Numbers in safetensors files, by their headers."""
    total = 0
    for path in paths:
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
    return total


def write_parts(settings: dict, model: Path, family: Family, kind: str, dtype: torch.dtype, folder: Path) -> None:
    """Everything that an exported folder holds."""
    own, place = family.adapter is None, settings["backbone"]
    scheduler = few_step_scheduler(settings["sampler_shift"], settings["sampler_steps"], settings["omni"], settings["text_length"])
    if kind == "adapter":
        save_file({f"transformer.{k}": v for k, v in load_file(model / LORA_FILE).items()}, folder / LORA_FILE, {"format": "pt", **_adapter_note(model)})
        scheduler.save_pretrained(folder / "scheduler")
    else:
        transformer = student_transformer(settings, model, dtype)
        pipeline_class(family).from_pretrained(place, transformer=transformer, scheduler=scheduler, **{DTYPE: dtype}).save_pretrained(folder)
    if code := code_of(family):
        (folder / CODE).write_text(code, encoding="utf-8")
        if kind == "full":  # so that diffusers finds the class in the file
            index = folder / "model_index.json"
            save_json({**json.loads(index.read_text()), "_class_name": [Path(CODE).stem, "FewStepEditPipeline"]}, index)
    (folder / "README.md").write_text(card(settings, family.transformer, kind, dtype))
    if not own:
        save_json(about(settings, family.transformer, kind), folder / ABOUT)


def _adapter_note(model: Path) -> dict[str, str]:
    """The adapter's configuration under the names that a whole pipeline's loader looks for."""
    with safe_open(model / LORA_FILE, "pt") as file:
        found = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in found.items()})} if found else {}


def read_about(folder: Path) -> dict:
    """What `export` noted about a folder; nothing of the suite's own pipeline. Raises InputError for any other folder."""
    told = folder / ABOUT
    if not (folder / "README.md").is_file() or not (told.is_file() or (folder / "model_index.json").is_file()):
        raise InputError(f"{folder}: not an exported folder (it has no README.md or no {ABOUT}); export one first")
    return parsed(told) if told.is_file() else {}


def check_name(repository: str) -> None:
    """Raise InputError for what is no name of a repository."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"{repository!r} is no name of a repository: write OWNER/NAME ({error})") from None


def push_to_hub(folder: str | Path, repository: str, private: bool = True) -> str:
    """Upload an exported folder to the Hub. Raises InputError without a network, without a login, or for a name that is none."""
    folder = Path(folder)
    base = read_about(folder).get("base", "")
    check_name(repository)
    if Path(base).is_absolute():
        raise InputError(f"{folder}: its base is {base}, a folder that nobody else has; upload the base first and name its id in {ABOUT} and README.md")
    later = f"{folder} is complete, push it later with vlmedit export {folder} --push {repository}"
    if not reachable():
        raise InputError(f"{repository}: the Hub cannot be reached (no network, or HF_HUB_OFFLINE is set); {later}")
    try:
        api = HfApi()
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id  # with its owner
        text = hub_card((folder / "README.md").read_text(encoding="utf-8"), repository)
        api.upload_folder(folder_path=folder, repo_id=repository, ignore_patterns=["README.md"])
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repository)
    except LocalTokenNotFoundError as error:
        raise InputError(f"{repository}: not logged in to the Hub; run hf auth login ({str(error).splitlines()[0]}); {later}") from None
    except HUB_ERRORS as error:
        raise InputError(f"{repository}: the Hub cannot be reached or refuses ({str(error).splitlines()[0]}); {later}") from None
    return f"https://huggingface.co/{repository}"
