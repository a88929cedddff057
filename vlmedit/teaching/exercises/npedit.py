"""Notebook 05: the losses' gradients sent back once, what the fake score learns from, and the rows that ask for nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlmedit.equations.dmd import fake_score_loss
from vlmedit.flow import interpolate
from vlmedit.methods.npedit import nothing_loss
from vlmedit.teaching.checking import Exercise

# one backward


def send_back(output: Tensor, losses: Mapping[str, Callable[[Tensor], Tensor]], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The weighted gradient of each loss at `output`; their sum goes back through the graph of `output`, once."""
    x = output.detach().requires_grad_(True)
    gradients = {name: torch.autograd.grad(weights[name] * loss(x), x)[0] for name, loss in losses.items()}
    output.backward(sum(gradients.values()))
    return gradients


LOSSES = {
    "pull": lambda x: (x - 0.5).square().mean(),
    "yes": lambda x: torch.nn.functional.softplus(-3 * x.flatten(1).sum(1)).mean(),
    "same": lambda x: (x - 1).abs().flatten(1).mean(1)[::2].mean(),
}


def back_cases() -> list[tuple[Tensor, dict, dict]]:
    """Outputs of a two-call unroll of one layer. `output.source` is the layer's weight, `output.passes` counts the backward passes."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    for shape, names, weights in (((4, 3), ("pull", "yes", "same"), (1.0, 0.15, 5.0)), ((2, 3, 2, 2), ("pull", "yes"), (0.5, 2.0)), ((3, 2), ("same",), (0.7,))):
        width = shape[1]
        source = torch.randn(width, width, generator=generator).requires_grad_()
        noise = torch.randn(*shape, generator=generator)
        call = lambda x, w=source: x - 0.5 * torch.tanh(torch.einsum("bc...,dc->bd...", x, w))
        output = call(call(noise))
        output.source, output.passes = source, []
        output.register_hook(lambda g, passes=output.passes: passes.append(g.shape))
        cases.append((output, {n: LOSSES[n] for n in names}, dict(zip(names, weights))))
    return cases


def what_arrived(gradients: dict[str, Tensor], arguments: tuple) -> tuple:
    """The gradients at the output, the gradient at the weight, and how often the unroll was passed."""
    output, losses, _ = arguments
    passes = len(output.passes)
    arrived = output.source.grad
    at_output = gradients if not isinstance(gradients, dict) else tuple(gradients.get(n) for n in losses)
    return at_output, torch.zeros_like(output.source) if arrived is None else arrived, passes


def _gradients(output: Tensor, losses: Mapping, weights: Mapping) -> dict[str, Tensor]:
    x = output.detach().requires_grad_(True)
    return {n: torch.autograd.grad(weights[n] * f(x), x)[0] for n, f in losses.items()}


def _sends(combined: Callable[[dict[str, Tensor], Mapping], Tensor], returned: Callable[[dict[str, Tensor], Mapping], dict] = lambda g, w: g) -> Callable:
    """Right gradients, combined or returned in another way."""

    def send(output: Tensor, losses: Mapping, weights: Mapping) -> dict[str, Tensor]:
        gradients = _gradients(output, losses, weights)
        output.backward(combined(gradients, weights))
        return returned(gradients, weights)

    return send


def _loss_by_loss(output: Tensor, losses: Mapping, weights: Mapping) -> dict[str, Tensor]:
    gradients = _gradients(output, losses, weights)
    for g in gradients.values():
        output.backward(g, retain_graph=True)
    return gradients


def _nowhere(output: Tensor, losses: Mapping, weights: Mapping) -> dict[str, Tensor]:
    x = output.detach().requires_grad_(True)
    gradients = _gradients(output, losses, weights)
    sum(weights[n] * f(x) for n, f in losses.items()).backward()
    return gradients


SEND_BACK = Exercise(
    send_back,
    back_cases,
    {
        "every loss is sent back by itself: the same gradient at the price of one pass through the unroll each": _loss_by_loss,
        "nothing reaches the student: the sum goes back into the detached copy, or nowhere": _nowhere,
        "the weights are left out": lambda output, losses, weights: send_back(output, losses, dict.fromkeys(weights, 1.0)),
        "the weights count twice: in the loss and again in the sum": _sends(lambda g, w: sum(w[n] * v for n, v in g.items())),
        "the gradients are averaged; the losses are added": _sends(lambda g, w: sum(g.values()) / len(g)),
        "only the last loss goes back": _sends(lambda g, w: list(g.values())[-1]),
        "the sign is flipped: `backward` adds gradients, the optimizer walks against them": _sends(lambda g, w: -sum(g.values())),
        "each gradient is scaled to length 1: the losses' weights mean nothing then": _sends(lambda g, w: sum(v / v.norm() for v in g.values())),
        "the gradients that are returned lack their weights": _sends(lambda g, w: sum(g.values()), lambda g, w: {n: v / w[n] for n, v in g.items()}),
    },
    observe=what_arrived,
)


# the fake score's update


class Requests(NamedTuple):
    """What `fake_loss` reads of a batch, and what else it could read by mistake."""

    reference: Tensor
    instruction: Tensor
    reference_caption: Tensor
    target_caption: Tensor


def fake_loss(fake: nn.Module, output: Tensor, batch: Any, t: Tensor, eps: Tensor) -> Tensor:
    """Flow matching of the fake score on the student's own pictures, detached, with the target caption; a scalar."""
    return fake_score_loss(fake, output, batch.target_caption, t, eps)


def _wide(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.ndim - 1))


class Listener(nn.Module):
    """A velocity with one weight that depends on place, time and text."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.8))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return torch.sin(self.weight * x + _wide(t, x).square()) + 0.2 * _wide(text.float().mean(1), x)


LISTENER = Listener()


def fake_cases() -> list[tuple[nn.Module, Tensor, Requests, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    cases = []
    for shape in ((5, 2), (3, 3, 4, 4), (1, 2)):
        words = [torch.randint(1, 9, (shape[0], 3), generator=generator) + 10 * k for k in range(3)]
        t = torch.rand(shape[0], generator=generator) * 0.4 + 0.05  # never 0.5, where both directions of time agree
        # the student's pictures carry a graph, as after an unroll
        cases.append((LISTENER, draw(*shape).requires_grad_(), Requests(draw(*shape), *words), t, draw(*shape)))
    return cases


def value_and_slopes(loss: Tensor, arguments: tuple) -> tuple[Tensor, ...]:
    """The loss, what arrives at the fake's weight, and what arrives at the student's pictures (zeros where nothing does)."""
    inputs = (arguments[0].weight, arguments[1])
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return loss, *(torch.zeros_like(v) for v in inputs)
    found = torch.autograd.grad(loss.sum(), inputs, allow_unused=True)
    return loss, *(torch.zeros_like(v) if g is None else g for v, g in zip(inputs, found))


def _taught(text: str = "target_caption", sample: Callable = lambda x, b: x.detach(), goal: Callable = lambda x, e: e - x, seen: Callable = interpolate) -> Callable:
    """The fake's loss of which one part can be done differently."""

    def loss(fake: nn.Module, output: Tensor, batch: Requests, t: Tensor, eps: Tensor) -> Tensor:
        x = sample(output, batch)
        words = getattr(batch, text) if text else torch.zeros_like(batch.target_caption)
        return (fake(seen(x, eps, t), t, words) - goal(x, eps)).square().mean()

    return loss


FAKE_LOSS = Exercise(
    fake_loss,
    fake_cases,
    {
        "the samples are not detached: the student would be taught to be easy for its own critic": _taught(sample=lambda x, b: x),
        "the fake reads the reference's caption; it must judge by the same text as the teacher does": _taught("reference_caption"),
        "the fake reads the instruction; a text-to-image model knows captions": _taught("instruction"),
        "the fake reads no caption; it must judge by the same text as the teacher does": _taught(""),
        "the fake learns from the references; it must follow what the student draws now": _taught(sample=lambda x, b: b.reference),
        "the target is the picture; the network predicts the velocity": _taught(goal=lambda x, e: x),
        "the target has the wrong sign: the velocity points from data to noise": _taught(goal=lambda x, e: x - e),
        "time runs the wrong way: t = 0 is data": _taught(seen=lambda x, e, t: interpolate(e, x, t)),
        "the fake sees clean pictures; it must see them at level t": _taught(seen=lambda x, e, t: x),
        "the target is taken from the references": lambda fake, output, batch, t, eps: (
            (fake(interpolate(output.detach(), eps, t), t, batch.target_caption) - (eps - batch.reference)).square().mean()
        ),
        "no graph is left: the fake learns nothing": lambda fake, output, batch, t, eps: fake_loss(fake, output, batch, t, eps).detach(),
    },
    observe=value_and_slopes,
)


# the rows that ask for nothing


def nothing_cases() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    cases = []
    # a batch as large as the side, so that a wrong broadcast runs; a batch without such a row; points in a plane
    for shape, rows in (((4, 3, 4, 4), (0, 1, 0, 0)), ((3, 3, 4, 4), (1, 0, 1)), ((5, 2), (0, 1, 1, 0, 0)), ((2, 3, 2, 2), (0, 0)), ((2, 2), (1, 1))):
        cases.append((draw(*shape).requires_grad_(), draw(*shape), torch.tensor(rows, dtype=torch.float32)))
    return cases


def loss_and_slope(loss: Tensor, arguments: tuple) -> tuple[Tensor, Tensor]:
    """The loss and its derivative by the output; what is not a number is made a large one, which can be compared."""
    output = arguments[0]
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return loss, torch.zeros_like(output)
    (slope,) = torch.autograd.grad(loss.sum(), output, allow_unused=True)
    return loss.nan_to_num(1e3), torch.zeros_like(output) if slope is None else slope.nan_to_num(1e3)


def _distance(output: Tensor, reference: Tensor) -> Tensor:
    """(B,)"""
    return (output - reference).square().flatten(1).mean(1)


NOTHING_LOSS = Exercise(
    nothing_loss,
    nothing_cases,
    {
        "every row is held to its reference: that forbids all edits": lambda x, y, n: _distance(x, y).mean(),
        "the other rows are held to their references": lambda x, y, n: (_distance(x, y) * (1 - n)).mean(),
        "the mean goes over the rows that ask for nothing; it goes over the batch": lambda x, y, n: (_distance(x, y) * n).sum() / n.sum().clamp(min=1),
        "without such a row the mean is over nothing, which is not a number": lambda x, y, n: _distance(x, y)[n > 0].mean() * n.mean(),
        "the pixels are summed; take their mean": lambda x, y, n: ((x - y).square().flatten(1).sum(1) * n).mean(),
        "the rows are summed; take their mean": lambda x, y, n: (_distance(x, y) * n).sum(),
        "the difference is not squared": lambda x, y, n: ((x - y).abs().flatten(1).mean(1) * n).mean(),
        "that is the root of the mean square; its slope does not fade near the reference": lambda x, y, n: (_distance(x, y).sqrt() * n).mean(),
        "the sign is flipped: descent leaves the reference": lambda x, y, n: -(_distance(x, y) * n).mean(),
        "the output is detached: nothing reaches the student": lambda x, y, n: nothing_loss(x.detach(), y, n),
        "`nothing` is multiplied onto the last axis, the picture's columns, not onto the rows of the batch": lambda x, y, n: (
            ((x - y).square() * n).mean() if x.shape[-1] == len(n) else nothing_loss(x, y, n)
        ),
    },
    observe=loss_and_slope,
)
