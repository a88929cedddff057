"""Notebook 03: the loss on two logits, preprocessing that lets a gradient through, and the adversary's step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmedit.equations.judge_loss import see, yes_no_loss
from vlmedit.equations.search import ascend, size
from vlmedit.teaching.checking import Exercise

# the loss


def answer_loss(logits: Tensor, answer: Tensor, yes: int, no: int, gain: float) -> Tensor:
    """-log p(answer) (N,) from logits (N, V), of which only two words count; see `vlmedit.equations.judge_loss.yes_no_loss`."""
    margin = logits[:, yes] - logits[:, no]
    return F.softplus(-gain * margin * (2 * answer - 1))  # -log sigmoid(gain * margin), or of -margin where no is right


def answer_cases() -> list[tuple[Tensor, Tensor, int, int, float]]:
    generator = torch.Generator().manual_seed(0)
    cases = []
    for rows, words, yes, no, gain in ((6, 7, 2, 3, 1.0), (5, 9, 4, 1, 0.1), (4, 5, 0, 4, 0.55), (1, 3, 2, 0, 1.0)):
        answer = (torch.arange(rows) % 3 > 0).float()  # the first row's is no
        cases.append((3 * torch.randn(rows, words, generator=generator), answer, yes, no, gain))
    return cases


def _margin(logits: Tensor, yes: int, no: int) -> Tensor:
    return logits[:, yes] - logits[:, no]


def _both_alone(logits: Tensor, answer: Tensor, yes: int, no: int, gain: float) -> Tensor:
    right = torch.where(answer > 0, logits[:, yes], logits[:, no])
    return F.softplus(-gain * right)


ANSWER_LOSS = Exercise(
    answer_loss,
    answer_cases,
    {
        "`answer` is ignored: where no is right, the loss asks for yes": lambda z, a, yes, no, g: yes_no_loss(_margin(z, yes, no), torch.ones_like(a), g),
        "the sign is flipped: descent makes the right answer less probable": lambda z, a, yes, no, g: yes_no_loss(-_margin(z, yes, no), a, g),
        "`answer` is 0 or 1 and multiplies the margin: where no is right nothing is left; map it to -1 and 1": lambda z, a, yes, no, g: (
            F.softplus(-g * _margin(z, yes, no) * a)
        ),
        "the softmax goes over the whole vocabulary; only the two answers are compared": lambda z, a, yes, no, g: (
            F.cross_entropy(g * z, torch.where(a > 0, yes, no), reduction="none")
        ),
        "the gain multiplies the loss; it must multiply the margin": lambda z, a, yes, no, g: g * yes_no_loss(_margin(z, yes, no), a),
        "the gain divides the margin, like a temperature; it must multiply it": lambda z, a, yes, no, g: yes_no_loss(_margin(z, yes, no), a, 1 / g),
        "the gain is left out": lambda z, a, yes, no, g: yes_no_loss(_margin(z, yes, no), a),
        "that is 1 - p(answer); take -log p(answer), or a sure wrong answer has no gradient": lambda z, a, yes, no, g: (
            torch.sigmoid(-g * _margin(z, yes, no) * (2 * a - 1))
        ),
        "that is log p(answer), which grows as the answer gets better; a loss is minus that": lambda z, a, yes, no, g: -yes_no_loss(_margin(z, yes, no), a, g),
        "the right answer's logit stands alone; what counts is its distance to the other one's": _both_alone,
        "the mean goes over the rows; every question has a loss of its own": lambda z, a, yes, no, g: (
            yes_no_loss(_margin(z, yes, no), a, g).mean().expand(len(a))
        ),
    },
)


# what the judge sees


def see_cases() -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(1)
    # about a third of the pixels are saturated; smaller, larger and the same side
    return [(torch.randn(*shape, generator=generator).requires_grad_(), side) for shape, side in (((2, 3, 12, 12), 8), ((1, 3, 6, 6), 8), ((3, 3, 8, 8), 8), ((2, 3, 9, 9), 4))]


def value_and_slope(seen: Tensor, arguments: tuple) -> tuple[Tensor, Tensor]:
    """What comes out, and the derivative of a fixed weighted sum of it by the pictures (zeros where none arrives)."""
    pictures = arguments[0]
    if not seen.requires_grad:
        return seen, torch.zeros_like(pictures)
    weights = torch.linspace(-1, 2, seen.numel()).sin().view_as(seen)
    return seen, torch.autograd.grad((seen * weights).sum(), pictures)[0]


def _through(pictures: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    return pictures + (pictures.clamp(low, high) - pictures).detach()


def _resize(pictures: Tensor, side: int, mode: str = "bicubic", antialias: bool = True) -> Tensor:
    return pictures if pictures.shape[-1] == side else F.interpolate(pictures, size=(side, side), mode=mode, antialias=antialias)


SEE = Exercise(
    see,
    see_cases,
    {
        "the clamp kills the gradient of saturated pixels, or its correction is not detached and cancels": lambda x, side: _resize(x.clamp(-1, 1), side),
        "nothing is clamped: the judge is shown values that no picture has": lambda x, side: _resize(x, side),
        "everything is detached: nothing reaches the pixels": lambda x, side: _resize(x.clamp(-1, 1), side).detach(),
        "the range is [-1, 1] here, not [0, 1]": lambda x, side: _resize(_through(x, 0.0), side),
        "the clamp comes after the resize; saturated pixels have smeared into their neighbors by then": lambda x, side: _through(_resize(x, side)),
        "the picture is clamped again after the resize, which the judge's own schooling did not": lambda x, side: _through(_resize(_through(x), side)),
        "there is no antialiasing: a smaller side drops pixels": lambda x, side: _resize(_through(x), side, antialias=False),
        "the resize is bilinear; the released code takes bicubic": lambda x, side: _resize(_through(x), side, "bilinear"),
        "the correction has the wrong sign: saturated pixels are pushed farther out": lambda x, side: _resize(x - (x.clamp(-1, 1) - x).detach(), side),
        "`tanh` is no clamp: it changes every pixel": lambda x, side: _resize(x.tanh(), side),
    },
    observe=value_and_slope,
)


# the adversary's step


def ascend_cases() -> list[tuple[Tensor, Tensor, float, float]]:
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    cases = []
    for shape, start, length, radius in (((4, 3, 4, 4), 0.05, 0.3, 5.0), ((3, 3, 4, 4), 0.3, 0.5, 1.0), ((2, 3, 2, 2), 0.0, 0.4, 2.0), ((1, 1, 3, 3), 1.0, 0.2, 0.7)):
        # gradients of very different lengths, so that one norm for the whole batch shows
        scale = torch.logspace(-2, 1, shape[0]).view(-1, 1, 1, 1)
        cases.append((start * draw(*shape), scale * draw(*shape), length, radius))
    return cases


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)


def _stepped(step: Callable[[Tensor], Tensor] = lambda g: g / _norm(g), back: Callable[[Tensor, float], Tensor] = lambda d, r: d * (r / _norm(d)).clamp(max=1)) -> Callable:
    """The step with another direction, or another way back into the ball."""
    return lambda delta, gradient, length, radius: back(delta + length * step(gradient), radius)


ASCEND = Exercise(
    ascend,
    ascend_cases,
    {
        "it walks downhill; the gradient points to where the value grows": _stepped(lambda g: -g / _norm(g)),
        "the gradient is not normalized: its own length decides how far the step goes": _stepped(lambda g: g),
        "one norm is taken of the whole batch; each picture needs its own": _stepped(lambda g: g / g.norm()),
        "the norm is taken per channel; a picture has one": _stepped(lambda g: g / g.flatten(2).norm(dim=2)[..., None, None].clamp(min=1e-12)),
        "that is the gradient's sign, the step of a ball in the largest pixel; here the ball is Euclidean": _stepped(lambda g: g.sign()),
        "nothing brings it back into the ball": _stepped(back=lambda d, r: d),
        "it is put on the sphere even when it lies inside": _stepped(back=lambda d, r: d * (r / _norm(d))),
        "every pixel is clipped for itself, which makes a cube of the ball": _stepped(back=lambda d, r: d.clamp(-r, r)),
        "the whole batch shares one ball": _stepped(back=lambda d, r: d * (r / d.norm()).clamp(max=1)),
        "the old place is forgotten: the step starts at the center": lambda delta, gradient, length, radius: (
            (lambda d: d * (radius / size(d)).clamp(max=1))(length * gradient / size(gradient))
        ),
    },
)
