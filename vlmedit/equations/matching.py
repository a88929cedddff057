"""Distribution matching in other words than DMD's: what may stand in its place, by name (`NPEditConfig.matching`).

Each objective is a function of the student's pictures x, with a graph, that returns a scalar; its derivative at x is what goes back
through the unroll. Below mu_r and mu_f are the teacher's (guided) and the fake score's clean estimates of x_t = (1 - t) x + t eps.

* `dmd`           reverse KL: (mu_f - mu_r) / mean|x - mu_r|, a constant                                       [arXiv:2311.18828]
* `f-js`          the same times h(r) = f''(r) r^2, for Jensen-Shannon r / (1 + r), with r = teacher / student density at x_t told by
                  a discriminator: a linear head on the fake's features halfway, as f-distill                   [arXiv:2502.15681]
* `sid`           (mu_r - mu_f)^T [(mu_r - x) - a (mu_r - mu_f)] / mean|x - mu_r|, through both networks         [arXiv:2404.04057]
                  For an exact mu_f and a = 1/2 its gradient is half that of the Fisher divergence E|mu_r - mu_f|^2.
* `pseudo-huber`  D^T (x - mu_f) / sqrt(|D|^2 + k^2), D = mu_f - mu_r frozen nets, through x_t: the gradient of the score divergence
                  E[sqrt(|D|^2 + k^2) - k] at the student's own pictures; Diff-Instruct* is this plus a reward   [arXiv:2410.20898]
* `gan`           no score: E softplus(-log r(x_t)), what DMD2 adds to DMD, by itself; r as in `f-js`            [arXiv:2405.14867]
* `mmd`           E k(f, f') - 2 E k(f, g) + E k(g, g'): no score, no fake updates; f and g are features of the student's pictures with
                  their target captions and of references with theirs, read off the frozen teacher              [arXiv:2301.07969]

DMD2 is `dmd` with `NPEditConfig.gan_weight`: any objective with a fake score may have `gan_loss` added.

Shapes: x, eps (B, 3, S, S); t (B,); text (B, L) ids. Losses are means over pixels, as DMD's.
Deviates: `sid` and `pseudo-huber` weigh all t alike (w = 1 in clean-estimate units); `f-js` has no GAN term for the student, and divides
its weights by their mean over the batch, not the ratio by its mean per t; `mmd` reads features of the teacher (the source: of an image
encoder) and adds the caption to them; DMD2's discriminator is three convolutions on the fake's features, here it is one linear map.
No objective sees a target picture: what stands for real pictures are the references.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmedit.equations.dmd import dmd_gradient, dmd_loss, dmd_scores, guided_velocity
from vlmedit.flow import interpolate, to_x0

SID_ALPHA = 1.0  # the paper's own range is .5 to 1.2
HUBER = 0.02  # k, in root-mean-square pixels
WIDTHS = (0.25, 1.0, 4.0)  # of the MMD's kernels, in median squared distances
FEATURE_TIME = 0.1  # level at which the teacher reads a picture's features


@dataclass(frozen=True)
class MatchingContext:
    """What an objective may look at besides the student's pictures."""

    teacher: nn.Module
    fake: nn.Module
    text: Tensor  # (B, L) ids of the captions that the pictures should fulfil
    t: Tensor  # (B,)
    eps: Tensor  # like the pictures
    guidance: float | Tensor = 1.0  # of the teacher; one scale, or (B,) one per row
    norm: str = "sample"  # DMD's normalizer
    real: Tensor | None = None  # references: real pictures
    real_text: Tensor | None = None  # their captions


def estimates(x: Tensor, s: MatchingContext) -> tuple[Tensor, Tensor]:
    """mu_r (guided) and mu_f of the noised pictures, with a graph back to x."""
    x_t = interpolate(x, s.eps, s.t)
    v = guided_velocity(s.teacher, x_t, s.t, s.text, s.guidance)
    return to_x0(x_t, v, s.t), to_x0(x_t, s.fake(x_t, s.t, s.text), s.t)


def per_sample(values: Tensor) -> Tensor:
    """Mean over all but the first axis, shaped to broadcast."""
    return values.mean(tuple(range(1, values.ndim)), keepdim=True)


def dmd(x: Tensor, s: MatchingContext) -> Tensor:
    real, fake = dmd_scores(x, s.text, s.teacher, s.fake, s.guidance, s.t, s.eps)
    return dmd_loss(x, dmd_gradient(x, real, fake, s.norm))


def sid_loss(x: Tensor, real: Tensor, fake: Tensor, alpha: float = SID_ALPHA, normalized: bool = True) -> Tensor:
    """Both estimates keep their graphs; the normalizer is a constant."""
    gap = real - fake
    scale = per_sample((x - real).abs()).clamp(min=1e-6).detach() if normalized else 1.0
    return (gap * ((real - x) - alpha * gap) / scale).mean()  # Eq. SiD [arXiv:2404.04057]


def sid(x: Tensor, s: MatchingContext) -> Tensor:
    return sid_loss(x, *estimates(x, s))


def pseudo_huber_loss(x: Tensor, real: Tensor, fake: Tensor, k: float = HUBER) -> Tensor:
    """-d'(D)^T (mu_f - x) with d(D) = sqrt(mean D^2 + k^2) - k; everything keeps its graph."""
    gap = fake - real
    return (gap * (x - fake) / (per_sample(gap.square()) + k * k).sqrt()).mean()  # Eq. pseudo-Huber [arXiv:2410.20898]


def pseudo_huber(x: Tensor, s: MatchingContext) -> Tensor:
    return pseudo_huber_loss(x, *estimates(x, s))


# the density ratio


def ratio_head(width: int) -> nn.Linear:
    """A head for the fake's features halfway: log r of every patch, 0 before it has learnt anything."""
    head = nn.Linear(width, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def log_ratio(fake: nn.Module, x_t: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """log r = log teacher - log student density of x_t, (B,), and the velocity that the same call gives."""
    v, patches = fake(x_t, t, text, with_ground=True)
    return patches.float().mean((1, 2)), v


def ratio_loss(fake: nn.Module, samples: Tensor, text: Tensor, real: Tensor, real_text: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Cross-entropy of telling references from student pictures at level t; least where the logit is the true log r."""
    of_real, _ = log_ratio(fake, interpolate(real, eps, t), t, real_text)
    of_fake, _ = log_ratio(fake, interpolate(samples.detach(), eps, t), t, text)
    return F.softplus(-of_real).mean() + F.softplus(of_fake).mean()  # Eq. discriminator [arXiv:2405.14867]


def js_weight(log_r: Tensor) -> Tensor:
    """f''(r) r^2 of f(r) = r log r - (r + 1) log((r + 1) / 2), which is r / (1 + r)."""
    return log_r.sigmoid()  # Eq. f-JS [arXiv:2502.15681]


def f_js(x: Tensor, s: MatchingContext) -> Tensor:
    real, fake = dmd_scores(x, s.text, s.teacher, s.fake, s.guidance, s.t, s.eps)
    with torch.no_grad():  # the weight is a constant of the student's loss
        weight = js_weight(log_ratio(s.fake, interpolate(x.detach(), s.eps, s.t), s.t, s.text)[0])
        weight = weight / weight.mean()
    return dmd_loss(x, weight.view(-1, *[1] * (x.ndim - 1)) * dmd_gradient(x, real, fake, s.norm))


def gan_loss(x: Tensor, s: MatchingContext) -> Tensor:
    """The generator's non-saturating loss, -log D of the noised pictures with D = sigmoid(log r); the discriminator is the fake's head,
    trained by `ratio_loss`. DMD2 [arXiv:2405.14867]."""
    return F.softplus(-log_ratio(s.fake, interpolate(x, s.eps, s.t), s.t, s.text)[0]).mean()  # Eq. GAN [arXiv:2405.14867]


# the mean discrepancy


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of every row of a (N, d) to every row of b (M, d), (N, M)."""
    return (a[:, None] - b[None]).square().mean(-1)


def kernel(distances: Tensor, widths=WIDTHS) -> Tensor:
    """Mean of Gaussian kernels exp(-d^2 / (2 h))."""
    return torch.stack([(-distances / (2 * h)).exp() for h in widths]).mean(0)


def mmd_squared(xx: Tensor, xy: Tensor, yy: Tensor) -> Tensor:
    """Unbiased squared MMD from the kernel's values within and between two samples: no picture is compared with itself."""
    within = [(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
    return within[0] + within[1] - 2 * xy.mean()  # Eq. MMD [arXiv:2301.07969]


def features(s: MatchingContext, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """What the teacher reads in the patches of a lightly noised picture without its caption, (B, N k), and the caption's states (B, d)."""
    t = torch.full_like(s.t, FEATURE_TIME)
    _, patches = s.teacher(interpolate(x, s.eps, t), t, torch.zeros_like(text), with_ground=True)
    with torch.no_grad():
        words = s.teacher.encode_text(text).mean(1)
    return patches.float().flatten(1), words.float()


def mmd_loss(pictures: Tensor, words: Tensor, real: Tensor, real_words: Tensor, widths=WIDTHS) -> Tensor:
    """MMD of (picture, caption) pairs: squared distances of both parts, each in units of its median over all real and student rows."""
    pairs = ((pictures, real), (words, real_words))
    total = [0.0, 0.0, 0.0]
    for a, b in pairs:
        parts = [squared_distances(a, a), squared_distances(a, b), squared_distances(b, b)]
        unit = torch.cat([p.detach().flatten() for p in parts]).median().clamp(min=1e-6)
        total = [old + part / unit for old, part in zip(total, parts)]
    return mmd_squared(*(kernel(d, widths) for d in total))


def mmd(x: Tensor, s: MatchingContext) -> Tensor:
    with torch.no_grad():
        real, real_words = features(s, s.real, s.real_text)
    return mmd_loss(*features(s, x, s.text), real, real_words)


@dataclass(frozen=True)
class Objective:
    loss: Callable[[Tensor, MatchingContext], Tensor]
    fake: bool = True  # needs a model of the student's own pictures
    ratio: bool = False  # needs the density ratio: the fake's patch head becomes a discriminator


OBJECTIVES = {
    "dmd": Objective(dmd),
    "f-js": Objective(f_js, ratio=True),
    "sid": Objective(sid),
    "pseudo-huber": Objective(pseudo_huber),
    "mmd": Objective(mmd, fake=False),
    "gan": Objective(gan_loss, ratio=True),
}
