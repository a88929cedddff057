"""The suite's models shrunk to a few thousand random weights, for tests."""

from dataclasses import fields

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from vlmedit.data.batches import UnpairedBatch
from vlmedit.data.world import unpaired_batch
from vlmedit.networks.dit import DiT
from vlmedit.networks.judge import JudgeConfig, JudgeModel
from vlmedit.pipelines.shapes import EditPipeline
from vlmedit.world.tokenizer import build_tokenizer

SIDE = 16


def tiny_dit(seed=0, **config) -> DiT:
    """Random, with a modulation that already listens to time (a fresh DiT's does not)."""
    torch.manual_seed(seed)
    settings = dict(side=SIDE, width=32, depth=2, heads=2, stem_channels=8, vocab_size=len(build_tokenizer()), text_length=24, text_layers=1)
    dit = DiT(**{**settings, **config})
    nn.init.normal_(dit.modulation.weight, std=0.3)
    nn.init.normal_(dit.reference_embed)
    return dit.eval()


def tiny_judge(seed=0, **config) -> JudgeModel:
    torch.manual_seed(seed)
    settings = dict(side=SIDE, width=32, conv=16, vision_layers=1, text_layers=2, heads=2, vocab_size=len(build_tokenizer()), text_length=40)
    judge = JudgeModel(JudgeConfig(**{**settings, **config}))
    nn.init.normal_(judge.embed_tokens.weight)  # so that questions differ visibly
    return judge.eval()


def tiny_pipeline(shift=3.0, judge=True, stochastic=True, **config) -> EditPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=stochastic)
    return EditPipeline(tiny_dit(**config), scheduler, build_tokenizer(), tiny_judge() if judge else None)


def pictures(batch: int, seed=0, side=SIDE) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def requests(*kinds: str, seed=0, side=SIDE) -> UnpairedBatch:
    """One request per edit type named, in that order."""
    rows = [unpaired_batch(1, side, seed, i, kinds=(kind,)) for i, kind in enumerate(kinds)]
    tensors = {f.name: torch.cat([getattr(r, f.name) for r in rows]) for f in fields(UnpairedBatch) if f.name != "types"}
    return UnpairedBatch(**tensors, types=tuple(kinds))


def saved_elements(compute) -> int:
    """Elements that autograd keeps for the backward pass of `compute()`, each storage counted once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # holding it keeps its address from being reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    assert result.requires_grad
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept.values())
