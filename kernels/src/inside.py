"""The fused operations inside the package's own update, for as long as one asks: what `papers/performance.py --kernels` measures.

    with kernels.use("dmd_step", "vlm_patches"):     # or all: kernels.use()
        ...                                          # updates of vlmedit.methods.npedit and vlmedit.training.real_models

| name          | stands in for                                                                                               |
|---------------|-------------------------------------------------------------------------------------------------------------|
| `dmd_step`    | the objective `dmd` after its network calls: guidance (real models' own is per request, and stays outside), |
|               | two x0 predictions, normalizer, gradient, loss                                                              |
| `guided_step` | the unroll's x0 and re-noising between two calls (the last x0 stays as it is)                               |
| `answer_loss` | `two_row_margin` of the real judges                                                                         |
| `vlm_patches` | the picture's preparation for Qwen-VL, InternVL and PaliGemma                                               |
| `norm_rope`   | norm and rotation of queries and keys in Z-Image's attention                                                |
| `gated_rms`   | the residual after attention and the norm before the feed-forward, in Z-Image's blocks and in Qwen2's layers |
|               | (the language model of InternVL3 and LLaVA-OneVision); the other half stands across two blocks and stays    |

Off by default: none has earned its place yet. The numbers are those of the plain update up to rounding, drawn from the same stream. Which path an
operation takes is still `backend`'s choice. The block must be entered before the update; trainers made earlier are served too, except blocks that
torch.compile has seen by then. Not covered: `gated_adaln`, and the other families' attention, whose code is diffusers'.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from types import SimpleNamespace

import torch
from torch import Tensor
from vlmedit.kernels.answer import answer_loss
from vlmedit.kernels.dmd import dmd_step
from vlmedit.kernels.patches import vlm_patches
from vlmedit.kernels.residual import gated_rms
from vlmedit.kernels.rope import norm_rope
from vlmedit.kernels.sampler import guided_step

from vlmedit.flow import interpolate, to_x0


@contextmanager
def _swapped(owner: object, name: str, value: Callable) -> Iterator[None]:
    put = object.__setattr__ if is_dataclass(owner) and not isinstance(owner, type) else setattr  # an objective is frozen for everybody else
    before = getattr(owner, name)
    put(owner, name, value)
    try:
        yield
    finally:
        put(owner, name, before)


def _dmd() -> list[tuple[object, str, Callable]]:
    from vlmedit.equations import matching as objectives
    from vlmedit.equations.dmd import guided_velocity

    def loss(x: Tensor, s: objectives.MatchingContext) -> Tensor:
        with torch.no_grad():  # both scores are constants of the student's loss
            x_t = interpolate(x, s.eps, s.t)
            if isinstance(s.guidance, Tensor):  # a scale per row: guided before the kernel, which takes one
                cond, uncond, scale = guided_velocity(s.teacher, x_t, s.t, s.text, s.guidance), None, 1.0
            else:
                cond, scale = s.teacher(x_t, s.t, s.text), s.guidance
                uncond = s.teacher(x_t, s.t, torch.zeros_like(s.text)) if scale != 1 else None
            scores = (v if v is None else v.to(x.dtype) for v in (cond, uncond, s.fake(x_t, s.t, s.text)))
        return dmd_step(x, s.eps, s.t, *scores, scale, s.norm)[0]

    return [(objectives.OBJECTIVES["dmd"], "loss", loss)]  # the very object that trainers hold


def _step() -> list[tuple[object, str, Callable]]:
    from vlmedit.methods import npedit

    plain = npedit.rollout

    def rollout(velocity, noise: Tensor, times, renoise: str = "fresh", gradient_calls: int | None = None) -> Tensor:
        if renoise not in ("fresh", "same") or (gradient_calls is not None and gradient_calls < 1):
            return plain(velocity, noise, times, renoise, gradient_calls)  # which says what is wrong
        x, at = noise, lambda t: torch.full((len(noise),), t, device=noise.device, dtype=torch.float32)
        for i, t in enumerate(times):
            with torch.set_grad_enabled(torch.is_grad_enabled() and (gradient_calls is None or i >= len(times) - gradient_calls)):
                v = velocity(x, at(t).to(x.dtype))
                if i + 1 == len(times):
                    return to_x0(x, v, t)
                dtype = torch.promote_types(x.dtype, v.dtype)
                fresh = noise if renoise == "same" else torch.randn_like(noise)
                x = guided_step(x.to(dtype), v.to(dtype), None, fresh.to(dtype), at(t), at(times[i + 1]))
        return x

    return [(npedit, "rollout", rollout)]


def _answer() -> list[tuple[object, str, Callable]]:
    from vlmedit.networks import judges

    plain = judges.two_row_margin

    def margin(states: Tensor, lengths: Tensor, weight: Tensor, yes: int, no: int, cap: float | None = None) -> Tensor:
        if type(weight) not in (Tensor, torch.nn.Parameter) or weight.requires_grad or weight.dtype != states.dtype:
            return plain(states, lengths, weight, yes, no, cap)  # a shard, a quantized head
        return answer_loss(states, weight, lengths - 1, torch.ones(len(states), device=states.device), yes, no, 1.0, cap)[1]

    return [(judges, "two_row_margin", margin)]


def _patches() -> list[tuple[object, str, Callable]]:
    from vlmedit.networks import judges

    def qwen(self, picture: Tensor) -> Tensor:
        patch, merge, frames = (self.setting(k) for k in ("patch_size", "merge_size", "temporal_patch_size"))
        return vlm_patches(picture.float()[None], self.mean.flatten(), self.std.flatten(), tuple(self.size(picture)), patch, merge, frames)[0]

    def square(self, picture: Tensor) -> Tensor:
        size = self.setting("size")
        return vlm_patches(picture.float()[None], self.mean.flatten(), self.std.flatten(), (size["height"], size["width"]))[0]

    return [(judges.QwenVL, "prepare", qwen), (judges.InternVL, "prepare", square), (judges.PaliGemma, "prepare", square)]


def _rope() -> list[tuple[object, str, Callable]]:
    from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor as Attention

    plain = Attention.__call__

    def attend(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, freqs_cis=None):
        if freqs_cis is None or attn.norm_q is None or attn.norm_k is None:
            return plain(self, attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)
        tables = freqs_cis.real.contiguous(), freqs_cis.imag.contiguous()  # for queries and keys
        turned = lambda norm: lambda x: norm_rope(x.transpose(1, 2), norm.weight, *tables, norm.eps, True).transpose(1, 2)
        names = ("to_q", "to_k", "to_v", "to_out", "heads")
        view = SimpleNamespace(norm_q=turned(attn.norm_q), norm_k=turned(attn.norm_k), **{name: getattr(attn, name) for name in names})
        return plain(self, view, hidden_states, encoder_hidden_states, attention_mask)  # which then has nothing left to turn

    return [(Attention, "__call__", attend)]


def _residual() -> list[tuple[object, str, Callable]]:
    from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock as Block
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer as Layer

    plain = Block.forward

    def together(x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, branch.dtype)
        return x.to(dtype), branch.to(dtype)

    def block(self, x, attn_mask, freqs_cis, adaln_input=None, noise_mask=None, *more, **named):
        if not self.modulation or noise_mask is not None:  # modulated token by token
            return plain(self, x, attn_mask, freqs_cis, adaln_input, noise_mask, *more, **named)
        scale_msa, gate_msa, scale_mlp, gate_mlp = self.adaLN_modulation(adaln_input).chunk(4, dim=1)
        out = self.attention(self.attention_norm1(x) * (1 + scale_msa).unsqueeze(1), attention_mask=attn_mask, freqs_cis=freqs_cis)
        gate, factor = together(gate_msa.tanh() * self.attention_norm2.weight, (1 + scale_mlp) * self.ffn_norm1.weight)
        x, h = gated_rms(*together(x, out), gate, factor, self.ffn_norm1.eps)
        return x + gate_mlp.tanh().unsqueeze(1) * self.ffn_norm2(self.feed_forward(h))

    def layer(self, hidden_states, **named):
        out, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **named)
        norm = self.post_attention_layernorm
        y, h = gated_rms(*together(hidden_states, out), None, norm.weight.expand(len(out), -1), norm.variance_epsilon, normed=False)
        return y + self.mlp(h)

    return [(Block, "forward", block), (Layer, "forward", layer)]


SWAPS = {"dmd_step": _dmd, "guided_step": _step, "answer_loss": _answer, "vlm_patches": _patches, "norm_rope": _rope, "gated_rms": _residual}


@contextmanager
def use(*names: str) -> Iterator[None]:
    """Swap the package's own steps for the named operations (all of `SWAPS` without a name) within the block. Raises ValueError for another
    name."""
    if unknown := set(names) - SWAPS.keys():
        raise ValueError(f"no step of an update is served by {', '.join(sorted(unknown))}; known: {', '.join(SWAPS)}")
    with ExitStack() as stack:
        for name in names or SWAPS:
            for swap in SWAPS[name]():
                stack.enter_context(_swapped(*swap))
        yield
