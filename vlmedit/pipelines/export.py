"""Out of a run: a diffusers pipeline that edits in a few steps without this package installed, its card, and the way to the Hub.

    export(run, out)                  a whole pipeline: the backbone's own parts, the student as its transformer, the few-step scheduler
    export(run, out, kind="adapter")  the LoRA alone, the scheduler beside it

The sampler is diffusers' `FlowMatchEulerDiscreteScheduler` with `stochastic_sampling` and a static shift: at 4 steps it takes the times of
the unroll and re-noises as the unroll does, so the pipeline's pictures are our sampler's. FLUX.1-Kontext and FLUX.2 klein run in diffusers'
own pipeline classes. The other families have none that shows them the reference as it was trained; they run in `few_step_edit_pipeline.py`,
which is copied beside the weights and imports torch and diffusers alone. `editor.json` says what the folder is, for `vlmedit edit`. The suite's own
transformer becomes its own pipeline, which `vlmedit.load` reads without such a file.
"""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmedit.errors import InputError
from vlmedit.io import check_space, save_json
from vlmedit.networks.dit import DiT
from vlmedit.networks.hub import reachable
from vlmedit.networks.lora import AdapterRole
from vlmedit.networks.prompt_cache import DTYPE
from vlmedit.pipelines.shapes import EditPipeline

LORA_FILE = "pytorch_lora_weights.safetensors"
PIPELINES = {"FluxTransformer2DModel": "FluxKontextPipeline", "Flux2Transformer2DModel": "Flux2KleinPipeline"}  # of diffusers; the others run in CODE
KINDS = ("full", "adapter")
CODE = Path(__file__).with_name("few_step_edit_pipeline.py")
ABOUT = "editor.json"  # what an exported folder is
TEXT_LENGTH = 512  # tokens that diffusers' own pipelines encode by default
HUB_ERRORS = (*HfHubHTTPError.__bases__, RuntimeError)  # its HTTP client's errors, whichever client its version has, and OSError


@contextmanager
def written() -> Iterator[None]:
    """A full disk as safetensors tells it, in Python's own words."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error)) from error


def save_student(student: nn.Module, state: dict[str, Tensor], folder: Path) -> Path:
    """A trained student from its whole (gathered, perhaps averaged) state: a diffusers transformer, or its adapter in diffusers' own file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(student, AdapterRole):
        with written():
            save_adapter(student, state, folder)
        return folder
    transformer = student.transformer
    with torch.device("meta"):
        shell = getattr(diffusers, transformer.config._class_name).from_config(transformer.config)
    shell.load_state_dict({k.removeprefix("transformer."): v.contiguous() for k, v in state.items()}, assign=True)
    with written():
        shell.save_pretrained(folder)
    return folder


def save_adapter(student: AdapterRole, state: dict[str, Tensor], folder: Path) -> None:
    """`pytorch_lora_weights.safetensors` with the adapter's configuration in its metadata, for `load_lora_adapter`."""
    transformer = student.shared.transformer
    weights = get_peft_model_state_dict(transformer, state_dict=state, adapter_name=student.role)
    config = transformer.peft_config[student.role].to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / LORA_FILE, {"format": "pt", "lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True)})


def few_step_scheduler(shift: float, steps: int, omni: bool = False, text_length: int = TEXT_LENGTH) -> FlowMatchEulerDiscreteScheduler:
    """The unroll's sampler as a scheduler: called with `num_inference_steps=steps` it takes the times shift(1), shift(1 - 1/steps), ..."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True, use_dynamic_shifting=False)
    scheduler.register_to_config(few_steps=steps, omni=omni, text_length=text_length)  # read by our own pipeline file; diffusers passes over them
    return scheduler


def read_run(run: Path) -> tuple[dict, Path]:
    """A finished real run's settings and its student. Raises InputError for anything else."""
    from vlmedit.networks.load import complete, parsed, torn

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
    from vlmedit.networks.backbones import load_transformer, widen

    if not (model / LORA_FILE).is_file():
        return load_transformer(model, **{DTYPE: dtype})
    transformer = load_transformer(settings["backbone"], "transformer", **{DTYPE: torch.float32})
    transformer = widen(transformer) if reaches_entry(model) else transformer
    transformer.load_lora_adapter(model, prefix=None, weight_name=LORA_FILE)
    transformer.fuse_lora()
    transformer.unload_lora()
    return nn.Module.to(transformer, dtype)


def reaches_entry(model: Path) -> bool:
    """Whether an adapter reaches a patch embedding that was widened for the reference (SD3, Sana)."""
    return any("lora_A" in k and v.ndim != 2 for k, v in load_file(model / LORA_FILE).items())


def pipeline_class(transformer: str) -> type[diffusers.DiffusionPipeline]:
    """The class in which an exported transformer runs."""
    if transformer in PIPELINES:
        return getattr(diffusers, PIPELINES[transformer])
    if transformer == DiT.__name__:
        return EditPipeline
    from vlmedit.pipelines.few_step_edit import FewStepEditPipeline

    return FewStepEditPipeline


def check_classes(settings: dict) -> None:
    """Raise `InputError` for a run on classes that came with the backbone as code: what is exported runs in diffusers' own."""
    from vlmedit.networks.load import own_code

    if settings.get("trust_remote_code") and (own := own_code(settings["backbone"])):
        raise InputError(f"{settings['backbone']} brings code of its own ({', '.join(own)}), which diffusers' own classes do not have; a run on it is not exported")


def base_class(settings: dict) -> str:
    """The class of the backbone's transformer. Raises `InputError` where the backbone is gone, half there, or comes as code."""
    from vlmedit.networks.load import check_backbone, read_json

    place = settings["backbone"]
    if problems := check_backbone(place, trust=settings.get("trust_remote_code", False)):
        raise InputError([f"the run's {p}" for p in problems])
    check_classes(settings)
    return read_json(place, "transformer/config.json")["_class_name"]


def about(settings: dict, transformer: str, kind: str) -> dict:
    """What `vlmedit edit` has to know of an exported folder. `pixels`: the most that a picture of the training had."""
    from vlmedit.training.settings import bucket_of

    base = settings["backbone"]
    place = str(Path(base).resolve()) if Path(base).exists() else base
    sizes = [bucket_of(text) for text in settings["buckets"]]
    return {
        "kind": kind, "transformer": transformer, **({"base": place} if kind == "adapter" else {}), "steps": settings["sampler_steps"],
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
    place, name = settings["backbone"], base_class(settings)
    own = name == DiT.__name__
    if own and kind == "adapter":
        raise InputError(f"{run}: the suite's own pipeline takes no adapter; export it with --kind full")
    dtype = torch.float32 if own else dtype  # megabytes, and run on CPUs
    check_space(out, dtype.itemsize * weights_in(Path(place).glob("*/*.safetensors")) if kind == "full" else 4 * weights_in(model.glob("*.safetensors")))
    partial = out.with_name(f".{out.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with written():
            write_parts(settings, model, name, kind, dtype, partial)
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


def write_parts(settings: dict, model: Path, name: str, kind: str, dtype: torch.dtype, folder: Path) -> None:
    """Everything that an exported folder holds."""
    own, place = name == DiT.__name__, settings["backbone"]
    scheduler = few_step_scheduler(settings["sampler_shift"], settings["sampler_steps"], settings["omni"], settings["text_length"])
    if kind == "adapter":
        save_file({f"transformer.{k}": v for k, v in load_file(model / LORA_FILE).items()}, folder / LORA_FILE, {"format": "pt", **_adapter_note(model)})
        scheduler.save_pretrained(folder / "scheduler")
    else:
        transformer = student_transformer(settings, model, dtype)
        pipeline_class(name).from_pretrained(place, transformer=transformer, scheduler=scheduler, **{DTYPE: dtype}).save_pretrained(folder)
    if name not in PIPELINES and not own:
        shutil.copy(CODE, folder / CODE.name)
        if kind == "full":  # so that diffusers finds the class in the file
            index = folder / "model_index.json"
            save_json({**json.loads(index.read_text()), "_class_name": [CODE.stem, "FewStepEditPipeline"]}, index)
    (folder / "README.md").write_text(card(settings, name, kind, dtype))
    if not own:
        save_json(about(settings, name, kind), folder / ABOUT)


def _adapter_note(model: Path) -> dict[str, str]:
    """The adapter's configuration under the names that a whole pipeline's loader looks for."""
    with safe_open(model / LORA_FILE, "pt") as file:
        found = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in found.items()})} if found else {}


CALLS = {
    "FluxTransformer2DModel": 'image=image, prompt="make the dog red", num_inference_steps={steps}, guidance_scale=1.0, height=image.height, width=image.width, max_area=image.height * image.width, _auto_resize=False',
    "Flux2Transformer2DModel": 'image=image, prompt="make the dog red", num_inference_steps={steps}, guidance_scale=1.0, height=image.height, width=image.width',
}


def code_of(settings: dict, transformer: str, kind: str, dtype: torch.dtype) -> list[str]:
    """The card's program, in which THIS_FOLDER stands for the exported one. It names the precision: without it transformers would load the
    text encoder as it was saved and diffusers the rest in float32, and the two do not mix."""
    steps, length = settings["sampler_steps"], settings["text_length"]
    if transformer == DiT.__name__:
        return ["import vlmedit", "from PIL import Image", "", 'pipe = vlmedit.load("THIS_FOLDER")', f'edited = pipe(Image.open("drawing.png"), "remove the circle", num_inference_steps={steps}).images[0]']
    stock = PIPELINES.get(transformer)
    names = sorted([stock or "DiffusionPipeline", *(["FlowMatchEulerDiscreteScheduler"] if kind == "adapter" else [])])
    place = "THIS_FOLDER" if kind == "full" else about(settings, transformer, kind)["base"]
    code = f', custom_pipeline="THIS_FOLDER/{CODE.name}"' if kind == "adapter" else ""
    trust = "" if stock else f"{code}, trust_remote_code=True"
    lines = ["import torch", f"from diffusers import {', '.join(names)}", "from diffusers.utils import load_image", ""]
    lines += [f'pipe = {stock or "DiffusionPipeline"}.from_pretrained("{place}"{trust}, torch_dtype={dtype})']
    if kind == "adapter":
        lines += ['pipe.load_lora_weights("THIS_FOLDER")', 'pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("THIS_FOLDER/scheduler")']
    lines += ['pipe.to("cuda" if torch.cuda.is_available() else "cpu")']
    call = CALLS[transformer].format(steps=steps) + (f", max_sequence_length={length}" if length != TEXT_LENGTH else "") if stock else 'image, "make the dog red"'
    return [*lines, f'image = load_image("dog.png").resize({largest(settings)})', f"edited = pipe({call}).images[0]"]


def largest(settings: dict) -> tuple[int, int]:
    """Width and height of the largest pictures of the training, of equal ones the first."""
    from vlmedit.training.settings import bucket_of

    return max((bucket_of(text) for text in settings["buckets"]), key=lambda size: size[0] * size[1])


def card(settings: dict, transformer: str, kind: str, dtype: torch.dtype = torch.bfloat16) -> str:
    """The model's card: what it is, how it is run, what it was trained with, what is not known of it."""
    base, steps, shift, warmup = settings["backbone"], settings["sampler_steps"], settings["sampler_shift"], "text_dropout" in settings
    head = ["---", *([f"base_model: {base}"] if base.count("/") == 1 and not Path(base).exists() else []), "library_name: diffusers", "pipeline_tag: image-to-image", "---"]
    if warmup:
        lines = [*head, "", "# A copy warm-up", "", f"`{Path(base).name}`, taught to give back its reference: the first stage of NP-Edit (arXiv:2510.14978), which does not edit yet.", ""]
    else:
        lines = [*head, "", f"# A {steps}-step image editor without image pairs", ""]
        lines += [f"`{Path(base).name}`, taught to edit by instruction with NP-Edit (arXiv:2510.14978): no edited picture was seen in training, only references, instructions and captions. A vision-language judge and distribution matching to the base model were the teachers.", ""]
    lines += ["```python", *code_of(settings, transformer, kind, dtype), "```", ""]
    own = transformer == DiT.__name__
    example, how = ("drawing.png \"remove the circle\"", "vlmedit eval --checkpoint THIS_FOLDER") if own else ("dog.png \"make the dog red\"", "vlmedit bench")
    lines += [f"Or, for any size of picture and whole folders: `vlmedit edit {example} --model THIS_FOLDER --out edited.png`.", ""]
    name = lambda place: Path(place).name if Path(place).exists() else place
    told = {
        "base": name(base), "updates": settings["steps"], "pictures per update": f"{settings['batch']} x {settings['accumulate']} per process",
        "trained": f"LoRA, rank {settings['rank']}" if settings["roles"] == "adapters" else "all weights", "sampler": f"{steps} steps, shift {shift:g}, fresh noise between them",
    }  # fmt: skip
    if not warmup:
        told |= {
            "judge": ", ".join(map(name, settings["judge"])), "weights of the losses": f"distribution matching {settings['dmd_weight']:g}, judge {settings['judge_weight']:g}",
            "guidance of the teacher": f"{settings['guidance']:g}, {settings['guidance_strong']:g} for {', '.join(settings['strong_types'])}",
        }  # fmt: skip
    lines += ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in told.items()), ""]
    lines += ["The license is the base model's; the judge's and the data's terms apply to their use. Measured quality: fill in from `" + how + "`. Known limits of the method: drift from the input, faces, spatial moves.", ""]
    return "\n".join(lines)


def hub_card(text: str, repository: str) -> str:
    """The card as it reads on the Hub: its program fetches the folder by the repository's name."""
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    code = re.sub(r'"THIS_FOLDER(/[^"]*)"', r'f"{folder}\1"', program).replace('"THIS_FOLDER"', "folder")
    last = next(line for line in reversed(code.splitlines()) if line.startswith(("import ", "from ")))
    code = code.replace(f"{last}\n", f'{last}\nfrom huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{repository}")\n', 1).replace(")\n\npipe", ")\npipe", 1)
    return text.replace(program, code).replace("THIS_FOLDER", repository)


def read_about(folder: Path) -> dict:
    """What `export` noted about a folder; nothing of the suite's own pipeline. Raises InputError for any other folder."""
    from vlmedit.networks.load import parsed

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
