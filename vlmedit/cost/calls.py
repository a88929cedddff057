"""The networks of a run on the meta device, where weights have shapes and no data, and what one call of each costs.

Every model is built from its config.json. Where that cannot be reached, its published configuration stands in if this package knows it. Parts
that cannot be called without data are estimated by 2 FLOPs per weight and token, and say so. Units: bytes; FLOPs, a multiply-add is 2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import diffusers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

from vlmedit.cost import counting
from vlmedit.cost.counting import Call
from vlmedit.errors import InputError
from vlmedit.networks import judges
from vlmedit.networks.backbones import families, family_of
from vlmedit.networks.backbones._base import Published
from vlmedit.networks.checks import reachable, read_json
from vlmedit.networks.codec import AutoencoderCodec, PixelCodec
from vlmedit.networks.judge import JudgeModel
from vlmedit.networks.judges import recompute
from vlmedit.networks.load import backbone_of
from vlmedit.networks.prompts import PromptEmbeddings, Text

PUBLISHED = {  # judges: class defaults and configurations of counting.py, for ids whose files cannot be reached
    "OpenGVLab/InternVL3-14B-hf": counting.internvl3_14b, "llava-hf/llava-onevision-qwen2-7b-ov-hf": counting.llava_onevision_7b,
    "Qwen/Qwen2.5-VL-7B-Instruct": counting.qwen2_5_vl_7b, "Qwen/Qwen3-VL-8B-Instruct": counting.qwen3_vl_8b,
}  # fmt: skip
WORDS = 128  # tokens of a prompt and of a question's words


def published(place: str) -> Published | None:
    """A backbone's published size, by its id."""
    return next((f.full for f in families().values() if f.full and place in f.full.places), None)


def unknown(what: str, place: str, error: Exception | None) -> InputError:
    return InputError(f"{what}: {place}: no configuration to count with ({error or 'no config.json'}); give its folder, or a network")


def config_at(place: str, file: str) -> tuple[dict | None, Exception | None]:
    """A configuration, or why there is none."""
    try:
        return read_json(place, file), None
    except InputError as error:
        return None, error


@lru_cache(maxsize=8)
def meta_transformer(place: str) -> tuple[nn.Module, str]:
    """The transformer on the meta device, and a note where its configuration is not the place's own."""
    config, error = config_at(place, "transformer/config.json")
    if config is None:
        if (known := published(place)) is None:
            raise unknown("backbone", place, error)
        return counting.on_meta(known.transformer), "published configuration"
    family = family_of(config["_class_name"])
    if family.widened and config["in_channels"] == (config.get("out_channels") or config["in_channels"]):
        config = {**config, "in_channels": 2 * config["in_channels"], "out_channels": config["in_channels"]}  # as `widen` makes it
    return counting.on_meta(lambda: family.model_class().from_config(config)), ""


@lru_cache(maxsize=8)
def meta_codec(place: str) -> tuple[AutoencoderCodec | PixelCodec, str]:
    """The autoencoder on the meta device, and a note where its configuration is not the place's own."""
    if family_of(type(meta_transformer(place)[0]).__name__).pixels:
        return PixelCodec(), "none: it works on pixels"
    config, _ = config_at(place, "vae/config.json")
    if config is None:
        if (known := published(place)) is None:
            raise InputError(f"backbone: {place} has no vae/config.json; give the folder or the id of a diffusers pipeline")
        return AutoencoderCodec(counting.on_meta(known.autoencoder)), known.note
    return AutoencoderCodec(counting.on_meta(lambda: getattr(diffusers, config["_class_name"]).from_config(config))), ""


@lru_cache(maxsize=8)
def meta_judge(place: str) -> tuple[nn.Module, str]:
    """The judge on the meta device, and a note where its configuration is not the place's own."""
    config, error = config_at(place, "config.json")
    if config is None:
        if place not in PUBLISHED:
            raise unknown("judge", place, error)
        return PUBLISHED[place](), "published configuration"
    if (name := (config.get("architectures") or ["a model without architectures"])[0]) not in judges.FAMILIES:
        raise InputError(f"judge: {place}: no adapter for {name}; known: {', '.join(judges.FAMILIES)}")
    full = AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=not reachable())
    return counting.on_meta(lambda: AutoModelForImageTextToText.from_config(full)), ""


def shapes(*size: int) -> Tensor:
    """A tensor of that size without data, in bf16."""
    return torch.empty(*size, device="meta", dtype=torch.bfloat16)


class _Words(Text):
    """Prompts as shapes: all of one length."""

    def rows(self) -> list[Tensor]:
        return list(self.states)


def switch(model: nn.Module) -> Callable[[bool], None]:
    """Turns recomputation on and off."""
    return lambda on: model.enable_gradient_checkpointing() if on else model.disable_gradient_checkpointing()


@lru_cache(maxsize=8)
def backbone_call(transformer: nn.Module, latent: tuple[int, int], reference: bool) -> Call:
    """One picture through the backbone, with and without its reference."""
    adapter, config = family_of(type(transformer).__name__).adapter, transformer.config
    if adapter is None:  # the words are encoded within
        backbone, text = transformer, torch.zeros(1, config.text_length, dtype=torch.long, device="meta")
    else:
        width, pooled = adapter.text_width(config), adapter.pooled_width(config)
        backbone = backbone_of(transformer, PromptEmbeddings([torch.zeros(1, width)], [torch.zeros(pooled)] if pooled else None))
        mask = torch.ones(1, WORDS, dtype=torch.bool, device="meta")
        text = _Words(shapes(1, WORDS, width), mask, shapes(1, pooled) if pooled else None)
    x = shapes(1, backbone.channels, *latent)
    known = shapes(1, backbone.channels, *latent) if reference else None
    return counting.count(transformer, lambda: backbone(x, shapes(1), text, known), switch(transformer))


@lru_cache(maxsize=8)
def decoder_call(codec: AutoencoderCodec, latent: tuple[int, int]) -> Call:
    """One picture decoded, for its gradient with respect to the latents."""
    if isinstance(codec, PixelCodec):
        return Call(0.0, 0, 0)
    latents, autoencoder = shapes(1, codec.channels, *latent).requires_grad_(), codec.autoencoder
    recompute = switch(autoencoder) if autoencoder._supports_gradient_checkpointing else None
    return counting.count(autoencoder, lambda: codec.decode(latents), recompute)


@lru_cache(maxsize=8)
def encoder_flops(codec: AutoencoderCodec, size: tuple[int, int]) -> float:
    """One picture encoded, without a graph."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        codec.encode(shapes(1, 3, *size))
    return counter.get_total_flops()


def estimated(model: nn.Module, tokens: int, width: int, layers: int) -> Call:
    """2 FLOPs per weight and token; 16 activations of a layer's width per token, one with recomputation."""
    return Call(2.0 * counting.parameters(model) * tokens, 2 * 16 * tokens * width * layers, 2 * tokens * width * layers)


@lru_cache(maxsize=8)
def judge_calls(model: nn.Module, place: str, picture: tuple[int, int]) -> tuple[Call, Call, list[str]]:
    """One picture through the vision tower and two questions of it through the language model."""
    name, notes = type(model).__name__, []
    family = judges.FAMILIES[name]
    judge = family.__new__(family)
    nn.Module.__init__(judge)
    judge.config, judge.model = model.config, model
    if family is judges.Shapes:
        return *shape_judge_calls(model), notes
    try:
        judge.settings = judges.preprocessor_settings(place)
    except (OSError, FileNotFoundError):
        side = getattr(model.config.vision_config, "image_size", 448)
        patch = getattr(model.config.vision_config, "patch_size", 14)
        side, patch = (v if isinstance(v, int) else v[0] for v in (side, patch))
        judge.settings = {"size": {"height": side, "width": side, "shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}, "patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    with torch.device("meta"):
        judge.mean, judge.std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    shown = torch.empty(3, picture[1], picture[0], device="meta", requires_grad=True)
    try:
        seen = judge.tokens(shown)
    except (ValueError, KeyError, AttributeError, TypeError):
        seen, _ = 512, notes.append("512 tokens per picture assumed")
    model.requires_grad_(False)
    inner = model.model
    language = inner.language_model if hasattr(inner, "language_model") else inner.text_model
    tower = nn.ModuleList([m for n, m in inner.named_children() if m is not language])

    def switch(on: bool):
        model.train(on)
        recompute(model, on)

    try:
        vision = counting.count(tower, lambda: torch.cat([f.pooler_output.flatten() for f in judge.encode([shown])]), switch)
    except Exception:  # reads data, which shapes do not have
        config = model.config.vision_config
        layers = next((getattr(config, k) for k in ("num_hidden_layers", "depth") if hasattr(config, k)), 24)
        vision, _ = estimated(tower, 4 * seen, config.hidden_size, layers), notes.append("vision tower estimated")
    length = 2 * seen + WORDS
    try:
        words = counting.language_call(model, length, 2)
    except Exception:
        config = language.config
        words, _ = estimated(language, 2 * length, config.hidden_size, config.num_hidden_layers), notes.append("language model estimated")
    return vision, words, notes


def shape_judge_calls(model: JudgeModel) -> tuple[Call, Call]:
    """The same of the suite's own judge: a pair through its vision layers, two questions through its text layers."""
    model.requires_grad_(False)
    side, length = model.config.side, model.config.text_length

    def switch(on: bool):
        model.train(on)
        recompute(model, on)

    pair = shapes(1, 2, 3, side, side).requires_grad_()
    seen = shapes(2, (side // 4) ** 2, model.config.width).requires_grad_()
    ids = torch.zeros(2, length, dtype=torch.long, device="meta")
    return counting.count(model, lambda: model.get_image_features(pair), switch), counting.count(model, lambda: model.hidden(ids, seen), switch)
