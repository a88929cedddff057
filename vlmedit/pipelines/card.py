"""Model cards: the README.md beside a checkpoint that says how it was made, what it reached and where it ends.

`write_card(folder, facts)` takes a dict with every key of `KEYS`; the front matter is the Hub's, so `ModelCard.load` reads it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

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
