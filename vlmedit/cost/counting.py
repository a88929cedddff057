"""What an update costs, before anything is loaded: parameters, bytes and FLOPs counted on the meta device, where tensors have shapes and no data.

A real configuration is built without its weights, called once with shapes alone, and everything autograd would keep for the backward
pass is added up; FLOPs are torch's own count. Attention counts as a fused kernel does it: queries, keys, values, output and one number per
row are kept, the scores are not.

Counted per role, with n the pictures in the batch. A forward costs F; its backward F for the input's gradient, and F more for the weights'
where they are trained (LoRA: next to nothing); checkpointing repeats the forward, F again.
Units: bytes and FLOPs (one multiply-add is 2). Configurations: the classes' defaults where they are the released model's, otherwise the
checkpoint's config.json, named beside it; of backbones they stand in the families' files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vlmedit.networks.backbones import families
from vlmedit.networks.judges import recompute

GB = 1e9


class _FusedAttention(torch.autograd.Function):
    """Attention that keeps what a fused kernel keeps. For counting only: it has no backward."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = (q @ k.transpose(-1, -2)) @ v
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


class _CountFused(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, k, v = args[:3] if len(args) >= 3 else (kwargs[name] for name in ("query", "key", "value"))
            groups = q.shape[-3] // k.shape[-3]
            return _FusedAttention.apply(q, k.repeat_interleave(groups, -3) if groups > 1 else k, v.repeat_interleave(groups, -3) if groups > 1 else v)
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Call:
    """One forward of a model, counted."""

    flops: float
    activations: int  # bytes kept for the backward pass
    recomputed: int  # bytes kept with checkpointing

    def scaled(self, n: float) -> Call:
        return Call(self.flops * n, round(self.activations * n), round(self.recomputed * n))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def kept(model: nn.Module, call: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of `call`, without the model's own weights."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    seen: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        seen[x.untyped_storage()._cdata] = x  # held, so that no storage is counted twice
        return x

    with saved_tensors_hooks(pack, lambda x: x), _CountFused():
        call()
    return sum(x.untyped_storage().nbytes() for key, x in seen.items() if key not in own)


def count(model: nn.Module, call: Callable[[], Tensor], checkpoint: Callable[[bool], None] | None = None) -> Call:
    """FLOPs of one forward and the bytes it keeps, without and with checkpointing (`checkpoint` turns it on and off)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _CountFused():
        call()
    full = kept(model, call)
    if checkpoint is None:
        return Call(counter.get_total_flops(), full, full)
    checkpoint(True)
    short = kept(model, call)
    checkpoint(False)
    return Call(counter.get_total_flops(), full, short)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return nn.Module.to(build(), torch.bfloat16)  # diffusers' own `to` would warn


def transformer_of(family: str) -> nn.Module:
    """The transformer of a backbone family at its published size, by the family's name."""
    return on_meta(families()[family].full.transformer)


def autoencoder_of(family: str) -> nn.Module:
    """The autoencoder of a backbone family at its published size."""
    return on_meta(families()[family].full.autoencoder)


def internvl3_14b() -> nn.Module:
    """The released recipe's judge: InternViT-300M and Qwen2.5-14B (config.json of OpenGVLab/InternVL3-14B-hf)."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    text = dict(model_type="qwen2", hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8, vocab_size=151674)
    return on_meta(lambda: InternVLForConditionalGeneration(InternVLConfig(text_config={**text, "tie_word_embeddings": False}, tie_word_embeddings=False)))


def llava_onevision_7b() -> nn.Module:
    """The paper's judge: SigLIP-so400m and Qwen2-7B (config.json of llava-hf/llava-onevision-qwen2-7b-ov-hf)."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    vision = dict(
        model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16, image_size=384, patch_size=14,
        vision_use_head=False,
    )  # fmt: skip
    text = dict(model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152000)
    config = lambda: LlavaOnevisionConfig(vision_config=vision, text_config={**text, "tie_word_embeddings": False}, tie_word_embeddings=False)
    return on_meta(lambda: LlavaOnevisionForConditionalGeneration(config()))


def qwen2_5_vl_7b() -> nn.Module:
    """Qwen2.5-VL-7B (config.json of Qwen/Qwen2.5-VL-7B-Instruct)."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584, patch_size=14)
    text = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064)
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}, "tie_word_embeddings": False}
    return on_meta(lambda: Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)))


def qwen3_vl_8b() -> nn.Module:
    """Qwen3-VL-8B: the class's default tower before Qwen3-8B's layers (config.json of Qwen/Qwen3-VL-8B-Instruct; the class's own default
    language model is another size)."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936)
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_theta": 5e6}}
    return on_meta(lambda: Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config={"out_hidden_size": 4096}, text_config=text, tie_word_embeddings=False)))


def qwen3_4b() -> nn.Module:
    """The released recipe's text encoder: Qwen3-4B without its head (config.json of Qwen/Qwen3-4B)."""
    from transformers import Qwen3Config, Qwen3Model

    config = dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936)
    return on_meta(lambda: Qwen3Model(Qwen3Config(**config)))


JUDGES = {"InternVL3-14B": internvl3_14b, "LLaVA-OneVision-7B": llava_onevision_7b, "Qwen2.5-VL-7B": qwen2_5_vl_7b, "Qwen3-VL-8B": qwen3_vl_8b}


def shapes(*size: int) -> Tensor:
    """A tensor of that size without data, in bf16, that asks for a gradient."""
    return torch.empty(*size, device="meta", dtype=torch.bfloat16, requires_grad=True)


def decoder_call(model: nn.Module, side: int = 512) -> Call:
    """One picture of `side` pixels decoded."""
    model.requires_grad_(False)
    latents = shapes(1, 16, side // 8, side // 8)
    switch = lambda on: model.enable_gradient_checkpointing() if on else model.disable_gradient_checkpointing()
    return count(model, lambda: model.decode(latents).sample, switch)


def language_call(model: nn.Module, length: int = 700, rows: int = 2) -> Call:
    """`rows` questions of `length` tokens through a judge's language model, up to the states (the head is two rows)."""
    language = model.model.language_model
    x, place = shapes(rows, length, language.config.hidden_size), torch.arange(length, device="meta").expand(rows, -1)
    causal = {"full_attention": None}  # causal without a mask tensor; counted in full, a kernel skips the upper half

    def switch(on: bool):
        language.train(on)
        recompute(language, on)

    language.requires_grad_(False).eval()
    return count(language, lambda: language(inputs_embeds=x, position_ids=place, attention_mask=causal, use_cache=False).last_hidden_state, switch)


def vision_call(model: nn.Module, pictures: int = 1) -> Call:
    """`pictures` through a judge's vision tower and projector, at its own size; classes with one fixed size."""
    inner, vision = model.model, model.config.vision_config
    side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    tower = inner.vision_tower.requires_grad_(False).eval()
    x = shapes(pictures, 3, side, side)

    def switch(on: bool):
        tower.train(on)
        recompute(tower, on)

    return count(tower, lambda: tower(pixel_values=x).last_hidden_state, switch)


@dataclass(frozen=True)
class Sizes:
    """Parameters of the parts of an update."""

    backbone: int
    judge: int
    rest: int = 0  # text encoder and autoencoder, where they stay loaded
    adapter: int = 0  # one LoRA adapter


def standing(sizes: Sizes, roles: str = "modules", weight: int = 2, gradient: int = 2, moments: int = 4) -> dict[str, int]:
    """Bytes that stand whatever the pictures: weights, gradients and AdamW's two moments, each in bytes per parameter.

    Three modules: student, fake score and teacher are a backbone each, two of them trained. Adapters: one backbone, two adapters,
    and those alone are trained. Raises ValueError for other roles.
    """
    if roles not in ("modules", "adapters"):
        raise ValueError(f"roles is {roles!r}; known: modules, adapters")
    trained = 2 * (sizes.backbone if roles == "modules" else sizes.adapter)
    backbones = 3 * sizes.backbone if roles == "modules" else sizes.backbone + trained
    return {"backbone weights": weight * backbones, "judge and encoders": weight * (sizes.judge + sizes.rest), "gradients": gradient * trained, "moments": moments * trained}


def lora_size(transformer: nn.Module, rank: int, targets: list[str]) -> int:
    """Parameters of one LoRA adapter: rank times (inputs + outputs) of each target; a convolution's inputs are its kernel's."""
    found = dict(transformer.named_modules())
    ends = lambda m: m.weight[0].numel() + m.weight.shape[0]
    return sum(rank * ends(found[name]) for name in targets)


def update_flops(with_reference: float, without: float, judge: float, decoder: float, roles: str = "modules", fake_updates: int = 5, calls: float = 1.75, checkpointing: bool = True, fresh: bool = True) -> dict[str, float]:
    """FLOPs of one update per picture, from one forward each. `calls`: network calls of an unroll on average (released: 1.75);
    `fresh`: every fake-score update unrolls anew, as released; guidance doubles the teacher."""
    again = 1 if checkpointing else 0
    trained = 3 if roles == "modules" else 2  # forward, input gradient, weight gradient
    return {
        "student": calls * with_reference * (trained + again),
        "fake score": fake_updates * ((calls * with_reference if fresh else 0) + without * (trained + again)),
        "DMD scores": 3 * without,
        "decoder": decoder * (2 + again),
        "judge": judge * (2 + again),
    }


def update_activations(student: Call, decoder: Call, judge: Call, pictures: int = 1, calls: int = 2, checkpointing: bool = True) -> dict[str, int]:
    """Bytes that the graphs of one student update hold at once: its calls wait while decoder and judge send their gradient back.
    The block under recomputation comes on top."""
    held = lambda call: pictures * (call.recomputed if checkpointing else call.activations)
    return {"student's calls": calls * held(student), "decoder": held(decoder), "judge's activations": held(judge)}
