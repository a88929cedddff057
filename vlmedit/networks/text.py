"""Words to vectors: the suite's tokenizer (one token per word) and the text encoder inside the DiT."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from vlmedit.world.language import vocabulary

PAD, UNK, YES, NO, END = "[pad]", "[unk]", "yes", "no", "[end]"
SPECIAL = (PAD, UNK, YES, NO, END)


@cache
def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer of the shape world, a transformers fast tokenizer with right padding."""
    words = (*SPECIAL, *(w for w in vocabulary() if w not in SPECIAL))
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=UNK))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, unk_token=UNK, eos_token=END, padding_side="right")


def encode(texts: list[str], length: int, tokenizer: PreTrainedTokenizerFast | None = None) -> Tensor:
    """Token ids (B, length), right-padded. Raises ValueError for a text longer than `length` words."""
    tokenizer = tokenizer or build_tokenizer()
    ids = tokenizer(texts, padding="max_length", max_length=length)["input_ids"]
    longest = max(range(len(texts)), key=lambda i: len(ids[i]), default=None)
    if longest is not None and len(ids[longest]) > length:
        raise ValueError(f"a text of {len(ids[longest])} words, at most {length} fit: {texts[longest]!r}")
    return torch.tensor(ids)


def words(ids: Tensor) -> str:
    """The text of one row of ids (L,), without padding."""
    return build_tokenizer().decode(ids, skip_special_tokens=True)


class TextEncoder(nn.Module):
    """A small bidirectional transformer: ids (B, L) -> states (B, L, width). Padding positions act as registers."""

    def __init__(self, vocab_size: int, length: int, width: int, layers: int = 2, heads: int = 4):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = lambda: nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(layer() for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)
