"""The judge: a small vision-language model that looks at one or two pictures, reads a question and answers Yes or No.

It is a transformers model (config, `from_pretrained`, safetensors) with the shape of its large relatives: pictures become
visual tokens, the question follows, the language head gives logits over the whole vocabulary, and the answer is read at
the question's last position [LLaVA-OneVision, arXiv:2408.03326]. Two pictures are fused patch by patch at the input
(reference, output and their difference), because two separate sequences would need far more schooling (papers/log.md).

Shapes: pixel_values (B, n, 3, S, S) in [-1, 1], n = 1 (output) or 2 (reference, output); input_ids (N, L) right-padded.
`yes_no_margin` is what training uses: logit(Yes) - logit(No), (N,).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from vlmedit.networks.dit import attend
from vlmedit.world.scene import GROUND_CLASSES


class JudgeConfig(PretrainedConfig):
    """`width`: of the transformer; `conv`: channels of the first stage; layer counts; ids of the special tokens."""

    model_type = "vlmedit_judge"

    def __init__(
        self,
        side: int = 32,
        width: int = 128,
        conv: int = 64,
        vision_layers: int = 2,
        text_layers: int = 3,
        heads: int = 4,
        vocab_size: int = 128,
        text_length: int = 32,
        yes_token_id: int = 2,
        no_token_id: int = 3,
        **kwargs,
    ):
        self.side, self.width, self.conv, self.heads = side, width, conv, heads
        self.vision_layers, self.text_layers, self.text_length = vision_layers, text_layers, text_length
        self.vocab_size, self.yes_token_id, self.no_token_id = vocab_size, yes_token_id, no_token_id
        super().__init__(**{"pad_token_id": 0, **kwargs})


def ground_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of shape, color and texture per patch: logits (B, N, sum of GROUND_CLASSES), labels (B, N, 3),
    -100 where not asked."""
    parts = zip(logits.float().split(GROUND_CLASSES, -1), labels.unbind(-1))
    return torch.stack([F.cross_entropy(p.flatten(0, 1), y.flatten(), ignore_index=-100) for p, y in parts]).mean()


@dataclass
class JudgeOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None  # (N, L, vocabulary)


class ResBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.a = nn.Conv2d(channels, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.gelu(self.a(self.norm(x))))


class Layer(GradientCheckpointingLayer):
    """Pre-norm transformer layer whose tokens may also read a prefix of visual tokens."""

    def __init__(self, width: int, heads: int, prefix: bool):
        super().__init__()
        self.heads = heads
        self.norm_a, self.norm_f = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.prefix_kv = nn.Linear(width, 2 * width) if prefix else None
        self.out = nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor:
        split = lambda part: part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = (split(part) for part in self.qkv(self.norm_a(x)).chunk(3, -1))
        if prefix is None:
            mixed = attend(q, k, v)
        else:  # causal over the text, everything over the pictures
            seen_k, seen_v = (split(part) for part in self.prefix_kv(prefix).chunk(2, -1))
            scores = q @ torch.cat((seen_k, k), 2).transpose(-1, -2) * q.shape[-1] ** -0.5
            n, length = seen_k.shape[2], x.shape[1]
            later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            hidden = F.pad(later, (n, 0))
            mixed = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1) @ torch.cat((seen_v, v), 2)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.ffn(self.norm_f(x))


class JudgeModel(PreTrainedModel):
    config_class = JudgeConfig
    base_model_prefix = "judge"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]

    def __init__(self, config: JudgeConfig):
        super().__init__(config)
        c, d = config.conv, config.width
        self.stem = nn.Sequential(nn.Conv2d(10, c // 2, 3, padding=1), nn.GELU(), nn.Conv2d(c // 2, c, 4, stride=2, padding=1))
        self.fine = nn.Sequential(ResBlock(c), ResBlock(c))
        self.merge = nn.Conv2d(c, d, 2, stride=2)
        self.coarse = nn.Sequential(ResBlock(d), ResBlock(d))
        self.grid_position = nn.Parameter(torch.randn((config.side // 4) ** 2, d) * 0.02)
        self.vision_layers = nn.ModuleList(Layer(d, config.heads, prefix=False) for _ in range(config.vision_layers))
        self.vision_norm = nn.LayerNorm(d)
        self.ground = nn.Linear(d, 2 * sum(GROUND_CLASSES))  # schooling only: what a patch shows, in reference and output
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        self.text_position = nn.Parameter(torch.randn(config.text_length, d) * 0.02)
        self.text_layers = nn.ModuleList(Layer(d, config.heads, prefix=True) for _ in range(config.text_layers))
        self.norm = nn.LayerNorm(d)
        self.lm_head = nn.Linear(d, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        """Torch's own initialisation is kept; embeddings are scaled down."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Visual tokens (B, (S / 4)^2, d) of one or two pictures."""
        output = pixel_values[:, -1]
        pair = pixel_values.shape[1] == 2
        reference = pixel_values[:, 0] if pair else torch.zeros_like(output)
        difference = output - reference if pair else torch.zeros_like(output)
        flag = torch.full_like(output[:, :1], float(pair))
        x = self.stem(torch.cat((reference, output, difference, flag), 1))
        x = self.coarse(self.merge(self.fine(x))).flatten(2).transpose(1, 2) + self.grid_position
        for layer in self.vision_layers:
            x = layer(x)
        return self.vision_norm(x)

    def ground_loss(self, image_features: Tensor, reference: Tensor | None, output: Tensor) -> Tensor:
        """Cross-entropy of what each patch of output (and reference) shows; labels (B, N, 3). Schooling only."""
        of_output, of_reference = self.ground(image_features).chunk(2, -1)
        if reference is None:
            return ground_loss(of_output, output)
        return (ground_loss(of_output, output) + ground_loss(of_reference, reference)) / 2

    def hidden(self, input_ids: Tensor, image_features: Tensor) -> Tensor:
        """Text states (N, L, d)."""
        x = self.embed_tokens(input_ids) + self.text_position[: input_ids.shape[1]]
        for layer in self.text_layers:
            x = layer(x, image_features)
        return self.norm(x)

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, image_features: Tensor | None = None, labels: Tensor | None = None, **_) -> JudgeOutput:
        """Logits over the vocabulary at every text position. `labels` (N, L): the *next* token, -100 where not asked."""
        if image_features is None:
            image_features = self.get_image_features(pixel_values)
        logits = self.lm_head(self.hidden(input_ids, image_features))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        return JudgeOutput(loss=loss, logits=logits)

    def answer_logits(self, input_ids: Tensor, pixel_values: Tensor | None = None, image_features: Tensor | None = None) -> Tensor:
        """Vocabulary logits (N, V) at the position that predicts the answer, the last one that is not padding."""
        if image_features is None:
            image_features = self.get_image_features(pixel_values)
        last = (input_ids != self.config.pad_token_id).sum(1) - 1
        states = self.hidden(input_ids[:, : int(last.max()) + 1], image_features)
        return self.lm_head(states[torch.arange(len(last)), last]).float()

    def yes_no_margin(self, input_ids: Tensor, pixel_values: Tensor | None = None, image_features: Tensor | None = None) -> Tensor:
        """logit(Yes) - logit(No), (N,)."""
        logits = self.answer_logits(input_ids, pixel_values, image_features)
        return logits[:, self.config.yes_token_id] - logits[:, self.config.no_token_id]


# so that transformers' Auto classes read a saved judge's config.json
AutoConfig.register(JudgeConfig.model_type, JudgeConfig, exist_ok=True)
AutoModel.register(JudgeConfig, JudgeModel, exist_ok=True)
AutoModelForImageTextToText.register(JudgeConfig, JudgeModel, exist_ok=True)
