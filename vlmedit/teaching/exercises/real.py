"""Notebook 08: latents as tokens, the two rows of the output layer that matter, and what stands in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlmedit.cost.counting import Sizes, standing
from vlmedit.networks.backbones._base import pack
from vlmedit.networks.judges import two_row_margin
from vlmedit.teaching.checking import Exercise

# packing


def pack_cases() -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(*shape, generator=generator),) for shape in ((1, 3, 4, 6), (2, 4, 6, 4), (3, 1, 2, 8))]


def _squares(x: Tensor, *order: int) -> Tensor:
    """(B, C, rows, dy, columns, dx) permuted to (B, ...) and flattened to tokens."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, *order).reshape(b, h * w // 4, 4 * c)


PACK = Exercise(
    pack,
    pack_cases,
    {
        "within a token the channel comes last; it comes first, then the row, then the column": lambda x: _squares(x, 2, 4, 3, 5, 1),
        "within a token row and column are swapped": lambda x: _squares(x, 2, 4, 1, 5, 3),
        "the tokens run down the columns; they run along the rows": lambda x: _squares(x, 4, 2, 1, 3, 5),
        "a reshape without a permutation: a token is then no square of the picture": lambda x: x.reshape(len(x), -1, 4 * x.shape[1]),
        "a token is a strip of four latents of one row; it is a 2x2 square": lambda x: (
            x.reshape(len(x), x.shape[1], -1, 4).transpose(1, 2).reshape(len(x), -1, 4 * x.shape[1])
        ),
        "tokens and their values are swapped: (B, tokens, values) is asked": lambda x: pack(x).transpose(1, 2),
        "within a token the row comes before the channel": lambda x: _squares(x, 2, 4, 3, 1, 5),
        "it halves the picture by averaging; packing loses nothing": lambda x: torch.nn.functional.avg_pool2d(x, 2).repeat(1, 4, 1, 1).flatten(2).transpose(1, 2),
    },
)

# the answer


def margin_cases() -> list[tuple[Tensor, Tensor, Tensor, int, int]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    return [
        (draw(3, 7, 5), torch.tensor([7, 4, 2]), draw(11, 5), 9, 2),
        (draw(2, 5, 8), torch.tensor([3, 4]), draw(6, 8), 0, 4),
        (draw(1, 4, 3), torch.tensor([2]), draw(3, 3), 2, 1),
    ]


def _at(index: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """The margin of states picked at another place."""

    def wrong(states: Tensor, lengths: Tensor, weight: Tensor, yes: int, no: int) -> Tensor:
        return states[torch.arange(len(states)), index(states, lengths)] @ (weight[yes] - weight[no])

    return wrong


def _logits(states: Tensor, lengths: Tensor, weight: Tensor) -> Tensor:
    return states[torch.arange(len(states)), lengths - 1] @ weight.T


TWO_ROW_MARGIN = Exercise(
    two_row_margin,
    margin_cases,
    {
        "the sign is flipped: yes minus no is asked": lambda s, n, w, yes, no: two_row_margin(s, n, w, no, yes),
        "the state is read at the end of the padded row; shorter rows end earlier": _at(lambda s, n: torch.full_like(n, s.shape[1] - 1)),
        "the state is read one place behind the end": _at(lambda s, n: n.clamp(max=s.shape[1] - 1)),
        "the state is read one place too early": _at(lambda s, n: n - 2),
        "the longest row's end is used for every row": _at(lambda s, n: n.max().expand(len(n)) - 1),
        "the state is read at the first place": _at(lambda s, n: torch.zeros_like(n)),
        "states are averaged over the row": lambda s, n, w, yes, no: s.mean(1) @ (w[yes] - w[no]),
        "only the logit of yes is returned": lambda s, n, w, yes, no: _logits(s, n, w)[:, yes],
        "probabilities are subtracted, and all words normalise them": lambda s, n, w, yes, no: (p := _logits(s, n, w).softmax(1))[:, yes] - p[:, no],
        "that is the probability of yes; the logits' difference is asked": lambda s, n, w, yes, no: two_row_margin(s, n, w, yes, no).sigmoid(),
    },
)

# memory


def standing_cases() -> list[tuple[Sizes, str, int, int, int]]:
    return [
        (Sizes(6000, 14000, 4000, 90), "modules", 2, 2, 4),
        (Sizes(6000, 14000, 4000, 90), "adapters", 2, 2, 4),
        (Sizes(1700, 300, 0, 21), "modules", 4, 3, 8),
        (Sizes(1700, 300, 0, 21), "adapters", 4, 3, 8),
    ]


def _stands(backbones: Callable[[Sizes, bool], int], trained: Callable[[Sizes, bool], int], judged: bool = False) -> Callable:
    """A count with other numbers of backbone weights, or of trained ones."""

    def wrong(sizes: Sizes, roles: str, weight: int, gradient: int, moments: int) -> dict[str, int]:
        lora = roles == "adapters"
        learnt = trained(sizes, lora)
        given = {"backbone weights": weight * backbones(sizes, lora), "judge and encoders": weight * (sizes.judge + sizes.rest)}
        return given | {"gradients": gradient * (learnt + judged * sizes.judge), "moments": moments * learnt}

    return wrong


_weights = lambda s, lora: s.backbone + 2 * s.adapter if lora else 3 * s.backbone
_learnt = lambda s, lora: 2 * (s.adapter if lora else s.backbone)

STANDING = Exercise(
    standing,
    standing_cases,
    {
        "the teacher's weights are missing": _stands(lambda s, lora: _weights(s, lora) - s.backbone, _learnt),
        "the teacher is given gradients and moments; it is frozen": _stands(_weights, lambda s, lora: _learnt(s, lora) + s.backbone),
        "the fake score is trained as well: its gradients and moments are missing": _stands(_weights, lambda s, lora: _learnt(s, lora) // 2),
        "with adapters the base is frozen: it has no gradients and no moments": _stands(_weights, lambda s, lora: _learnt(s, lora) + lora * s.backbone),
        "with adapters all roles share one base": _stands(lambda s, lora: 3 * s.backbone + lora * 2 * s.adapter, _learnt),
        "the adapters themselves are weights too": _stands(lambda s, lora: s.backbone if lora else 3 * s.backbone, _learnt),
        "the judge passes a gradient on and keeps none for its weights": _stands(_weights, _learnt, judged=True),
        "the moments are doubled: `moments` is the bytes of both": lambda s, roles, w, g, m: standing(s, roles, w, g, 2 * m),
        "text encoder and autoencoder are missing": lambda s, roles, w, g, m: standing(Sizes(s.backbone, s.judge, 0, s.adapter), roles, w, g, m) if s.rest else {},
    },
)
