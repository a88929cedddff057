"""Measuring the text-to-image teacher: does the oracle read in its pictures what their captions say?

* fidelity: things, background and style are those of the caption.
* manifold-PSNR: dB to the render of the scene the oracle read.

Shapes: samples (N, 3, S, S) in [-1, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmedit import flow
from vlmedit.data.batches import TEXT_LENGTH
from vlmedit.data.world import HELD_OUT
from vlmedit.equations.training_free import guided
from vlmedit.networks.dit import DiT
from vlmedit.seeds import rng_for
from vlmedit.world.language import caption
from vlmedit.world.oracle import parse
from vlmedit.world.scene import Scene, sample_scene
from vlmedit.world.tokenizer import encode


def says_the_same(scene: Scene, reading: Scene) -> bool:
    """Whether a caption of `scene` holds of `reading`: same things, background and style, in any order."""
    named, read = (
        (sorted((t.color, t.shape, t.texture) for t in s.things), s.background, s.style) for s in (scene, reading)
    )
    return named == read


def shapes(scene: Scene) -> list[str]:
    return sorted(t.shape for t in scene.things)


@torch.no_grad()
def evaluate_teacher(
    teacher: DiT, n: int = 256, seed: int = 0, steps: int = 30, guidance: float = 2.0, sampler: str = "euler",
    shift: float = 1.0, batch: int = 64,
) -> tuple[dict, Tensor]:  # fmt: skip
    """Caption fidelity of samples by the oracle, and the samples. `guidance` 1 for a distilled student."""
    rng = rng_for(HELD_OUT, "captions", seed)
    scenes = [sample_scene(rng) for _ in range(n)]
    generator, device = torch.Generator().manual_seed(seed), next(teacher.parameters()).device
    samples = []
    for i in range(0, n, batch):
        ids = encode([caption(s) for s in scenes[i : i + batch]], TEXT_LENGTH).to(device)
        velocity = guided(teacher, ids, guidance)
        noise = torch.randn(len(ids), 3, teacher.config.side, teacher.config.side, generator=generator).to(device)
        samples.append(flow.sample(velocity, noise, flow.few_step_times(steps, shift), sampler, generator).clamp(-1, 1).cpu())
    samples = torch.cat(samples)
    readings = parse(samples)
    fine = [says_the_same(s, r.scene) for s, r in zip(scenes, readings)]
    metrics = {
        "fidelity": sum(fine) / n,
        "manifold_psnr": sum(r.manifold_psnr for r in readings) / n,
        "shapes": sum(shapes(s) == shapes(r.scene) for s, r in zip(scenes, readings)) / n,
        "n": n, "seed": seed, "steps": steps, "guidance": guidance,
    }  # fmt: skip
    return metrics, samples
