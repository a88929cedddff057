"""A whole real run in miniature on disk: pipeline, judge and data of a few thousand random weights, made where a setting says "tiny:NAME".

    backbone: tiny:z-image    judge: tiny:internvl    data: tiny:shapes

or the suite's own trained models, so that the trainer of real models can be seen to teach:

    backbone: tiny:shapes     judge: tiny:shapes      data: tiny:squares     start: tiny:shapes (the warm-up's student)

The pipeline is the family's own, text encoder and tokenizer included, so that nothing of a real run is left out but size. The data are
drawn scenes in several aspect ratios with requests in plain words. `vlmedit train npedit --config tiny` runs it on a CPU.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from vlmedit.data.world import EDIT_SHARES, FULFILLABLE_TYPES, as_fulfilled, from_example, references, sample_example
from vlmedit.errors import InputError
from vlmedit.io import to_image
from vlmedit.pipelines.shapes import assemble, checkpoint
from vlmedit.seeds import rng_for
from vlmedit.testing import random_models as tiny
from vlmedit.world.render import render

PREFIX = "tiny:"
KINDS = {"recolor": "color", "texture": "material", "move": "action", "nothing": "other"}  # edits of drawn scenes under real data's names
ROWS, SQUARES = 12, 2000
SETTLED = 0.2  # of the squares: requests that are fulfilled already [NPEditConfig.settled]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_z_image(folder: Path) -> Path:
    """`ZImagePipeline` with a Qwen3 of two layers."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tiny.save_backbone("z-image", folder)
    config = Qwen3Config(
        hidden_size=tiny.WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8, vocab_size=400, max_position_embeddings=1024
    )
    torch.manual_seed(1)
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0), vae=AutoencoderKL.from_pretrained(folder / "vae"), text_encoder=Qwen3Model(config),
        tokenizer=_chatting(), transformer=ZImageTransformer2DModel.from_pretrained(folder / "transformer"),
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


def save_flux2_klein(folder: Path) -> Path:
    """`Flux2KleinPipeline`; its prompts are three of a Qwen3's layers side by side, the deepest the 27th, so there are as many."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tiny.save_backbone("flux2", folder)
    torch.manual_seed(1)
    config = Qwen3Config(
        hidden_size=tiny.WIDTH, intermediate_size=16, num_hidden_layers=28, num_attention_heads=2, num_key_value_heads=2, head_dim=8, vocab_size=400, max_position_embeddings=1024
    )
    transformer = tiny.awaken(Flux2Transformer2DModel.from_config({**tiny.flux2().config, "joint_attention_dim": 3 * tiny.WIDTH}))
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=AutoencoderKLFlux2.from_pretrained(folder / "vae"), text_encoder=Qwen3ForCausalLM(config),
        tokenizer=_chatting(), transformer=transformer, is_distilled=True,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_qwen_image_edit(folder: Path) -> Path:
    """`QwenImageEditPipeline` with a Qwen2.5-VL of two layers; the processor that shows it pictures is left out, because words alone are encoded."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageEditPipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    tiny.save_backbone("qwen-image", folder)
    torch.manual_seed(1)
    config = tiny.qwen2_5_vl()[0].config
    config.text_config.update({"hidden_size": tiny.WIDTH, "head_dim": 4})
    config.vision_config.out_hidden_size = tiny.WIDTH
    config.text_config.rope_parameters["mrope_section"] = [1, 1, 0]
    QwenImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=AutoencoderKLQwenImage.from_pretrained(folder / "vae"), processor=None,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config), tokenizer=_chatting(), transformer=QwenImageTransformer2DModel.from_pretrained(folder / "transformer"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_sd3(folder: Path) -> Path:
    """`StableDiffusion3Pipeline` with two CLIPs and a T5 of one layer."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    tiny.save_backbone("sd3", folder)
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = 77
    torch.manual_seed(1)
    half = tiny.WIDTH // 2
    clip = CLIPTextConfig(
        hidden_size=half, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=400, projection_dim=half, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    t5 = T5Config(d_model=tiny.WIDTH, d_ff=32, d_kv=8, num_layers=1, num_heads=2, vocab_size=400)
    StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=AutoencoderKL.from_pretrained(folder / "vae"), text_encoder=CLIPTextModelWithProjection(clip),
        tokenizer=tokenizer, text_encoder_2=CLIPTextModelWithProjection(clip), tokenizer_2=tokenizer, text_encoder_3=T5EncoderModel(t5), tokenizer_3=tiny.tokenizer(),
        transformer=SD3Transformer2DModel.from_pretrained(folder / "transformer"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_sana(folder: Path) -> Path:
    """`SanaPipeline` with a Gemma 2 of one layer."""
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    tiny.save_backbone("sana", folder)
    torch.manual_seed(1)
    config = Gemma2Config(
        hidden_size=tiny.WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, vocab_size=400
    )
    SanaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=AutoencoderDC.from_pretrained(folder / "vae"), text_encoder=Gemma2Model(config), tokenizer=tiny.tokenizer(),
        transformer=SanaTransformer2DModel.from_pretrained(folder / "transformer"),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _chatting():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_shapes(folder: Path) -> Path:
    """The suite's own pipeline: its trained teacher and its tokenizer."""
    assemble(checkpoint("shapes", "teacher"), None).save_pretrained(folder)
    return folder


PIPELINES = {
    "z-image": save_z_image, "flux": save_flux_kontext, "flux2": save_flux2_klein, "qwen-image": save_qwen_image_edit, "sd3": save_sd3, "sana": save_sana,
    "shapes": save_shapes,
}  # fmt: skip


def save_data(folder: Path, rows: int = ROWS, seed: int = 0) -> Path:
    """A manifest of drawn scenes, some of them wide or tall."""
    lines = []
    for i in range(rows):
        example = sample_example(rng_for("tiny", seed, i), EDIT_SHARES)
        request = from_example(example)
        size = [(64, 64), (96, 48), (48, 96)][i % 3]
        to_image(render([example.scene], 64)[0]).resize(size).save(folder / f"{i:03d}.png")
        words = dict(type=KINDS.get(request.type, request.type), object=request.thing, target_caption=request.target_caption, caption=request.reference_caption)
        lines.append(json.dumps({"image": f"{i:03d}.png", "instruction": request.instruction, **words}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


def save_squares(folder: Path, rows: int = SQUARES, seed: int = 0) -> Path:
    """A manifest of the requests that the miniature trains on, their pictures as it draws them: 32 x 32, some through JPEG."""
    rng = rng_for("squares", seed)
    examples = [sample_example(rng, EDIT_SHARES) for _ in range(rows)]
    examples = [as_fulfilled(e, rng) if e.edit.type in FULFILLABLE_TYPES and rng.random() < SETTLED else e for e in examples]
    lines = []
    for i, (example, picture) in enumerate(zip(examples, references(examples, 32, rng))):
        request = from_example(example)
        to_image(picture).save(folder / f"{i:05d}.png")
        words = dict(type=request.type, object=request.thing, target_caption=request.target_caption, caption=request.reference_caption)
        lines.append(json.dumps({"image": f"{i:05d}.png", "instruction": request.instruction, **words}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


DATA = {"shapes": save_data, "squares": save_squares}
OWN = {"judge": "judge", "start": "warm"}  # shipped checkpoints that are complete as they are


def made(place: str, folder: Path, what: str) -> str:
    """The place itself; of "tiny:NAME" a folder below `folder`, made unless it is there. `what`: backbone, judge, data or start.
    Raises `InputError` for a name that is not known."""
    if not place.startswith(PREFIX):
        return place
    name = place.removeprefix(PREFIX)
    known = {"backbone": (*PIPELINES, *tiny.BACKBONES), "judge": (*tiny.JUDGES, "shapes"), "data": tuple(DATA), "start": ("shapes",)}[what]
    if name not in known:
        raise InputError(f"{what} is {place!r}; tiny ones: {', '.join(dict.fromkeys(known))}")
    if what in OWN and name == "shapes":
        return str(checkpoint("shapes", OWN[what]))
    target = Path(folder) / what / name
    result = target / "train.jsonl" if what == "data" else target
    if not target.is_dir():
        partial = target.with_name(f".{name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if what == "data":
            DATA[name](partial)
        elif what == "judge":
            tiny.save_judge(name, partial)
        elif name in PIPELINES:
            PIPELINES[name](partial)
        else:
            tiny.save_backbone(name, partial)
        partial.rename(target)
    return str(result)
