"""A whole real run in miniature on disk: pipeline, judge and data of a few thousand random weights, made where a setting says "tiny:NAME".

    backbone: tiny:z-image    judge: tiny:internvl    data: tiny:shapes

The pipeline is the family's own, text encoder and tokenizer included, so that nothing of a real run is left out but size. The data are
drawn scenes in several aspect ratios with requests in plain words. `vlmedit train npedit --config tiny` runs it on a CPU.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from PIL import Image

from vlmedit.data import EDIT_SHARES, rng_for, sample_example
from vlmedit.pictures import InputError
from vlmedit.real import tiny
from vlmedit.real.requests import from_example
from vlmedit.world.render import render

PREFIX = "tiny:"
KINDS = {"recolor": "color", "texture": "material", "move": "action", "nothing": "other"}  # edits of drawn scenes under real data's names
ROWS = 12
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_z_image(folder: Path) -> Path:
    """`ZImagePipeline` with a Qwen3 of two layers."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tiny.save_backbone("z-image", folder)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    config = Qwen3Config(
        hidden_size=tiny.WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8, vocab_size=400, max_position_embeddings=1024
    )
    torch.manual_seed(1)
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0), vae=AutoencoderKL.from_pretrained(folder / "vae"), text_encoder=Qwen3Model(config),
        tokenizer=tokenizer, transformer=ZImageTransformer2DModel.from_pretrained(folder / "transformer"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_flux_kontext(folder: Path) -> Path:
    """`FluxKontextPipeline` with a CLIP and a T5 of a layer or two."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tiny.save_backbone("flux", folder)
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = 77
    torch.manual_seed(1)
    clip = CLIPTextConfig(
        hidden_size=tiny.WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=400, projection_dim=tiny.WIDTH,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    t5 = T5Config(d_model=tiny.WIDTH, d_ff=32, d_kv=8, num_layers=1, num_heads=2, vocab_size=400)
    FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=AutoencoderKL.from_pretrained(folder / "vae"), text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer, text_encoder_2=T5EncoderModel(t5), tokenizer_2=tiny.tokenizer(), transformer=FluxTransformer2DModel.from_pretrained(folder / "transformer"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


PIPELINES = {"z-image": save_z_image, "flux": save_flux_kontext}


def save_data(folder: Path, rows: int = ROWS, seed: int = 0) -> Path:
    """A manifest of drawn scenes, some of them wide or tall."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(rows):
        example = sample_example(rng_for("tiny", seed, i), EDIT_SHARES)
        request = from_example(example)
        pixels = ((render([example.scene], 64)[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
        size = [(64, 64), (96, 48), (48, 96)][i % 3]
        Image.fromarray(pixels).resize(size).save(folder / f"{i:03d}.png")
        words = dict(type=KINDS.get(request.type, request.type), object=request.thing, target_caption=request.target_caption, caption=request.reference_caption)
        lines.append(json.dumps({"image": f"{i:03d}.png", "instruction": request.instruction, **words}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


def made(place: str, folder: Path, what: str) -> str:
    """The place itself; of "tiny:NAME" a folder below `folder`, made unless it is there. `what`: backbone, judge or data."""
    if not place.startswith(PREFIX):
        return place
    name = place.removeprefix(PREFIX)
    known = {"backbone": (*PIPELINES, *tiny.BACKBONES), "judge": tuple(tiny.JUDGES), "data": ("shapes",)}[what]
    if name not in known:
        raise InputError(f"{what} is {place!r}; tiny ones: {', '.join(dict.fromkeys(known))}")
    target = Path(folder) / what / name
    result = target / "train.jsonl" if what == "data" else target
    if not target.is_dir():
        partial = target.with_name(f".{name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if what == "data":
            save_data(partial)
        elif what == "judge":
            tiny.save_judge(name, partial)
        elif name in PIPELINES:
            PIPELINES[name](partial)
        else:
            tiny.save_backbone(name, partial)
        partial.rename(target)
    return str(result)
