"""Notebook 06: what the judge believes too much, how sure a rate is, whether a probability means what it says, one score of many."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlmedit.evaluation.statistics import Z95, calibration_error, hacking_gap, viescore, wilson_interval
from vlmedit.teaching.checking import Exercise

# the hacking gap


def gap_cases() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    cases = []
    # done and kept differ in rate, and so do the two probabilities; once nothing succeeds
    for n, done_rate, kept_rate in ((7, 0.7, 0.5), (12, 0.4, 0.8), (5, 1.0, 0.0)):
        p = torch.rand(2, n, generator=generator) * torch.tensor([[0.9], [0.6]]) + torch.tensor([[0.05], [0.3]])
        done, kept = (torch.rand(n, generator=generator) < rate for rate in (done_rate, kept_rate))
        cases.append((p, done, kept))
    return cases


def _success(done: Tensor, kept: Tensor) -> Tensor:
    return (done & kept).float()


HACKING_GAP = Exercise(
    hacking_gap,
    gap_cases,
    {
        "the sign is flipped: it is belief minus truth, positive where the judge believes too much": lambda p, d, k: (
            _success(d, k) - p.mean(0)
        ),
        "an edit that is done or kept counts as a success; it must be both": lambda p, d, k: p.mean(0) - (d | k).float(),
        "each question is compared with its own verdict; the gap is against success": lambda p, d, k: (
            ((p[0] - d.float()) + (p[1] - k.float())) / 2
        ),
        "the probabilities are multiplied; the definition takes their mean": lambda p, d, k: p.prod(0) - _success(d, k),
        "the probabilities are rounded to yes and no first; how sure the judge is belongs to it": lambda p, d, k: (
            (p > 0.5).float().mean(0) - _success(d, k)
        ),
        "only the edit question is asked; the identity question counts as much": lambda p, d, k: p[0] - _success(d, k),
        "only the edit's own verdict is compared; a done edit with the rest lost is no success": lambda p, d, k: p.mean(0) - d.float(),
        "the mean goes over the edits (axis 1); it must go over the two questions": lambda p, d, k: p.mean(1)[:, None] - _success(d, k),
        "the mean over the edits is taken as well; every edit has a gap of its own": lambda p, d, k: (p.mean(0) - _success(d, k)).mean(),
        "the absolute value is taken; believing too little must count against believing too much": lambda p, d, k: (
            p.mean(0) - _success(d, k)
        ).abs(),
    },
)


# the interval of a rate


def interval_cases() -> list[tuple[int, int, float]]:
    return [(7, 16, Z95), (0, 12, Z95), (37, 40, 1.0), (5, 9, 2.6), (200, 300, Z95)]


def _wald(k: int, n: int, z: float, spread: float | None = None) -> tuple[float, float]:
    rate = k / n
    half = z * (math.sqrt(rate * (1 - rate) / n) if spread is None else spread)
    return rate - half, rate + half


def _around(center: float, half: float) -> tuple[float, float]:
    return center - half, center + half


def _wilson(
    k: int, n: int, z: float, middle: float = 0.5, shrink: bool = True, inner: float = 0.25, square: bool = True
) -> tuple[float, float]:
    """The interval with one of its constants changed."""
    rate, zz = k / n, z * z if square else z
    by = 1 + zz / n if shrink else 1.0
    return _around((rate + middle * zz / n) / by, z / by * math.sqrt(rate * (1 - rate) / n + inner * zz / (n * n)))


def _agresti(k: int, n: int, z: float) -> tuple[float, float]:
    rate, m = (k + z * z / 2) / (n + z * z), n + z * z
    return _around(rate, z * math.sqrt(rate * (1 - rate) / m))


WILSON_INTERVAL = Exercise(
    wilson_interval,
    interval_cases,
    {
        "that is the textbook's rate plus or minus z standard errors, which is of no width at 0 and too narrow near it": _wald,
        "the spread of one edit is taken for that of the mean: divide the variance by n": lambda k, n, z: _wald(
            k, n, z, math.sqrt(k / n * (1 - k / n))
        ),
        "the center is the observed rate; it must be drawn towards one half": lambda k, n, z: _around(
            k / n, (lambda w: (w[1] - w[0]) / 2)(_wilson(k, n, z))
        ),
        "nothing is divided by 1 + z^2 / n": lambda k, n, z: _wilson(k, n, z, shrink=False),
        "the center adds z^2 / n; it must add half of that": lambda k, n, z: _wilson(k, n, z, middle=1.0),
        "the term z^2 / (4 n^2) under the root is missing": lambda k, n, z: _wilson(k, n, z, inner=0.0),
        "the term under the root is z^2 / n^2; the 4 is missing": lambda k, n, z: _wilson(k, n, z, inner=1.0),
        "z is not squared": lambda k, n, z: _wilson(k, n, z, square=False),
        "the ends are the wrong way round: low comes first": lambda k, n, z: wilson_interval(k, n, z)[::-1],
        "z is fixed at 95 %; it is an argument": lambda k, n, z: wilson_interval(k, n),
        "that is center and half width; return the two ends": lambda k, n, z: (lambda w: ((w[0] + w[1]) / 2, (w[1] - w[0]) / 2))(
            _wilson(k, n, z)
        ),
        "that is Agresti's and Coull's interval, whose ends may leave 0 to 1": _agresti,
    },
)


# the calibration error


def calibration_cases() -> list[tuple[Tensor, Tensor, int]]:
    generator = torch.Generator().manual_seed(2)
    cases = []
    # most answers are sure ones, so that bins are of very unequal size
    for n, bins, lean in ((60, 10, 0.0), (41, 5, 0.3), (25, 4, -0.2)):
        p = torch.rand(n, generator=generator).pow(3)
        p = torch.where(torch.rand(n, generator=generator) < 0.5, p, 1 - p)
        p[0], p[1] = 1.0, 0.0
        truth = (torch.rand(n, generator=generator) < (p + lean).clamp(0, 1)).float()
        truth[0] = 0.0  # sure and wrong: whoever loses p = 1 sees it
        cases.append((p, truth, bins))
    p, truth, _ = cases[0]
    return [*cases, (p[(p < 0.2) | (p > 0.7)], truth[(p < 0.2) | (p > 0.7)], 8)]  # bins in the middle are empty


def _bins(p: Tensor, truth: Tensor, bins: int) -> list[tuple[float, float, int, int]]:
    """Mean probability, share, count and number of every bin that is not empty."""
    which = (p * bins).long().clamp(max=bins - 1)
    return [(float(p[m].mean()), float(truth[m].mean()), int(m.sum()), b) for b in range(bins) if (m := which == b).any()]


def _by_sureness(p: Tensor, truth: Tensor, bins: int) -> float:
    """Over the probability of the likelier answer, and whether it is right."""
    return calibration_error(torch.maximum(p, 1 - p), ((p > 0.5) == (truth > 0.5)).float(), bins)


def _open_bins(p: Tensor, truth: Tensor, bins: int) -> float:
    inside = p < 1
    which = (p[inside] * bins).long()
    return float((torch.bincount(which, p[inside], bins) - torch.bincount(which, truth[inside], bins)).abs().sum() / len(p))


CALIBRATION_ERROR = Exercise(
    calibration_error,
    calibration_cases,
    {
        "every bin counts the same; a bin's weight is its share of the answers": lambda p, t, b: (
            lambda r: sum(abs(x - y) for x, y, _, _ in r) / len(r)
        )(_bins(p, t, b)),
        "the sum is divided by the number of all bins; a bin's weight is its share of the answers": lambda p, t, b: (
            sum(abs(x - y) for x, y, _, _ in _bins(p, t, b)) / b
        ),
        "there is no absolute value: too much in one bin cancels too little in another": lambda p, t, b: (
            sum(n * (x - y) for x, y, n, _ in _bins(p, t, b)) / len(p)
        ),
        "the absolute value is of the whole mean, as if there were one bin": lambda p, t, b: abs(float(p.mean() - t.mean())),
        "the absolute value is of every single answer: that is no calibration, a fair coin would fail": lambda p, t, b: float(
            (p - t).abs().mean()
        ),
        "the worst bin is taken; the expected error is the weighted mean": lambda p, t, b: max(abs(x - y) for x, y, _, _ in _bins(p, t, b)),
        "a bin's middle stands for its mean probability": lambda p, t, b: (
            sum(n * abs((k + 0.5) / b - y) for _, y, n, k in _bins(p, t, b)) / len(p)
        ),
        "the errors are squared": lambda p, t, b: sum(n * (x - y) ** 2 for x, y, n, _ in _bins(p, t, b)) / len(p),
        "the bins' weighted sum is not divided by the number of answers": lambda p, t, b: sum(
            n * abs(x - y) for x, y, n, _ in _bins(p, t, b)
        ),
        "the number of bins is fixed at 10; it is an argument": lambda p, t, b: calibration_error(p, t, 10),
        "p = 1 falls out of the last bin": _open_bins,
        "that is of the likelier answer; here p is of yes": _by_sureness,
    },
)


# one score of many


def viescore_cases() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: 10 * torch.rand(*shape, generator=generator)
    return [
        (draw(6, 2), draw(6, 2)),
        (draw(4, 3), draw(4, 1)),
        (torch.tensor([[10.0, 0.0], [4.0, 9.0]]), torch.tensor([[9.0, 9.0], [4.0, 8.0]])),
    ]


def _least(x: Tensor) -> Tensor:
    return x.min(1).values


VIESCORE = Exercise(
    viescore,
    viescore_cases,
    {
        "the mean of the sub-scores is taken; an edit is as good as its weakest side": lambda c, q: (c.mean(1) * q.mean(1)).sqrt(),
        "the best sub-score is taken instead of the least": lambda c, q: (c.max(1).values * q.max(1).values).sqrt(),
        "the two are averaged; in a geometric mean a zero stays a zero": lambda c, q: (_least(c) + _least(q)) / 2,
        "the root is missing: a product of two tens is 100": lambda c, q: _least(c) * _least(q),
        "the least of all sub-scores is taken; consistency and quality have a least one each": lambda c, q: torch.minimum(
            _least(c), _least(q)
        ),
        "the least is taken over the edits (axis 0); it must be over an edit's sub-scores": lambda c, q: (
            (c.min(0).values.mean() * q.min(0).values.mean()).sqrt().expand(len(c)).clone()
        ),
        "the means over the edits are taken first; every edit has a score of its own": lambda c, q: (
            (_least(c).mean() * _least(q).mean()).sqrt().expand(len(c)).clone()
        ),
        "the mean over the edits is taken; return one score for each": lambda c, q: (_least(c) * _least(q)).sqrt().mean(),
        "the sub-scores are multiplied; only the least of them counts": lambda c, q: (c.prod(1) * q.prod(1)).sqrt(),
        "quality is left out": lambda c, q: _least(c),
    },
)
