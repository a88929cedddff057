"""Out of a run: a diffusers pipeline that edits in a few steps without this package installed, its card, and the way to the Hub.

    export(run, out)                  a whole pipeline: the backbone's own parts, the student as its transformer, the few-step scheduler
    export(run, out, kind="adapter")  the LoRA alone, the scheduler beside it

The sampler is diffusers' `FlowMatchEulerDiscreteScheduler` with `stochastic_sampling` and a static shift: at 4 steps it takes the times of
the unroll and re-noises as the unroll does, so the pipeline's pictures are our sampler's. FLUX.1-Kontext and FLUX.2 klein run in diffusers'
own pipeline classes; Z-Image in `zimage_edit_pipeline.py`, which is copied beside its weights and imports diffusers alone. The other
families have no pipeline in diffusers that shows them the reference as it was trained: their transformer or adapter is written by itself.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmedit.pictures import InputError
from vlmedit.real.cache import DTYPE
from vlmedit.real.roles import AdapterRole

LORA_FILE = "pytorch_lora_weights.safetensors"
PIPELINES = {"FluxTransformer2DModel": "FluxKontextPipeline", "Flux2Transformer2DModel": "Flux2KleinPipeline", "ZImageTransformer2DModel": "ZImagePipeline"}
KINDS = ("full", "adapter")
ZIMAGE = Path(__file__).with_name("zimage_edit_pipeline.py")


def save_student(student: nn.Module, state: dict[str, Tensor], folder: Path) -> Path:
    """A trained student from its whole (gathered, perhaps averaged) state: a diffusers transformer, or its adapter in diffusers' own file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(student, AdapterRole):
        save_adapter(student, state, folder)
        return folder
    transformer = student.transformer
    with torch.device("meta"):
        shell = getattr(diffusers, transformer.config._class_name).from_config(transformer.config)
    shell.load_state_dict({k.removeprefix("transformer."): v.contiguous() for k, v in state.items()}, assign=True)
    shell.save_pretrained(folder)
    return folder


def save_adapter(student: AdapterRole, state: dict[str, Tensor], folder: Path) -> None:
    """`pytorch_lora_weights.safetensors` with the adapter's configuration in its metadata, for `load_lora_adapter`."""
    transformer = student.shared.transformer
    weights = get_peft_model_state_dict(transformer, state_dict=state, adapter_name=student.role)
    config = transformer.peft_config[student.role].to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / LORA_FILE, {"format": "pt", "lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True)})


def few_step_scheduler(shift: float, steps: int, omni: bool = False) -> FlowMatchEulerDiscreteScheduler:
    """The unroll's sampler as a scheduler: called with `num_inference_steps=steps` it takes the times shift(1), shift(1 - 1/steps), ..."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True, use_dynamic_shifting=False)
    scheduler.register_to_config(few_steps=steps, omni=omni)  # read by our own pipeline file; diffusers passes over them
    return scheduler


def read_run(run: Path) -> tuple[dict, Path]:
    """A finished real run's settings and its student. Raises InputError for anything else."""
    run = Path(run)
    config, model = run / "config.json", run / "model"
    if not config.is_file() or "backbone" not in (settings := json.loads(config.read_text())):
        raise InputError(f"{run}: not the folder of a run on real models; train one with vlmedit train npedit --config zimage_internvl")
    if not (model / "config.json").is_file() and not (model / LORA_FILE).is_file():
        raise InputError(f"{run}: no student in {model}; the run is not finished: repeat its command to resume it")
    return settings, model


def student_transformer(settings: dict, model: Path, dtype: torch.dtype) -> nn.Module:
    """The student as one transformer: the saved one, or the backbone with the adapter added into its weights."""
    from vlmedit.real.backbones import load_transformer

    if not (model / LORA_FILE).is_file():
        return load_transformer(model, **{DTYPE: dtype})
    transformer = load_transformer(settings["backbone"], "transformer", **{DTYPE: torch.float32})
    if any("lora_A" in k and v.ndim != 2 for k, v in load_file(model / LORA_FILE).items()):
        raise InputError(f"{model}: the adapter reaches a widened patch embedding, which diffusers' own class does not have; train with roles=modules and export that")
    transformer.load_lora_adapter(model, prefix=None, weight_name=LORA_FILE)
    transformer.fuse_lora()
    transformer.unload_lora()
    return nn.Module.to(transformer, dtype)


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
    place = settings["backbone"]
    name = diffusers.DiffusionPipeline.load_config(place)["transformer"][1]
    partial = out.with_name(f".{out.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    scheduler = few_step_scheduler(settings["sampler_shift"], settings["sampler_steps"], settings["omni"])
    if kind == "adapter":
        save_file({f"transformer.{k}": v for k, v in load_file(model / LORA_FILE).items()}, partial / LORA_FILE, {"format": "pt", **_adapter_note(model)})
        scheduler.save_pretrained(partial / "scheduler")
    elif name in PIPELINES:
        pipeline_class = getattr(diffusers, PIPELINES[name])
        transformer = student_transformer(settings, model, dtype)
        pipeline = pipeline_class.from_pretrained(place, transformer=transformer, scheduler=scheduler, **{DTYPE: dtype})
        pipeline.save_pretrained(partial)
    else:
        student_transformer(settings, model, dtype).save_pretrained(partial / "transformer")
        scheduler.save_pretrained(partial / "scheduler")
    if name == "ZImageTransformer2DModel":
        shutil.copy(ZIMAGE, partial / "pipeline.py")
    (partial / "README.md").write_text(card(settings, name, kind))
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return out


def _adapter_note(model: Path) -> dict[str, str]:
    """The adapter's configuration under the names that a whole pipeline's loader looks for."""
    from safetensors import safe_open

    with safe_open(model / LORA_FILE, "pt") as file:
        found = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in found.items()})} if found else {}


CALLS = {
    "FluxTransformer2DModel": 'pipe(image=image, prompt="make the dog red", num_inference_steps={steps}, guidance_scale=1.0, height=image.height, width=image.width, max_area=image.height * image.width, _auto_resize=False)',
    "Flux2Transformer2DModel": 'pipe(image=image, prompt="make the dog red", num_inference_steps={steps}, guidance_scale=1.0, height=image.height, width=image.width)',
    "ZImageTransformer2DModel": 'pipe(image, "make the dog red")',
}
LOADS = {
    "FluxTransformer2DModel": "FluxKontextPipeline.from_pretrained({place})",
    "Flux2Transformer2DModel": "Flux2KleinPipeline.from_pretrained({place})",
    "ZImageTransformer2DModel": "DiffusionPipeline.from_pretrained({place}, custom_pipeline={place}, trust_remote_code=True)",
}


def card(settings: dict, transformer: str, kind: str) -> str:
    """The model's card: what it is, how it is run, what it was trained with, what is not known of it."""
    base, steps, shift = settings["backbone"], settings["sampler_steps"], settings["sampler_shift"]
    head = ["---", *([f"base_model: {base}"] if base.count("/") == 1 and not Path(base).exists() else []), "library_name: diffusers", "pipeline_tag: image-to-image", "---"]
    lines = [*head, "", f"# A {steps}-step image editor without image pairs", ""]
    lines += [f"`{Path(base).name}`, taught to edit by instruction with NP-Edit (arXiv:2510.14978): no edited picture was seen in training, only references, instructions and captions. A vision-language judge and distribution matching to the base model were the teachers.", ""]
    if transformer in LOADS:
        place = '"THIS_FOLDER"' if kind == "full" else f'"{base}"'
        code = ["import torch", "from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler" if transformer.startswith("ZImage") else f"from diffusers import FlowMatchEulerDiscreteScheduler, {PIPELINES[transformer]}", "from diffusers.utils import load_image", ""]
        load = LOADS[transformer].format(place=place) if kind == "full" or not transformer.startswith("ZImage") else f'DiffusionPipeline.from_pretrained("{base}", custom_pipeline="THIS_FOLDER", trust_remote_code=True)'
        code += [f"pipe = {load}"]
        if kind == "adapter":
            code += ['pipe.load_lora_weights("THIS_FOLDER")', 'pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("THIS_FOLDER/scheduler")']
        code += ['image = load_image("dog.png").resize((512, 512))', f"edited = {CALLS[transformer].format(steps=steps)}.images[0]"]
        lines += ["```python", *code, "```", ""]
    else:
        lines += [f"diffusers has no pipeline that shows {transformer} a reference as it was trained; this folder holds its weights and its scheduler.", ""]
    name = lambda place: Path(place).name if Path(place).exists() else place
    told = {
        "base": name(base), "judge": ", ".join(map(name, settings["judge"])), "updates": settings["steps"], "pictures per update": f"{settings['batch']} x {settings['accumulate']} per process",
        "trained": f"LoRA, rank {settings['rank']}" if settings["roles"] == "adapters" else "all weights", "sampler": f"{steps} steps, shift {shift:g}, fresh noise between them",
        "weights of the losses": f"distribution matching {settings['dmd_weight']:g}, judge {settings['judge_weight']:g}", "guidance of the teacher": f"{settings['guidance']:g}, {settings['guidance_strong']:g} for {', '.join(settings['strong_types'])}",
    }  # fmt: skip
    lines += ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in told.items()), ""]
    lines += ["The license is the base model's; the judge's and the data's terms apply to their use. Measured quality: fill in from `vlmedit eval`. Known limits of the method: drift from the input, faces, spatial moves.", ""]
    return "\n".join(lines)


def push_to_hub(folder: str | Path, repository: str, private: bool = True) -> str:
    """Upload an exported folder to the Hub. Raises InputError without a network, without a login, or for a name that is none."""
    folder = Path(folder)
    if not (folder / "README.md").is_file():
        raise InputError(f"{folder}: not an exported folder (it has no README.md); export one first")
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository)
    except HFValidationError as error:
        raise InputError(f"{repository!r} is no name of a repository: write OWNER/NAME ({error})") from None
    except LocalTokenNotFoundError as error:
        raise InputError(f"{repository}: not logged in to the Hub; run hf auth login ({str(error).splitlines()[0]})") from None
    except (HfHubHTTPError, OSError, RuntimeError) as error:
        raise InputError(f"{repository}: the Hub cannot be reached or refuses ({str(error).splitlines()[0]}); {folder} is complete, push it again later") from None
    return f"https://huggingface.co/{repository}"
