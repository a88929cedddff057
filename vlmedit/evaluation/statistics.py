"""What verdicts and beliefs add up to, and how far a finite number of them can be trusted.

* `hacking_gap`: what the judge believes minus what the oracle finds, per edit; `editing.evaluate_student` reports its
  mean.
* `viescore`: the overall score of an edit from sub-scores in [0, 10], sqrt(min SC * min PQ)          [arXiv:2312.14867]
* `calibration_error`: expected calibration error over equal bins of the probability                  [arXiv:1706.04599]
* `wilson_interval`: where a rate lies, given a count; holds for few edits and for rates near 0 and 1  [Wilson 1927]
* `edits_needed`: how many edits tell two editors apart.
* `best_of`: what the best of k samples is worth, averaged over all choices of k out of those drawn.
* `denoising_psnr`: how near a text-to-image teacher finds a picture to what it would draw; needs no oracle.

Shapes: p (2, N), the judge's probabilities of the right answers (edit, identity); done, kept (N,) booleans of the
oracle. Deviates from the paper: VIEScore's sub-scores are spoken by a large model; whoever calls `viescore` says what
stands in for them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlmedit import flow
from vlmedit.data.batches import TEXT_LENGTH
from vlmedit.networks.dit import DiT

Z95, Z80 = 1.959964, 0.841621  # of a normal: 95 % two-sided, 80 % one-sided


def hacking_gap(p: Tensor, done: Tensor, kept: Tensor) -> Tensor:
    """Mean probability of the right answer over both questions, minus success (done and kept), (N,)."""
    return p.mean(0) - (done & kept).float()


def viescore(consistency: Tensor, quality: Tensor) -> Tensor:
    """Overall score (N,) of N edits from sub-scores (N, K) and (N, M) in [0, 10]: the geometric mean of the two least
    ones."""
    return (consistency.min(1).values * quality.min(1).values).sqrt()


def calibration_error(p: Tensor, truth: Tensor, bins: int = 10) -> float:
    """Mean over equal bins of p in [0, 1] of |mean p - how often it is so|, each bin weighted by its number of
    answers."""
    which = (p * bins).long().clamp(max=bins - 1)
    believed = torch.bincount(which, p, bins)  # sums: a bin's weight and its mean's divisor cancel
    so = torch.bincount(which, truth.to(p.dtype), bins)
    return float((believed - so).abs().sum() / len(p))


def wilson_interval(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The rates that lie within z standard errors of the observed one, the error being each rate's own: low and
    high."""
    rate, shrink = successes / n, 1 + z * z / n
    center = (rate + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def edits_needed(difference: float, std: float) -> float:
    """Edits after which a true `difference` is seen at 95 % confidence four times in five. `std`: of one edit's
    difference."""
    return ((Z95 + Z80) * std / difference) ** 2


def best_of(score: Tensor, value: Tensor, k: int) -> Tensor:
    """Expected `value` (R,) of the sample with the highest `score` among k of the N drawn per request, both (R, N)."""
    n = score.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; of {n} samples per request between 1 and {n} can be chosen from")
    # the sample of rank r (from 0, the worst) is the best of k with probability C(r, k - 1) / C(n, k)
    chance = torch.tensor([math.comb(r, k - 1) / math.comb(n, k) for r in range(n)], dtype=torch.float64)
    return (value.gather(1, score.argsort(1)).double() * chance).sum(1).to(value.dtype)


@torch.no_grad()
def denoising_psnr(teacher: DiT, pictures: Tensor, t: float, draws: int = 2, seed: int = 0, batch: int = 128) -> Tensor:
    """PSNR (N,) in dB between pictures (N, 3, S, S) and what the teacher, without a caption, makes of them after noise
    of level t."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for part in pictures.split(batch):
        x0 = part.to(teacher.device)
        text = teacher.encode_text(torch.zeros(len(x0), TEXT_LENGTH, dtype=torch.long, device=teacher.device))
        time = torch.full((len(x0),), t, device=teacher.device)
        error = torch.zeros(len(x0), device=teacher.device)
        for _ in range(draws):
            x = flow.interpolate(x0, torch.randn(x0.shape, generator=generator).to(teacher.device), time)
            error += ((flow.to_x0(x, teacher(x, time, text), time) - x0) / 2).square().flatten(1).mean(1) / draws
        parts.append((-10 * error.clamp(min=1e-6).log10()).cpu())
    return torch.cat(parts)
