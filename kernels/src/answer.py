"""The judge's answer and its loss in one pass: one state times two rows of the language head, and the binary cross-entropy with its gain.

    l_a = h . w_a  (with a cap: cap tanh(l_a / cap), as Gemma 2 has it);   m = l_yes - l_no
    loss = -log sigmoid(gain m (2 answer - 1))                                   [arXiv:2510.14978, Eq. 4; the gain is its code's]
h is the state at the answer's position. The head has 150,000 rows and the answer needs two, so no logits are made, and neither a copy of
the states at the answers nor float32 copies of the rows. Kept are three numbers per question, the slopes of the
loss and of the two logits; the backward pass writes the gradient of the states at once, the zeros of all other positions included.

Shapes: states (N, L, d), any strides with a dense last axis; weight (V, d); position, answer (N,); loss and margin (N,) in float32
(float64 for float64), in which all is computed. The head is frozen: no gradient to `weight`. Deterministic: sums go within one program.
Positions outside the sequence raise ValueError on a CPU; on a GPU, where looking would wait for it, they give NaN. Deviates: nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from vlmedit.kernels.dispatch import (
    accumulator,
    cdiv,
    exact,
    launch,
    rows_contiguous,
    same_device,
    same_kind,
    shaped,
    tl,
    triton,
    use_triton,
    wide,
)

BLOCK = 1024  # values per step of a dot product, and per program of the backward pass
WHOLE = (torch.int32, torch.int64)


def answer_loss_reference(
    states: Tensor, weight: Tensor, position: Tensor, answer: Tensor, yes: int, no: int, gain: float = 1.0, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """(loss, margin) in plain torch: gather, two rows, softplus."""
    last = states[torch.arange(len(states), device=states.device), position].to(wide(states))
    with exact(states):
        logits = last @ weight[[yes, no]].to(last.dtype).T
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    margin = logits[:, 0] - logits[:, 1]
    return F.softplus(-gain * margin * (2 * answer.to(margin.dtype) - 1)), margin


@triton.jit
def _tanh(x):
    """As accurate near 0 as elsewhere: a series below 0.3, whose next term is 5e-8 of it."""
    low = tl.exp(-2 * tl.abs(x))
    far = (1 - low) / (1 + low)
    far = tl.where(x < 0, -far, far)
    s = x * x
    return tl.where(s < 0.09, x * (1 - s * (1 / 3 - s * (2 / 15 - s * (17 / 315 - s * (62 / 2835))))), far)


@triton.jit
def _forward(
    states, weight, position, answer, loss, margin, slopes, gain, cap, length, width, yes, no, states_n, states_l,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program per question. `yes` and `no` say where the two rows of the head begin."""
    n = tl.program_id(0).to(tl.int64)
    place = tl.load(position + n).to(tl.int64)
    within = tl.minimum(tl.maximum(place, 0), length - 1)
    to_yes = tl.zeros((BLOCK,), ACC)
    to_no = tl.zeros((BLOCK,), ACC)
    for begin in range(0, width, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < width
        h = tl.load(states + n * states_n + within * states_l + at, mask=inside, other=0.0).to(ACC)
        to_yes += h * tl.load(weight + yes + at, mask=inside, other=0.0).to(ACC)
        to_no += h * tl.load(weight + no + at, mask=inside, other=0.0).to(ACC)
    l_yes = tl.sum(to_yes, 0)
    l_no = tl.sum(to_no, 0)
    of_yes = tl.full((), 1.0, ACC)  # the slopes of the two logits
    of_no = tl.full((), 1.0, ACC)
    if CAPPED:
        bent = _tanh(l_yes / cap)
        l_yes = cap * bent
        of_yes = 1 - bent * bent
        bent = _tanh(l_no / cap)
        l_no = cap * bent
        of_no = 1 - bent * bent
    m = tl.where(place == within, l_yes - l_no, float("nan"))
    sign = gain * (2 * tl.load(answer + n).to(ACC) - 1)
    z = -sign * m
    low = tl.exp(-tl.abs(z))
    wrong = tl.where(z > 0, 1 / (1 + low), low / (1 + low))  # sigmoid(z), the probability of the wrong answer
    one = 1 + low
    more = tl.where(one == 1, low, tl.log(one) * (low / tl.where(one == 1, 1.0, one - 1)))  # log(1 + low) for a small `low` too [Kahan]
    tl.store(loss + n, tl.where(z < 0, 0.0, z) + more)  # as softplus, and a NaN stays one
    tl.store(margin + n, m)
    tl.store(slopes + 3 * n, -sign * wrong)
    tl.store(slopes + 3 * n + 1, of_yes)
    tl.store(slopes + 3 * n + 2, of_no)


@triton.jit
def _backward(
    grad_loss, grad_margin, slopes, weight, position, grad, size, width, yes, no, loss_n, margin_n,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One block of one question's `size` values: zeros, and the gradient where the answer stands."""
    i, n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = i * BLOCK + tl.arange(0, BLOCK)
    column = at - tl.load(position + n).to(tl.int64) * width
    here = (column >= 0) & (column < width)
    to_margin = tl.load(grad_loss + n * loss_n).to(ACC) * tl.load(slopes + 3 * n) + tl.load(grad_margin + n * margin_n).to(ACC)
    w_yes = tl.load(weight + yes + column, mask=here, other=0.0).to(ACC)
    w_no = tl.load(weight + no + column, mask=here, other=0.0).to(ACC)
    pull = to_margin * (tl.load(slopes + 3 * n + 1) * w_yes - tl.load(slopes + 3 * n + 2) * w_no)
    value = tl.where(here, pull, 0.0)  # a NaN of this question's stays at its place
    tl.store(grad + n * size + at, value.to(grad.dtype.element_ty), mask=at < size)


def _look(position: Tensor, length: int) -> None:
    """Raises ValueError for a position outside the sequence, on a CPU."""
    if not position.is_cuda and position.numel() and not bool(((position >= 0) & (position < length)).all()):
        raise ValueError(f"answer_loss: position runs from {int(position.min())} to {int(position.max())}; the sequence has 0 to {length - 1}")


@torch.library.custom_op("vlmedit::answer_loss", mutates_args=())
def _op(states: Tensor, weight: Tensor, position: Tensor, answer: Tensor, yes: int, no: int, gain: float, cap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, margin, and the slopes (N, 3): of the loss by the margin, of the margin by either dot product."""
    count, length, width = states.shape
    _look(position, length)
    loss, margin, slopes = (states.new_empty(shape, dtype=wide(states)) for shape in ((count,), (count,), (count, 3)))
    if not count:
        return loss, margin, slopes
    if use_triton(states, True, ""):
        states, weight = rows_contiguous(states), rows_contiguous(weight)
        launch(
            _forward, (count,), states, states, weight, position.contiguous(), answer.contiguous(), loss, margin, slopes, gain, 1.0 if cap is None else cap, length, width,
            yes * weight.stride(0), no * weight.stride(0), *states.stride()[:2], CAPPED=cap is not None, BLOCK=BLOCK, ACC=accumulator(states), num_warps=4,
        )  # fmt: skip
        return loss, margin, slopes
    valid = (position >= 0) & (position < length)  # all of them on a CPU
    found = answer_loss_reference(states, weight, position.clamp(0, length - 1), answer, yes, no, gain, cap)
    for out, value in zip((loss, margin), found):
        out.copy_(value.masked_fill(~valid, torch.nan))
    sign = gain * (2 * answer.to(loss.dtype) - 1)
    slopes[:, 0] = -sign * torch.sigmoid(-sign * margin)
    slopes[:, 1:] = 1
    if cap is not None:
        rows = states[torch.arange(count, device=states.device), position.clamp(0, length - 1)].to(loss.dtype)
        with exact(states):
            slopes[:, 1:] = 1 - torch.tanh(rows @ weight[[yes, no]].to(loss.dtype).T / cap).square()
    return loss, margin, slopes


@_op.register_fake
def _(states, weight, position, answer, yes, no, gain, cap):
    count = states.shape[0]
    return tuple(states.new_empty(shape, dtype=wide(states)) for shape in ((count,), (count,), (count, 3)))


@torch.library.custom_op("vlmedit::answer_loss_backward", mutates_args=())
def _op_backward(grad_loss: Tensor, grad_margin: Tensor, slopes: Tensor, weight: Tensor, position: Tensor, length: int, yes: int, no: int) -> Tensor:
    """Gradient of the states (N, L, d), in the dtype of the head."""
    count, width = len(slopes), weight.shape[1]
    if count and use_triton(slopes, True, ""):
        grad, weight = weight.new_empty(count, length, width), rows_contiguous(weight)
        launch(
            _backward, (cdiv(length * width, BLOCK), count), slopes, grad_loss, grad_margin, slopes, weight, position.contiguous(), grad, length * width, width,
            yes * weight.stride(0), no * weight.stride(0), grad_loss.stride(0), grad_margin.stride(0), BLOCK=BLOCK, ACC=accumulator(weight), num_warps=4,
        )  # fmt: skip
        return grad
    grad = weight.new_zeros(count, length, width)
    w_yes, w_no = weight[[yes, no]].to(slopes.dtype)
    of_loss, of_yes, of_no = slopes.unbind(1)
    pull = (grad_loss * of_loss + grad_margin).unsqueeze(1) * (of_yes.unsqueeze(1) * w_yes - of_no.unsqueeze(1) * w_no)
    grad[torch.arange(count, device=grad.device), position.clamp(0, length - 1)] = pull.to(grad.dtype)
    return grad


@_op_backward.register_fake
def _(grad_loss, grad_margin, slopes, weight, position, length, yes, no):
    return weight.new_empty(slopes.shape[0], length, weight.shape[1])


def _setup(ctx, inputs, output):
    states, weight, position, _, ctx.yes, ctx.no, _, _ = inputs
    ctx.length = states.shape[1]
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[2], weight, position)


def _gradients(ctx, grad_loss, grad_margin, grad_slopes):
    return _op_backward(grad_loss, grad_margin, *ctx.saved_tensors, ctx.length, ctx.yes, ctx.no), *(None,) * 7


_op.register_autograd(_gradients, setup_context=_setup)


def answer_loss(
    states: Tensor, weight: Tensor, position: Tensor, answer: Tensor, yes: int, no: int, gain: float = 1.0, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and margin of each question (N,), with a gradient of the states (N, L, d), through either. `weight` (V, d) is the output layer,
    `position` (N,) where the answer is predicted (length - 1 of a right-padded row), `answer` (N,) 1 for yes and 0 for no. Raises TypeError
    or ValueError for mixed dtypes, devices or shapes, tokens outside the vocabulary, or a head that wants a gradient."""
    same_kind("answer_loss", states=states, weight=weight)
    same_device("answer_loss", states=states, position=position, answer=answer)
    if states.ndim != 3 or 0 in states.shape[1:]:
        raise ValueError(f"answer_loss: states has shape {tuple(states.shape)}; it must be (questions, positions, width), the last two at least 1")
    if weight.ndim != 2 or weight.shape[1] != states.shape[2]:
        raise ValueError(f"answer_loss: weight has shape {tuple(weight.shape)}; it must be (words, {states.shape[2]})")
    if position.dtype not in WHOLE:
        raise TypeError(f"answer_loss: position is {position.dtype}; it must be int32 or int64")
    if answer.is_complex():
        raise TypeError(f"answer_loss: answer is {answer.dtype}; it must be real, 1 for yes and 0 for no")
    for name, t in (("position", position), ("answer", answer)):
        shaped("answer_loss", name, t, states.shape[:1])
    for name, t in (("weight", weight), ("answer", answer)):
        if t.requires_grad:
            raise ValueError(f"answer_loss: {name} requires a gradient, which a frozen judge has none of; detach it")
    for name, token in (("yes", yes), ("no", no)):
        if not 0 <= token < weight.shape[0]:
            raise ValueError(f"answer_loss: {name} is token {token}; the output layer has 0 to {weight.shape[0] - 1}")
    if yes == no:
        raise ValueError(f"answer_loss: yes and no are both token {yes}; the margin needs two")
    if cap is not None and not cap > 0:
        raise ValueError(f"answer_loss: cap is {cap}; it must be above 0, or None")
    loss, margin, _ = _op(states, weight, position, answer.to(wide(states)), yes, no, gain, cap)
    return loss, margin
