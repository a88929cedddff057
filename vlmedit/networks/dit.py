"""A small diffusion transformer with reference tokens: teacher, fake score and student are three sets of its weights.

Velocity v(x_t, t, text, reference) of a rectified flow [conventions: flow.py]; it is a `vlmedit.protocols.Backbone` as it stands. The reference's tokens join the keys and
values of every block at the same 2-D rotary positions as the target's, as in FLUX.1-Kontext or Qwen-Image-Edit
(token concatenation, arXiv:2510.14978 Sec. 3). By default the reference is modulated as clean data (t = 0) and attends
to itself and the text alone, so its keys and values do not depend on the noisy target: they are computed once per edit and
reused by every call of the unroll and the sampler (`ref_fixed_timestep` and `kv_cache` of FLUX.2). `reference_time="noisy"`
modulates it with the target's t instead, and the cache is then rebuilt per call.

Shapes: x, reference (B, C, H, W) in [-1, 1]; t (B,) in [0, 1]; text ids (B, L).
Deviates from a plain DiT: 3x3 depthwise convolution inside the FFN (SANA's Mix-FFN), convolutional stem and head,
x0-prediction turned into v (both measured in papers/log.md), adaLN shared over blocks (PixArt).
"""

from __future__ import annotations

import math

import diffusers
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

from vlmedit import flow
from vlmedit.networks.prompts import Words
from vlmedit.networks.text import TextEncoder

Cache = list[tuple[Tensor, Tensor]]  # per block: keys and values of the reference, (B, heads, N, head_dim)
MIN_TIME = 0.05  # below it, x0 -> v would divide by almost nothing


def rotary_table(side: int, head_dim: int) -> Tensor:
    """cos and sin (2, side * side, head_dim / 2) of a 2-D rotary embedding: half the pairs turn with y, half with x."""
    pairs = head_dim // 4
    freq = torch.pi / 2 * side * torch.logspace(0, math.log10(1 / side), pairs) / side
    axis = torch.arange(side, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    angle = torch.cat((y.reshape(-1, 1) * freq, x.reshape(-1, 1) * freq), 1)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Apply the rotary embedding to (B, heads, N, head_dim)."""
    a, b = x.chunk(2, -1)
    cos, sin = table.to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def time_features(t: Tensor, width: int) -> Tensor:
    """Sinusoidal features (B, width) of t in [0, 1]."""
    freq = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angle = 1000 * t.float()[:, None] * freq
    return torch.cat((angle.cos(), angle.sin()), 1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention. On a CPU the plain formula: at these sizes torch's fused backward takes three times as long."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v


class MixFFN(nn.Module):
    """Pointwise up, depthwise 3x3 over the token grid, gate, pointwise down."""

    def __init__(self, width: int, hidden: int, side: int):
        super().__init__()
        self.side = side
        self.up = nn.Linear(width, 2 * hidden)
        self.mix = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.up(x)).transpose(1, 2).unflatten(2, (self.side, self.side))
        value, gate = self.mix(x).flatten(2).transpose(1, 2).chunk(2, -1)
        return self.down(value * F.silu(gate))


class Block(nn.Module):
    """Attention over target, reference and text, then Mix-FFN, both modulated by time."""

    def __init__(self, width: int, heads: int, hidden: int, side: int):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Parameter(torch.randn(6, width) / width**0.5)  # this block's offset to the shared adaLN
        self.qkv = nn.Linear(width, 3 * width)
        self.text_kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.ffn = MixFFN(width, hidden, side)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, text: Tensor, modulation: Tensor, rope: Tensor, cached: tuple[Tensor, Tensor] | None, last: bool = False):
        """x (B, N, d), text (B, L, d), modulation (B, 6, d) -> new x and this stream's own (keys, values).
        A reference's `last` block ends at its keys and values: nobody reads its new x."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (modulation + self.modulation).unsqueeze(2).unbind(1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale_a) + shift_a
        q, k, v = (self.split(part) for part in self.qkv(h).chunk(3, -1))
        k = rotate(self.k_norm(k), rope)
        if last:
            return x, (k, v)
        text_k, text_v = (self.split(part) for part in self.text_kv(text).chunk(2, -1))
        q, text_k = rotate(self.q_norm(q), rope), self.k_norm(text_k)
        keys, values = [k, text_k], [v, text_v]
        if cached is not None:
            keys.append(cached[0])
            values.append(cached[1])
        keys, values = torch.cat([p.to(v.dtype) for p in keys], 2), torch.cat([p.to(v.dtype) for p in values], 2)
        mixed = attend(q.to(v.dtype), keys, values).transpose(1, 2).flatten(2)
        x = x + gate_a * self.out(mixed)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale_f) + shift_f
        return x + gate_f * self.ffn(h), (k, v)


class DiT(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The velocity network. `from_pretrained` and `save_pretrained` are diffusers' own."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(
        self,
        side: int = 32,
        channels: int = 3,
        patch: int = 4,
        width: int = 128,
        depth: int = 6,
        heads: int = 4,
        ffn_ratio: float = 2.0,
        stem_channels: int = 32,
        vocab_size: int = 128,
        text_length: int = 24,
        text_layers: int = 2,
        reference_time: str = "clean",
        ground_classes: tuple[int, ...] = (5, 7, 4),
    ):
        super().__init__()
        if side % patch:
            raise ValueError(f"side {side} is no multiple of patch {patch}")
        if reference_time not in ("clean", "noisy"):
            raise ValueError(f"reference_time is {reference_time!r}; known: clean, noisy")
        grid = side // patch
        self.text = TextEncoder(vocab_size, text_length, width, text_layers, heads)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 6 * width)
        self.stem = nn.Conv2d(channels, stem_channels, 3, padding=1)
        self.patchify = nn.Conv2d(stem_channels, width, patch, stride=patch)
        self.reference_embed = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(Block(width, heads, int(ffn_ratio * width), grid) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.unpatchify = nn.ConvTranspose2d(width, stem_channels, patch, stride=patch)
        self.head = nn.Sequential(nn.Conv2d(2 * stem_channels, stem_channels, 3, padding=1), nn.GELU(), nn.Conv2d(stem_channels, channels, 3, padding=1))
        self.ground = nn.Linear(width, sum(ground_classes))  # teacher's training only: what a noisy patch will show
        self.register_buffer("rope", rotary_table(grid, width // heads), persistent=False)
        self.gradient_checkpointing = False
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def condition(self, t: Tensor, text: Tensor) -> Tensor:
        """Shared modulation (B, 6, d) from time and the pooled text."""
        embedded = self.time(time_features(t, self.config.width).to(self.time[0].weight.dtype)) + text.mean(1)
        return self.modulation(F.silu(embedded)).unflatten(-1, (6, -1))

    def run_blocks(self, tokens: Tensor, text: Tensor, modulation: Tensor, cache: Cache | None, reference: bool = False) -> tuple[Tensor, Cache, Tensor]:
        """Tokens after the last block, the stream's keys and values per block, and the tokens halfway."""
        own, middle = [], tokens
        for i, block in enumerate(self.blocks):
            last = reference and i + 1 == len(self.blocks)
            args = (tokens, text, modulation, self.rope, cache[i] if cache else None, last)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens, kv = torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)
            else:
                tokens, kv = block(*args)
            own.append(kv)
            if i + 1 == (len(self.blocks) + 1) // 2:
                middle = tokens
        return tokens, own, middle

    def embed(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Full-resolution stem features and patch tokens (B, N, d)."""
        features = F.gelu(self.stem(image.to(self.stem.weight.dtype)))
        return features, self.patchify(features).flatten(2).transpose(1, 2)

    @property
    def channels(self) -> int:
        """Of pictures, which are its latents."""
        return self.config.channels

    @property
    def multiple(self) -> int:
        """Of a picture's sides, of which only `config.side` is drawn."""
        return self.config.patch

    @property
    def prompts(self) -> Words:
        """A batch carries the words themselves."""
        return Words(self.config.text_length)

    def encode_text(self, ids: Tensor) -> Tensor:
        """States (B, L, d) of ids (B, L)."""
        return self.text(ids)

    def encode_reference(self, reference: Tensor, text: Tensor, t: Tensor | None = None) -> Cache:
        """Keys and values of the reference in every block; `text` are encoded states (B, L, d)."""
        time = t if self.config.reference_time == "noisy" else torch.zeros(len(reference), device=reference.device)
        _, tokens = self.embed(reference)
        return self.run_blocks(tokens + self.reference_embed, text, self.condition(time, text), None, reference=True)[1]

    def hold_reference(self, reference: Tensor, text: Tensor) -> Cache | Tensor:
        """What all calls of an unroll share: the cache where the reference is modulated as clean, else its pixels."""
        return self.encode_reference(reference, text) if self.config.reference_time == "clean" else reference

    def forward(self, x: Tensor, t: Tensor, text: Tensor, reference: Tensor | Cache | None = None, with_ground: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity (B, C, H, W). `text`: ids (B, L) or encoded states; `reference`: pixels or a cache of `encode_reference`.
        `with_ground` also returns logits (B, N, sum of ground_classes) of what each patch shows, read off halfway."""
        side = self.config.side
        for name, z in (("x", x), ("reference", reference)):
            if isinstance(z, Tensor) and z.shape[-2:] != (side, side):
                raise ValueError(f"{name} is {tuple(z.shape)}; this DiT draws {side} x {side} pixels alone: buckets={side}x{side}")
        if not text.is_floating_point():
            text = self.text(text)
        if isinstance(reference, Tensor):
            reference = self.encode_reference(reference, text, t)
        features, tokens = self.embed(x)
        tokens, _, middle = self.run_blocks(tokens, text, self.condition(t, text), reference)
        grid = self.config.side // self.config.patch
        wide = self.unpatchify(self.norm(tokens).transpose(1, 2).unflatten(2, (grid, grid)))
        x0 = self.head(torch.cat((wide, features.to(wide.dtype)), 1))
        v = flow.to_velocity(x, x0.to(x.dtype), t.clamp(min=MIN_TIME))
        return (v, self.ground(middle)) if with_ground else v

    velocity = forward


diffusers.DiT = DiT  # where a saved transformer's class name is looked up
