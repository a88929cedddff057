"""Real classes with a few thousand random weights, written to disk as checkpoints are: for tests, notebooks and dry runs without a network.

What is small here is width and depth alone; class, packing, positions, conventions and file layout are the real ones. A backbone family says
in its own file what its tiny model is.
"""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch
from diffusers import AutoModel, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from vlmedit.networks.backbones import families, family_of
from vlmedit.networks.backbones._base import Tiny
from vlmedit.networks.codec import AutoencoderCodec
from vlmedit.networks.load import backbone_of, load_transformer, widen
from vlmedit.networks.prompts import PromptEmbeddings
from vlmedit.protocols import Backbone

WIDTH = 16  # of the prompts' states
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# backbones


@torch.no_grad()
def awaken(model: nn.Module) -> nn.Module:
    """Give zero-initialized weights small random values: a fresh adaLN, gate or pad token would hide what a test looks for."""
    for p in model.parameters():
        if not p.any() or not p.isfinite().all():
            nn.init.normal_(p, std=0.02)
    return model


def backbones() -> dict[str, Tiny]:
    """The families that have a tiny model, by name."""
    return {name: family.tiny for name, family in families().items() if family.tiny}


def save_backbone(name: str, folder: str | Path, seed: int = 0, width: int = WIDTH) -> Path:
    """Write `folder/transformer`, for prompts of that width, and `folder/vae` of a tiny backbone. Raises KeyError for an unknown one."""
    if name not in (known := backbones()):
        raise KeyError(f"no tiny backbone {name!r}; known: {', '.join(known)}")
    torch.manual_seed(seed)
    awaken(known[name].transformer(width)).save_pretrained(Path(folder) / "transformer")
    known[name].autoencoder().save_pretrained(Path(folder) / "vae")
    return Path(folder)


def save_pipeline(name: str, folder: str | Path) -> Path:
    """Write a whole tiny pipeline, of the family's own class, with text encoders and tokenizers."""
    tiny = backbones()[name]
    save_backbone(name, folder, width=tiny.width)
    parts = dict(transformer=load_transformer(folder, "transformer"), vae=AutoModel.from_pretrained(str(folder), subfolder="vae"))
    torch.manual_seed(1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=tiny.shift)
    getattr(diffusers, tiny.pipeline)(scheduler=scheduler, **parts, **tiny.words(speaking)).save_pretrained(folder)
    return Path(folder)


def speaking(chat: bool = False, length: int | None = None) -> PreTrainedTokenizerFast:
    """A text encoder's tokenizer: of an assistant, if it is to `chat`; with a context of `length` tokens."""
    found = tokenizer()
    if chat:
        found.chat_template = TEMPLATE
    if length:
        found.model_max_length = length
    return found


def random_prompts(count: int, pooled: bool = True, lengths: tuple[int, ...] = (7,), seed: int = 0, width: int = WIDTH) -> PromptEmbeddings:
    """Prompts of random states, in place of a text encoder's."""
    g = torch.Generator().manual_seed(seed)
    states = [torch.randn(lengths[i % len(lengths)], width, generator=g) for i in range(count)]
    return PromptEmbeddings(states, [torch.randn(width, generator=g) for _ in states] if pooled else None)


def load_backbone(folder: str | Path, prompts: int = 16, checkpointing: bool = False) -> tuple[Backbone, AutoencoderCodec]:
    """A saved tiny backbone and its codec, loaded as a large one is, widened for the reference where the family is."""
    transformer = load_transformer(folder, "transformer")
    family = family_of(type(transformer).__name__)
    adapter, config = family.adapter, transformer.config
    lengths = (7, 5, 9) if adapter.masked else (7,)
    texts = random_prompts(prompts, adapter.pooled_width(config) is not None, lengths, width=adapter.text_width(config))
    transformer = widen(transformer) if family.widened else transformer
    return backbone_of(transformer, texts, checkpointing), AutoencoderCodec.from_pretrained(Path(folder) / "vae")


# judges

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<image>", "<video>",
    "<img>", "</img>", "<IMG_CONTEXT>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<bos>",
)  # fmt: skip


def tokenizer(answers: tuple[str, ...] = ("Yes", "No")) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as the large judges', with the special tokens of all families; `answers` become single tokens,
    with a space before them and in small letters too."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    spoken = [word for a in answers for word in (a, a.lower())]
    core.train_from_iterator([f"{word} {word}" for word in spoken] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>", bos_token="<bos>")


TEXT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=400, max_position_embeddings=1024,
)  # fmt: skip
CLIP = dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])


def _id(token: str) -> int:
    return SPECIAL.index(token)


def qwen2_5_vl() -> tuple[PreTrainedModel, dict]:
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32, patch_size=4, spatial_merge_size=2, temporal_patch_size=2,
        window_size=16, fullatt_block_indexes=[1],
    )  # fmt: skip
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}, "tie_word_embeddings": False}
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=_id("<|image_pad|>"), video_token_id=_id("<|video_pad|>"),
        vision_start_token_id=_id("<|vision_start|>"), vision_end_token_id=_id("<|vision_end|>"),
    )  # fmt: skip
    settings = dict(
        image_processor_type="Qwen2VLImageProcessor", size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48}, patch_size=4, merge_size=2, temporal_patch_size=2, **CLIP
    )
    return Qwen2_5_VLForConditionalGeneration(config), settings


def qwen3_vl() -> tuple[PreTrainedModel, dict]:
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32, patch_size=4, spatial_merge_size=2, temporal_patch_size=2,
        num_position_embeddings=64, deepstack_visual_indexes=[0],
    )  # fmt: skip
    text = {**TEXT, "head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True, "rope_theta": 10000.0}}
    config = Qwen3VLConfig(
        vision_config=vision, text_config=text, image_token_id=_id("<|image_pad|>"), video_token_id=_id("<|video_pad|>"),
        vision_start_token_id=_id("<|vision_start|>"), vision_end_token_id=_id("<|vision_end|>"),
    )  # fmt: skip
    settings = dict(
        image_processor_type="Qwen2VLImageProcessor", size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48}, patch_size=4, merge_size=2, temporal_patch_size=2,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config), settings


def llava_onevision() -> tuple[PreTrainedModel, dict]:
    vision = dict(
        model_type="siglip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        vision_use_head=False,
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config={**TEXT, "model_type": "qwen2"}, image_token_index=_id("<image>"), video_token_index=_id("<video>"),
        image_token_id=_id("<image>"), video_token_id=_id("<video>"), vision_feature_select_strategy="full", vision_feature_layer=-1,
        image_grid_pinpoints=[[32, 32], [32, 64], [64, 32]],
    )  # fmt: skip
    settings = dict(
        image_processor_type="LlavaOnevisionImageProcessor", size={"height": 32, "width": 32}, image_grid_pinpoints=[[32, 32], [32, 64], [64, 32]],
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config), settings


def internvl() -> tuple[PreTrainedModel, dict]:
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=[32, 32], patch_size=[8, 8])
    config = InternVLConfig(vision_config=vision, text_config={**TEXT, "model_type": "qwen2"}, image_token_id=_id("<IMG_CONTEXT>"), image_seq_length=4)
    settings = dict(
        image_processor_type="GotOcr2ImageProcessor", size={"height": 32, "width": 32}, crop_to_patches=False,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    return InternVLForConditionalGeneration(config), settings


def smolvlm() -> tuple[PreTrainedModel, dict]:
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    config = SmolVLMConfig(vision_config=vision, text_config={**TEXT, "model_type": "llama", "pad_token_id": 0}, image_token_id=_id("<image>"), scale_factor=2)
    settings = dict(
        image_processor_type="SmolVLMImageProcessor", size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False, resample=1,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    return SmolVLMForConditionalGeneration(config), settings


def paligemma2() -> tuple[PreTrainedModel, dict]:
    vision = dict(
        model_type="siglip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        vision_use_head=False,
    )  # fmt: skip
    text = {**TEXT, "model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 512}
    config = PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=_id("<image>"), projection_dim=32, hidden_size=32)
    settings = dict(image_processor_type="SiglipImageProcessor", size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_seq_length=16)
    return PaliGemmaForConditionalGeneration(config), settings


JUDGES = {"qwen2.5-vl": qwen2_5_vl, "llava-onevision": llava_onevision, "qwen3-vl": qwen3_vl, "internvl": internvl, "smolvlm": smolvlm, "paligemma2": paligemma2}


def save_judge(name: str, folder: str | Path, seed: int = 0, answers: tuple[str, ...] = ("Yes", "No")) -> Path:
    """Write a tiny judge with tokenizer and preprocessor settings. Raises KeyError for an unknown one."""
    if name not in JUDGES:
        raise KeyError(f"no tiny judge {name!r}; known: {', '.join(JUDGES)}")
    torch.manual_seed(seed)
    model, settings = JUDGES[name]()
    folder = Path(folder)
    with torch.no_grad():  # louder than a fresh model, so that questions and pixels matter visibly
        for p in awaken(model).parameters():
            if p.ndim > 1:
                p.mul_(5)
    model.save_pretrained(folder)
    tokenizer(answers).save_pretrained(folder)
    common = dict(do_resize=True, do_rescale=True, do_normalize=True, rescale_factor=1 / 255, resample=3)
    (folder / "preprocessor_config.json").write_text(json.dumps({**common, **settings}, indent=2))
    return folder


def save_encoder(name: str, folder: str | Path, seed: int = 0) -> Path:
    """Write a tiny picture encoder for the metrics, "clip" or "dino" (the class of facebook/dino-vits16). Raises KeyError for another."""
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    torch.manual_seed(seed)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    vision = dict(image_size=32, patch_size=8, **size)
    text = dict(vocab_size=400, max_position_embeddings=77, eos_token_id=2, **size)
    builds = {"clip": lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)), "dino": lambda: ViTModel(ViTConfig(**vision), add_pooling_layer=False)}
    model = builds[name]()
    with torch.no_grad():  # louder, so that pictures and texts differ visibly
        for p in awaken(model).parameters():
            if p.ndim > 1:
                p.mul_(5)
    model.save_pretrained(folder)
    settings = dict(do_resize=True, do_rescale=True, do_normalize=True, rescale_factor=1 / 255, resample=3)
    if name == "clip":
        tokenizer().save_pretrained(folder)
        settings |= dict(image_processor_type="CLIPImageProcessor", size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_center_crop=True, **CLIP)
    else:
        settings |= dict(image_processor_type="ViTImageProcessor", size={"height": 32, "width": 32}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))
    return Path(folder)
