"""Real vision-language models as judges behind one `logit_margin(images, question)`, differentiable in the pixels.

A question is about one or two pictures; a batch may mix both. Every picture goes through the vision tower once, however many questions
ask about it, and a reference without gradient leaves no graph. The language model runs once for all rows, padded on the right; of its
states only the last of each row meets the output layer, and of that layer only two rows: margin = h . (w_yes - w_no). A forward over all
positions and words would make (N, L, 150,000) logits for two numbers.

Preprocessing is each checkpoint's own, in torch: sizes, means and deviations come from its preprocessor_config.json; pictures are resized
bicubic with antialiasing, as the processors do (they round to 8 bits on the way, so parity holds to about 1/255). Families:

| class                                  | a picture becomes                                                    | tokens                          |
|----------------------------------------|----------------------------------------------------------------------|---------------------------------|
| Qwen2_5_VLForConditionalGeneration     | its own aspect ratio, sides multiples of patch x merge               | height x width / (patch merge)^2 |
| Qwen3VLForConditionalGeneration        | the same                                                             | the same                        |
| LlavaOnevisionForConditionalGeneration | padded to a square; one base crop, as prompts of several images have | (side / patch)^2 + 1            |
| InternVLForConditionalGeneration       | squeezed to a square, one tile                                       | (side / patch)^2 / 4            |
| SmolVLM / Idefics3ForConditionalGeneration | Lanczos to the longest edge, then to a square, one tile          | (side / patch / scale)^2        |
| PaliGemmaForConditionalGeneration      | squeezed to a square                                                 | (side / patch)^2                |
| JudgeModel (vlmedit/networks/judge.py)   | squeezed to a square; two pictures are one, patch on patch           | (side / 4)^2                    |

Shapes: a picture (3, H, W) in [-1, 1]; margin (N,). Deviates: LLaVA-OneVision's single-image prompts would add high-resolution crops,
SmolVLM's would add tiles. PaliGemma 2 checkpoints were trained on one picture per question, those tuned on NLVR2 excepted: give others
one-picture questions alone. `Judge.write` lets the same model answer in words, greedily.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from vlmedit.equations.judge_loss import clamp_through
from vlmedit.networks.checks import reachable
from vlmedit.networks.judge import JudgeModel
from vlmedit.networks.prompts import PromptTable
from vlmedit.networks.sharding import is_sharded
from vlmedit.world.tokenizer import NO, YES, encode

Question = Sequence[str] | Tensor  # texts, or numbers (N, 1) in the judge's book
WORDS = 96  # tokens kept free for the words of a question, when a context is checked for two pictures


def resize(picture: Tensor, height: int, width: int) -> Tensor:
    """(3, H, W) in [-1, 1] to the given size; saturated pixels keep their gradient."""
    x = clamp_through(picture.float())
    if picture.shape[-2:] != (height, width):
        x = clamp_through(F.interpolate(x[None], size=(height, width), mode="bicubic", antialias=True)[0])
    return x


def lanczos(size: int, new: int) -> Tensor:
    """The matrix (new, size) by which Pillow's Lanczos filter resamples one side, antialiased when it shrinks."""
    scale = size / new
    wide = max(scale, 1.0)
    center = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    low, high = (center - 3 * wide + 0.5).floor().clamp(min=0), (center + 3 * wide + 0.5).floor().clamp(max=size)
    at = torch.arange(size, dtype=torch.float64)
    x = (at - center[:, None] + 0.5) / wide
    weight = torch.where((x.abs() < 3) & (at >= low[:, None]) & (at < high[:, None]), torch.sinc(x) * torch.sinc(x / 3), 0.0)
    return (weight / weight.sum(1, keepdim=True)).float()


def fitting_size(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Sides that are multiples of `factor`, of nearly the same ratio, with between `least` and `most` pixels (Qwen-VL's rule)."""
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > most:
        shrink = math.sqrt(height * width / most)
        h, w = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif h * w < least:
        grow = math.sqrt(least / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


def exact(prepare: Callable) -> Callable:
    """A judge's `prepare` outside autocast, which would round its matrix products. Shapes alone (the meta device) know no autocast."""

    @functools.wraps(prepare)
    def wrapped(self: Judge, picture: Tensor) -> Tensor:
        with nullcontext() if picture.is_meta else torch.autocast(picture.device.type, enabled=False):
            return prepare(self, picture)

    return wrapped


def answer_token(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    """The id of an answer that is one token. Raises ValueError where it is not."""
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"{tokenizer.name_or_path or type(tokenizer).__name__} writes {word!r} as {len(ids)} tokens {ids}; the margin needs one token per answer: "
            "take another judge, or copy tokenizer.json from the checkpoint if it is missing (in Python: load_judge(..., answers=(yes, no)))"
        )
    return ids[0]


def two_row_margin(states: Tensor, lengths: Tensor, weight: Tensor, yes: int, no: int, cap: float | None = None) -> Tensor:
    """logit(yes) - logit(no) (N,) after right-padded rows: states (N, L, d), their lengths (N,), output layer (V, d).
    With a `cap`, logits are cap tanh(logit / cap), as Gemma 2 has them. In float32 under autocast too."""
    with torch.autocast(states.device.type, enabled=False):  # a product in half precision would make 60.75 of a margin of 60.36
        last = states[torch.arange(len(states), device=states.device), lengths - 1].float()
        if cap is None:
            return last @ (weight[yes].float() - weight[no].float())
        return (cap * torch.tanh(last @ weight[[yes, no]].float().T / cap)) @ last.new_tensor([1.0, -1.0])


def check_context(config, tokens: int, name: str) -> None:
    """Raise ValueError unless two pictures of `tokens` visual tokens and a question fit into a model's context."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and 2 * tokens + WORDS > context:
        raise ValueError(
            f"{name} is too small for two pictures: {tokens} visual tokens each and {WORDS} for the question do not fit into its context of {context}; "
            "take a judge with a longer context, or fewer tokens per picture (size in its preprocessor_config.json)"
        )


def recompute(model: PreTrainedModel, on: bool = True) -> None:
    """Turn the recomputation of a transformers model's blocks on or off (the method was renamed within version 5). It acts in training
    mode only."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_checkpointing_disable")()


class Judge(nn.Module):
    """A frozen vision-language model with its tokenizer, its preprocessing and a book of questions.

    `checkpointing` recomputes blocks in the backward pass. transformers does so in training mode only, so the model is then kept there,
    with every dropout at 0.
    """

    image_token = ""  # stands once for each visual token in the prompt
    before, after = "", ""  # around the visual tokens of a picture
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    answers = ("Yes", "No")  # as the family's checkpoints write them after the prompt

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: dict, book: PromptTable | None = None, answers=None, checkpointing: bool = False):
        super().__init__()
        answers = answers or self.answers
        self.tokenizer, self.settings, self.book, self.checkpointing = tokenizer, settings, book or PromptTable(), checkpointing
        self.config = model.config
        self.config.yes_token_id, self.config.no_token_id = (answer_token(tokenizer, word) for word in answers)
        if self.config.yes_token_id == self.config.no_token_id:
            raise ValueError(f"both answers {answers} are token {self.config.yes_token_id}; pass two different ones")
        if checkpointing:
            recompute(model)
            for module in model.modules():
                for name in ("dropout", "attention_dropout", "p"):
                    if isinstance(getattr(module, name, None), float):
                        setattr(module, name, 0.0)
        self.model = model.requires_grad_(False)
        column = lambda key: torch.tensor(self.setting(key), dtype=torch.float32).view(3, 1, 1)
        self.register_buffer("mean", column("image_mean"), persistent=False)
        self.register_buffer("std", column("image_std"), persistent=False)
        self.eval()

    def setting(self, key: str):
        """An image setting of the checkpoint. Raises ValueError where its files lack it."""
        if key not in self.settings:
            raise ValueError(f"the judge's preprocessor settings lack {key!r}; they come from its preprocessor_config.json, class defaults are other models'")
        return self.settings[key]

    def train(self, mode: bool = True) -> Judge:
        super().train(mode)
        if self.checkpointing:
            self.model.train()
        return self

    def normalize(self, picture: Tensor) -> Tensor:
        return ((picture + 1) / 2 - self.mean) / self.std

    # per family

    def prepare(self, picture: Tensor) -> Tensor:
        """What the vision tower takes of one picture, differentiable."""
        raise NotImplementedError

    def tokens(self, picture: Tensor) -> int:
        """Visual tokens of a picture of this size."""
        raise NotImplementedError

    @staticmethod
    def least_tokens(config, settings: dict) -> int:
        """The fewest visual tokens that a picture can have, known before any weight is read."""
        raise NotImplementedError

    @staticmethod
    def settings_of(folder: str | os.PathLike, config) -> dict:
        """Image settings of a checkpoint with this configuration."""
        return preprocessor_settings(folder)

    def shown(self, picture: Tensor) -> str:
        """What stands in the prompt for a picture."""
        return self.image_token * self.tokens(picture)

    def encode(self, pictures: Sequence[Tensor]) -> list[SimpleNamespace]:
        """Visual tokens `pooler_output` (n, d) of each picture, and what else its family passes on."""
        raise NotImplementedError

    def gather(self, seen: list[SimpleNamespace]) -> SimpleNamespace:
        """The features of a batch's pictures, in reading order, as the family's forward takes them."""
        return SimpleNamespace(pooler_output=[s.pooler_output for s in seen])

    def extras(self, ids: Tensor, pictures: Sequence[Tensor]) -> dict:
        """Further arguments of the family's forward."""
        return {}

    # common

    def look(self, pictures: Sequence[Tensor]) -> list[SimpleNamespace]:
        """Features of each picture: those without gradient in one pass, those with one in another. Sharded blocks are called for the first
        pass even where no picture lacks a gradient (removals alone, identity=false): other processes may have some that do."""
        out: list[SimpleNamespace | None] = [None] * len(pictures)
        for wants in (False, True):
            rows = [i for i, p in enumerate(pictures) if p.requires_grad == wants]
            shown = [pictures[i] for i in rows] or ([pictures[0].detach()] if not wants and is_sharded(self.model) else [])
            for i, features in zip(rows, self.encode(shown) if shown else ()):
                out[i] = features
        return out

    def prompt(self, question: str, pictures: Sequence[Tensor]) -> str:
        """The chat up to the answer, by the checkpoint's own template where it has one; each picture as many tokens as it has.
        Raises ValueError where the template shows another number of pictures."""
        if self.tokenizer.chat_template:
            content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
            text = self.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        else:
            text = self.plain(question, len(pictures))
        parts = text.split(self.image_token)
        if len(parts) != len(pictures) + 1:
            raise ValueError(f"the prompt shows {len(parts) - 1} pictures by {self.image_token!r}, there are {len(pictures)}: {text[:80]!r}")
        return parts[0] + "".join(self.shown(p) + part for p, part in zip(pictures, parts[1:]))

    def plain(self, question: str, count: int) -> str:
        """The chat of a checkpoint without a template, as its family writes it: `count` pictures, each as one token."""
        seen = f"{self.before}{self.image_token}{self.after}" * count
        return f"{self.system}<|im_start|>user\n{seen}{question}<|im_end|>\n<|im_start|>assistant\n"

    def questions(self, images: Sequence[Sequence[Tensor]], question: Question) -> list[str]:
        """The questions' texts. Raises ValueError unless there is one for each set of one or two pictures."""
        texts = self.book.look_up(question) if isinstance(question, Tensor) else list(question)
        if len(texts) != len(images):
            raise ValueError(f"{len(texts)} questions about {len(images)} sets of pictures; there must be one each")
        if any(not 1 <= len(row) <= 2 for row in images):
            raise ValueError(f"a question is about one or two pictures, got {[len(row) for row in images]}")
        return texts

    def states(self, images: Sequence[Sequence[Tensor]], question: Question) -> tuple[Tensor, Tensor]:
        """The language model's states (N, L, d) and each row's length (N,): the last one within it predicts the answer."""
        inputs = self.inputs(images, self.questions(images, question))
        out = self.model.model(use_cache=False, **inputs)
        return out.last_hidden_state, inputs["attention_mask"].sum(1)

    def inputs(self, images: Sequence[Sequence[Tensor]], questions: Sequence[str], side: str = "right") -> dict:
        """Arguments of the family's forward for questions about any number of pictures each, padded on that side. Raises ValueError for one
        that is longer than the context."""
        unique = {id(p): p for row in images for p in row}
        seen = dict(zip(unique, self.look(list(unique.values()))))
        ids = [torch.tensor(self.tokenizer.encode(self.prompt(q, row), add_special_tokens=False)) for q, row in zip(questions, images)]
        device = self.mean.device
        lengths = torch.tensor([len(i) for i in ids], device=device)
        context = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and lengths.max() > context:
            raise ValueError(f"a question with its pictures is {int(lengths.max())} tokens, the judge's context {context}; ask shorter, or show smaller pictures")
        padded = pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0, padding_side=side).to(device)
        at = torch.arange(padded.shape[1], device=device)
        mask = (at < lengths[:, None] if side == "right" else at >= padded.shape[1] - lengths[:, None]).long()
        pictures = [p for row in images for p in row]
        shown = {"mm_encoder_outputs": {"image": self.gather([seen[id(p)] for p in pictures])}} if pictures else {}
        return {"input_ids": padded, "attention_mask": mask, **shown, **self.extras(padded, pictures)}

    @torch.no_grad()
    def write(self, images: Sequence[Sequence[Tensor]], texts: Sequence[str], length: int = 128) -> list[str]:
        """Greedy answers of at most `length` tokens to texts about any number of pictures each: temperature 0, no penalties."""
        own = getattr(self.model, "generation_config", None)
        stop = getattr(own, "eos_token_id", None)
        stop = self.tokenizer.eos_token_id if stop is None else stop
        pad = self.tokenizer.pad_token_id
        config = GenerationConfig(max_new_tokens=length, do_sample=False, num_beams=1, eos_token_id=stop, pad_token_id=0 if pad is None else pad)
        inputs = self.inputs(images, texts, "left")
        out = self.model.generate(**inputs, generation_config=config)
        return [t.strip() for t in self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]

    def logit_margin(self, images: Sequence[Sequence[Tensor]], question: Question) -> Tensor:
        """logit(Yes) - logit(No), (N,), by the two rows of the output layer that matter."""
        head = self.model.get_output_embeddings().weight
        cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
        return two_row_margin(*self.states(images, question), head, self.config.yes_token_id, self.config.no_token_id, cap)

    def answer_logits(self, images: Sequence[Sequence[Tensor]], question: Question) -> Tensor:
        """Logits over the vocabulary (N, V) of the answer, for the loss the paper ablates."""
        states, lengths = self.states(images, question)
        logits = self.model.get_output_embeddings()(states[torch.arange(len(states), device=states.device), lengths - 1]).float()
        cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)


class QwenVL(Judge):
    """Qwen2.5-VL and Qwen3-VL."""

    image_token, before, after = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"

    def size(self, picture: Tensor) -> tuple[int, int]:
        limits = self.setting("size")
        return fitting_size(*picture.shape[-2:], self.setting("patch_size") * self.setting("merge_size"), limits["shortest_edge"], limits["longest_edge"])

    @exact
    def prepare(self, picture):
        """Patches (n, 3 * frames * patch^2), grouped by the squares that are merged; the picture stands in every frame."""
        height, width = self.size(picture)
        p, m, frames = (self.setting(k) for k in ("patch_size", "merge_size", "temporal_patch_size"))
        x = self.normalize(resize(picture, height, width))
        x = x.reshape(3, height // p // m, m, p, width // p // m, m, p).permute(1, 4, 2, 5, 0, 3, 6)  # (gh, gw, m, m, 3, p, p)
        return x.unsqueeze(5).expand(*x.shape[:5], frames, p, p).reshape(height // p * (width // p), -1)

    @staticmethod
    def least_tokens(config, settings):
        return settings["size"]["shortest_edge"] // (settings["patch_size"] * settings["merge_size"]) ** 2

    def grid(self, pictures: Sequence[Tensor]) -> Tensor:
        p = self.setting("patch_size")
        return torch.tensor([[1, h // p, w // p] for h, w in map(self.size, pictures)], device=self.mean.device)

    def tokens(self, picture):
        height, width = self.size(picture)
        return height * width // (self.setting("patch_size") * self.setting("merge_size")) ** 2

    def encode(self, pictures):
        patches = torch.cat([self.prepare(p) for p in pictures]).to(self.model.dtype)
        out = self.model.model.get_image_features(patches, self.grid(pictures), return_dict=True)
        deep = getattr(out, "deepstack_features", ())  # Qwen3-VL: per layer, per picture
        return [SimpleNamespace(pooler_output=f, deepstack_features=[layer[i] for layer in deep]) for i, f in enumerate(out.pooler_output)]

    def gather(self, seen):
        out = super().gather(seen)
        out.deepstack_features = [list(layer) for layer in zip(*(s.deepstack_features for s in seen))]
        return out

    def extras(self, ids, pictures):
        return {"image_grid_thw": self.grid(pictures), "mm_token_type_ids": (ids == self.config.image_token_id).int()}


class Qwen3VL(QwenVL):
    system = ""


class LlavaOnevision(Judge):
    image_token, system = "<image>", ""

    def plain(self, question, count):
        return f"<|im_start|>user {self.image_token * count}\n{question}<|im_end|><|im_start|>assistant\n"

    @exact
    def prepare(self, picture):
        """The picture in a square of the mean color, resized (3, S, S)."""
        height, width = picture.shape[-2:]
        long = max(height, width)
        top, left = (long - height) // 2, (long - width) // 2
        color = (self.mean * 255).floor() / 255 * 2 - 1
        square = color.expand(3, long, long)
        inside = F.pad(torch.ones(1, height, width, device=picture.device), (left, long - width - left, top, long - height - top))
        square = torch.where(inside > 0, F.pad(picture.float(), (left, long - width - left, top, long - height - top)), square)
        size = self.setting("size")
        return self.normalize(resize(square, size["height"], size["width"]))

    def tokens(self, picture):
        return self.least_tokens(self.config, self.settings)

    @staticmethod
    def least_tokens(config, settings):
        return (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1

    def encode(self, pictures):
        x = torch.stack([self.prepare(p) for p in pictures]).to(self.model.dtype)[:, None]
        sizes = torch.tensor([p.shape[-2:] for p in pictures])
        out = self.model.model.get_image_features(x, sizes, batch_num_images=torch.tensor([2] * len(x)), return_dict=True)  # 2: no crops
        return [SimpleNamespace(pooler_output=f) for f in out.pooler_output]


class InternVL(Judge):
    image_token, before, after, system = "<IMG_CONTEXT>", "<img>", "</img>\n", ""

    @exact
    def prepare(self, picture):
        size = self.setting("size")
        return self.normalize(resize(picture, size["height"], size["width"]))

    def tokens(self, picture):
        return self.least_tokens(self.config, self.settings)

    @staticmethod
    def least_tokens(config, settings):
        vision = config.vision_config
        side, patch = (v if isinstance(v, int) else v[0] for v in (vision.image_size, vision.patch_size))
        return int((side // patch) ** 2 * config.downsample_ratio**2)

    def encode(self, pictures):
        x = torch.stack([self.prepare(p) for p in pictures]).to(self.model.dtype)
        return [SimpleNamespace(pooler_output=f) for f in self.model.model.get_image_features(x, return_dict=True).pooler_output]

    def gather(self, seen):
        return SimpleNamespace(pooler_output=torch.stack([s.pooler_output for s in seen]))


class SmolVLM(Judge):
    """SmolVLM and Idefics3, one tile per picture (`do_image_splitting` off: 64 to 169 tokens instead of 17 times as many)."""

    image_token, answers = "<image>", (" Yes", " No")  # its answers follow "Assistant:" after a space
    before, after, system = "", "", ""
    around, whole = "<fake_token_around_image>", "<global-img>"

    def plain(self, question, count):
        return f"<|im_start|>User:{self.image_token * count}{question}<end_of_utterance>\nAssistant:"

    def shown(self, picture):
        return f"{self.around}{self.whole}{super().shown(picture)}{self.around}"

    @exact
    def prepare(self, picture):
        """Both resizes of the processor as one linear map per side: to the longest edge with even sides, then to the square tile."""
        height, width = picture.shape[-2:]
        longest, side = self.setting("size")["longest_edge"], self.setting("max_image_size")["longest_edge"]
        short = int(longest / (width / height)) if width >= height else int(longest * (width / height))  # the processor's own roundings
        short = max(short + short % 2, 1)
        middle = (short, longest) if width >= height else (longest, short)
        down, across = (lanczos(m, side) @ lanczos(n, m) for n, m in zip((height, width), middle))
        x = clamp_through(picture.float())
        return self.normalize(clamp_through(down.to(x.device) @ x @ across.to(x.device).T))

    def tokens(self, picture):
        return self.least_tokens(self.config, self.settings)

    @staticmethod
    def least_tokens(config, settings):
        return (config.vision_config.image_size // config.vision_config.patch_size) ** 2 // config.scale_factor**2

    def encode(self, pictures):
        x = torch.stack([self.prepare(p) for p in pictures]).to(self.model.dtype)
        inner = self.model.model  # its get_image_features would drop an all-gray picture, as padding
        features = inner.connector(inner.vision_model(pixel_values=x, return_dict=True).last_hidden_state)
        return [SimpleNamespace(pooler_output=f) for f in features]


class PaliGemma(Judge):
    """PaliGemma and PaliGemma 2: no chat; pictures first, then the question; the whole prompt attends to itself in both directions."""

    image_token, system, answers = "<image>", "", ("yes", "no")

    def plain(self, question, count):
        return f"{self.image_token * count}{self.tokenizer.bos_token or ''}{question}\n"

    prepare = InternVL.prepare

    def tokens(self, picture):
        return self.least_tokens(self.config, self.settings)

    @staticmethod
    def least_tokens(config, settings):
        return (config.vision_config.image_size // config.vision_config.patch_size) ** 2

    encode, gather = InternVL.encode, InternVL.gather

    def extras(self, ids, pictures):
        return {"token_type_ids": torch.zeros_like(ids)}


class Shapes(Judge):
    """The suite's own judge. It fuses the two pictures of a question at its input, so a pair is encoded once, however many questions ask
    about it, and a reference that has been seen with one output is seen anew with another."""

    answers = (YES, NO)

    @staticmethod
    def settings_of(folder, config):
        return {"size": {"height": config.side, "width": config.side}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}

    prepare = InternVL.prepare

    def tokens(self, picture):
        return self.least_tokens(self.config, self.settings)

    @staticmethod
    def least_tokens(config, settings):
        return (config.side // 4) ** 2

    def states(self, images, question):
        ids = self.read(self.questions(images, question))
        keys = [tuple(map(id, row)) for row in images]
        rows = dict(zip(keys, images))
        seen = {}
        for count in (1, 2):
            if same := [key for key in rows if len(key) == count]:
                pixels = torch.stack([torch.stack([self.prepare(p) for p in rows[key]]) for key in same])
                seen |= dict(zip(same, self.model.get_image_features(pixels.to(self.model.dtype))))
        lengths = (ids != self.config.pad_token_id).sum(1)
        return self.model.hidden(ids[:, : int(lengths.max())], torch.stack([seen[key] for key in keys])), lengths

    def read(self, questions: list[str]) -> Tensor:
        """Ids (N, L) of questions in the world's words. Raises ValueError for others: it has been schooled on no others."""
        ids = encode(questions, self.config.text_length, self.tokenizer)
        if unread := [q for q, row in zip(questions, ids) if (row == self.tokenizer.unk_token_id).any()]:
            raise ValueError(f"the judge of shapes cannot read {unread[0]!r}; it knows the questions of its world alone: questions=shapes")
        return ids.to(self.mean.device)

    def write(self, images, texts, length=128):
        raise ValueError("the judge of shapes answers yes or no and writes nothing; name a vision-language model of transformers")


class Ensemble(nn.Module):
    """Several judges as one: the mean of their margins. They share one book of questions."""

    def __init__(self, judges: Sequence[Judge]):
        super().__init__()
        if not judges or any(j.book is not judges[0].book for j in judges):
            raise ValueError(f"an ensemble of {len(judges)} judges needs at least one, and one book for all: pass the same PromptTable to each load_judge")
        self.judges = nn.ModuleList(judges)

    def logit_margin(self, images: Sequence[Sequence[Tensor]], question: Question) -> Tensor:
        return torch.stack([j.logit_margin(images, question) for j in self.judges]).mean(0)


class Blind(nn.Module):
    """A judge that is shown gray: what its words alone make it say. A margin that it shares with the seeing judge is no evidence."""

    def __init__(self, judge: Judge):
        super().__init__()
        self.judge = judge

    def logit_margin(self, images: Sequence[Sequence[Tensor]], question: Question) -> Tensor:
        return self.judge.logit_margin([[torch.zeros_like(p) for p in row] for row in images], question)


FAMILIES: dict[str, type[Judge]] = {
    "Qwen2_5_VLForConditionalGeneration": QwenVL,
    "Qwen3VLForConditionalGeneration": Qwen3VL,
    "LlavaOnevisionForConditionalGeneration": LlavaOnevision,
    "InternVLForConditionalGeneration": InternVL,
    "SmolVLMForConditionalGeneration": SmolVLM,
    "Idefics3ForConditionalGeneration": SmolVLM,
    "PaliGemmaForConditionalGeneration": PaliGemma,
    JudgeModel.__name__: Shapes,
}


def preprocessor_settings(folder: str | os.PathLike) -> dict:
    """The image settings of a checkpoint, old layout (preprocessor_config.json) or new (processor_config.json). Raises FileNotFoundError
    where neither has them."""
    for file in ("preprocessor_config.json", "processor_config.json"):
        path = cached_file(str(folder), file, local_files_only=not reachable(), _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
        if path:
            settings = json.loads(Path(path).read_text())
            settings = settings.get("image_processor", settings)
            if "image_mean" in settings:
                if settings.get("min_pixels") and settings.get("max_pixels"):  # Qwen2.5-VL's files say it so, and it wins there too
                    settings["size"] = {"shortest_edge": settings["min_pixels"], "longest_edge": settings["max_pixels"]}
                return settings
    raise FileNotFoundError(f"{folder} has no preprocessor_config.json with image settings; copy it from the checkpoint")


def load_judge(folder: str | os.PathLike, book: PromptTable | None = None, answers: tuple[str, str] | None = None, checkpointing: bool = False, **kwargs) -> Judge:
    """The judge of a saved vision-language model; everything small is read and checked before any weight is. `folder` may be an id of
    the Hub. Code that comes with a checkpoint is not run. `answers` are by default the family's own words for yes and no. Raises
    ValueError for a class without an adapter, answers that are no single tokens, or a context too short for two pictures,
    FileNotFoundError for a folder or an id that does not lead to a model."""
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=not reachable())
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=not reachable())
    except OSError as error:
        raise FileNotFoundError(f"no vision-language model at {folder}: give a folder with config.json and tokenizer.json, or an id of the Hub and a network ({str(error).splitlines()[0]})") from error
    except ValueError as error:
        raise ValueError(
            f"{folder} is of a class that transformers does not have, or brings code of its own, which is not run ({str(error).splitlines()[0]}); "
            "take its transformers-native twin (for InternVL the checkpoint whose name ends with -hf)"
        ) from error
    name = (config.architectures or ["a model without architectures"])[0]
    if name not in FAMILIES:
        raise ValueError(f"no adapter for {name}; known: {', '.join(FAMILIES)}")
    settings = FAMILIES[name].settings_of(folder, config)
    for word in answers or FAMILIES[name].answers:
        answer_token(tokenizer, word)
    check_context(config, FAMILIES[name].least_tokens(config, settings), str(folder))
    try:
        model = AutoModelForImageTextToText.from_pretrained(str(folder), trust_remote_code=False, **kwargs)
    except (OSError, SafetensorError) as error:
        raise FileNotFoundError(f"{folder} has a config but not all of its weights; download it again ({str(error).splitlines()[0]})") from error
    return FAMILIES[name](model, tokenizer, settings, book, answers, checkpointing)
