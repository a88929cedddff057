"""Model cards: the README.md beside a checkpoint that says how it was made, what it reached and where it ends.

`write_card(folder, facts)` takes a dict with every key of `KEYS`; the front matter is the Hub's, so `ModelCard.load` reads it. `card` is that of
an exported editor, with a program that runs it, in which THIS_FOLDER stands for its folder.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData

from vlmedit.networks.backbones import family_of
from vlmedit.networks.backbones._base import Family
from vlmedit.pipelines.standalone import NAME as CODE

TEXT_LENGTH = 512  # tokens that diffusers' own pipelines encode by default

KEYS = {
    "title": "one line, such as 'shapes: no-pair editor'",
    "summary": "what the model does, one or two sentences",
    "command": "what regenerates the checkpoint from nothing",
    "config": "the stage's configuration, a dict or dataclass",
    "seed": "of the run",
    "device": "such as '2 CPU cores'",
    "cpu_minutes": "CPU-minutes spent, 0 when trained on a GPU",
    "gpu_minutes": "GPU-minutes spent, 0 when trained on a CPU",
    "metrics": "name -> value, measured and not quoted",
    "license": "SPDX identifier in lower case, such as 'mit'",
    "intended_use": "a sentence",
    "limits": "a list of sentences",
}


def _table(head: tuple[str, str], rows: Mapping) -> str:
    cell = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {cell(k)} | {cell(v)} |" for k, v in rows.items())])


def write_card(folder: str | Path, facts: Mapping, library: str = "diffusers") -> Path:
    """Write `folder/README.md` whole or not at all. Raises ValueError for missing, empty or unknown facts."""
    missing = [k for k in KEYS if facts.get(k) is None or facts[k] in ("", [], {}, ())]
    unknown = [k for k in facts if k not in KEYS]
    if missing or unknown:
        problems = [f"missing {k!r} ({KEYS[k]})" for k in missing] + [f"unknown {k!r}" for k in unknown]
        raise ValueError(f"a model card needs {', '.join(KEYS)}: {'; '.join(problems)}")
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder {folder} to put a model card in; save the checkpoint first")
    config = dataclasses.asdict(facts["config"]) if dataclasses.is_dataclass(facts["config"]) else facts["config"]
    limits = [facts["limits"]] if isinstance(facts["limits"], str) else facts["limits"]
    made = {"seed": facts["seed"], "device": facts["device"], "CPU-minutes": facts["cpu_minutes"], "GPU-minutes": facts["gpu_minutes"]}
    data = ModelCardData(license=facts["license"], library_name=library, tags=["image-editing", "vlmedit"])
    text = f"""---
{data.to_yaml()}
---

# {facts["title"]}

{facts["summary"]}

## How it was made

```
{facts["command"]}
```

{_table(("", ""), made)}

{_table(("setting", "value"), config)}

## What it reached

{_table(("metric", "value"), facts["metrics"])}

## Intended use

{facts["intended_use"]}

## Limits

{chr(10).join(f"- {line}" for line in limits)}

License: {facts["license"]}.
"""
    path, partial = folder / "README.md", folder / "README.md.partial"
    ModelCard(text, ignore_metadata_errors=False).save(partial)
    os.replace(partial, path)
    return path


# an exported editor's


def base_of(settings: dict) -> str:
    """The backbone's folder as it is found from anywhere, or its id."""
    base = settings["backbone"]
    return str(Path(base).resolve()) if Path(base).exists() else base


def program_of(settings: dict, family: Family, kind: str, dtype: torch.dtype) -> list[str]:
    """The card's program, in which THIS_FOLDER stands for the exported one. It names the precision: without it transformers would load the
    text encoder as it was saved and diffusers the rest in float32, and the two do not mix."""
    steps, length = settings["sampler_steps"], settings["text_length"]
    if family.adapter is None:
        call = f'edited = pipe(Image.open("drawing.png"), "remove the circle", num_inference_steps={steps}).images[0]'
        return ["import vlmedit", "from PIL import Image", "", 'pipe = vlmedit.load("THIS_FOLDER")', call]
    stock = family.stock.name if family.stock else None
    names = sorted([stock or "DiffusionPipeline", *(["FlowMatchEulerDiscreteScheduler"] if kind == "adapter" else [])])
    place = "THIS_FOLDER" if kind == "full" else base_of(settings)
    code = f', custom_pipeline="THIS_FOLDER/{CODE}"' if kind == "adapter" else ""
    trust = "" if stock else f"{code}, trust_remote_code=True"
    lines = ["import torch", f"from diffusers import {', '.join(names)}", "from diffusers.utils import load_image", ""]
    lines += [f'pipe = {stock or "DiffusionPipeline"}.from_pretrained("{place}"{trust}, torch_dtype={dtype})']
    if kind == "adapter":
        lines += ['pipe.load_lora_weights("THIS_FOLDER")']
        lines += ['pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("THIS_FOLDER/scheduler")']
    lines += ['pipe.to("cuda" if torch.cuda.is_available() else "cpu")']
    call = 'image, "make the dog red"'
    if stock:
        call = f'image=image, prompt="make the dog red", num_inference_steps={steps}, guidance_scale=1.0, height=image.height, width=image.width'
        call += f", {family.stock.code}" if family.stock.code else ""
        call += f", max_sequence_length={length}" if length != TEXT_LENGTH else ""
    return [*lines, f'image = load_image("dog.png").resize({largest(settings)})', f"edited = pipe({call}).images[0]"]


def largest(settings: dict) -> tuple[int, int]:
    """Width and height of the largest pictures of the training, of equal ones the first."""
    from vlmedit.training.settings import bucket_of

    return max((bucket_of(text) for text in settings["buckets"]), key=lambda size: size[0] * size[1])


def card(settings: dict, transformer: str, kind: str, dtype: torch.dtype = torch.bfloat16) -> str:
    """An exported editor's card: what it is, how it is run, what it was trained with, what is not known of it."""
    family = family_of(transformer)
    base, steps, shift, warmup = settings["backbone"], settings["sampler_steps"], settings["sampler_shift"], "text_dropout" in settings
    head = ["---", *([f"base_model: {base}"] if base.count("/") == 1 and not Path(base).exists() else []), "library_name: diffusers", "pipeline_tag: image-to-image", "---"]
    if warmup:
        lines = [*head, "", "# A copy warm-up", "", f"`{Path(base).name}`, taught to give back its reference: the first stage of NP-Edit (arXiv:2510.14978), which does not edit yet.", ""]
    else:
        lines = [*head, "", f"# A {steps}-step image editor without image pairs", ""]
        lines += [f"`{Path(base).name}`, taught to edit by instruction with NP-Edit (arXiv:2510.14978): no edited picture was seen in training, only references, instructions and captions. A vision-language judge and distribution matching to the base model were the teachers.", ""]
    lines += ["```python", *program_of(settings, family, kind, dtype), "```", ""]
    own = family.adapter is None
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
