"""The fused operations against their references in float64, forward and backward, in Triton's interpreter (on a GPU where one is visible:
`CUDA_VISIBLE_DEVICES=0 pytest tests/kernels/test_kernels.py`), and the folder they lie in.

Tolerances are relative to the largest value of each output: a few roundings of the dtype. Shapes are odd, tiny, wider than one block and
strided; all are small, since the interpreter takes milliseconds per program.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlmedit import flow
from vlmedit.equations import dmd
from vlmedit.networks.dit import Block, rotary_table, rotate
from vlmedit.teaching import checking

kernels = pytest.importorskip("vlmedit.kernels", reason="vlmedit.kernels is not installed; run: pip install --no-deps --no-build-isolation -e .")
from vlmedit.kernels import answer, dispatch, modulation, patches, residual, rope, sampler  # noqa: E402
from vlmedit.kernels import dmd as fused_dmd  # noqa: E402

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}  # float64: scalars are float32; bfloat16: the interpreter does not round, it cuts
needs_triton = pytest.mark.skipif(
    bool(kernels.triton_missing()) or not (kernels.interpreting() or DEVICE == "cuda"),
    reason=kernels.triton_missing() or "triton was imported for compiling and there is no GPU; set TRITON_INTERPRET=1",
)
PATHS = (pytest.param("triton", marks=needs_triton), "reference")


@dataclass(frozen=True)
class Operation:
    """`fused` and `plain` take the same tensors; `make(shape, generator)` draws them in float64; `wanted` are those with gradients."""

    fused: Callable
    plain: Callable
    make: Callable
    shapes: tuple
    wanted: tuple[int, ...]
    fixed: dict = field(default_factory=dict)


def modulation_inputs(shape, draw):
    b, _, d = shape
    return draw(*shape), draw(*shape), draw(b, d), draw(b, d), draw(b, d)


def residual_inputs(shape, draw):
    b, _, d = shape
    return draw(*shape), draw(*shape), draw(b, d), 1 + 0.3 * draw(b, d)


def rope_inputs(shape, draw):
    angle = draw(shape[2], shape[3] // 2)
    return draw(*shape), 1 + 0.3 * draw(shape[3]), angle.cos(), angle.sin()


def tables_inputs(shape, draw):
    angle = draw(shape[0], shape[2], shape[3] // 2)
    return draw(*shape), 1 + 0.3 * draw(shape[3]), angle.cos(), angle.sin()


def dmd_inputs(shape, draw):
    distance = torch.arange(1.0, shape[0] + 1, dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))  # no two samples alike
    t = torch.linspace(0.2, 0.9, shape[0], dtype=torch.float64)
    return draw(*shape), draw(*shape), t, draw(*shape) * distance, draw(*shape), draw(*shape)


def step_inputs(shape, draw):
    t = torch.linspace(0.5, 0.9, shape[0], dtype=torch.float64)
    return draw(*shape), draw(*shape), draw(*shape), draw(*shape), t, t.flip(0) * 0.5


def answer_inputs(shape, draw):
    """Answers first, last and between; yes and no in turn; a head of seven words."""
    n, length, width = shape
    at = torch.arange(n)
    return draw(*shape), draw(7, width), at * (length - 1) // max(n - 1, 1), (at % 2).double()


def picture_inputs(shape, draw):
    c = shape[1]
    return draw(*shape), 0.5 + 0.1 * draw(c), 0.3 + 0.1 * draw(c).abs()  # a third of the pixels is saturated


def without(index: int, make: Callable) -> Callable:
    """The inputs with None at one place."""
    return lambda shape, draw: tuple(None if i == index else v for i, v in enumerate(make(shape, draw)))


TOKENS = ((2, 5, 7), (1, 1, 3), (3, 2, 33))
HEADS = ((2, 3, 5, 6), (1, 1, 1, 2), (1, 2, 3, 20))
PICTURES = ((3, 3, 5, 7), (1, 1, 1, 1), (2, 4, 17, 31), (2, 3))
SEQUENCES = ((3, 5, 7), (1, 1, 1), (2, 3, 1030))
ASKED = {"yes": 5, "no": 2, "gain": 0.4}
OPERATIONS = {
    "gated_adaln": Operation(kernels.gated_adaln, modulation.gated_adaln_reference, modulation_inputs, TOKENS, (0, 1, 2, 3, 4)),
    "adaln": Operation(
        kernels.adaln, lambda x, scale, shift: modulation.gated_adaln_reference(x, None, None, scale, shift)[1],
        lambda shape, draw: (draw(*shape), draw(shape[0], shape[2]), draw(shape[0], shape[2])), TOKENS, (0, 1, 2),
    ),
    "gated_rms": Operation(kernels.gated_rms, residual.gated_rms_reference, residual_inputs, TOKENS, (0, 1, 2, 3)),
    "gated_rms, a plain residual": Operation(kernels.gated_rms, residual.gated_rms_reference, without(2, residual_inputs), TOKENS[:2], (0, 1, 3), {"normed": False, "eps": 1e-6}),
    "gated_rms, gate alone": Operation(kernels.gated_rms, residual.gated_rms_reference, residual_inputs, TOKENS[:1], (0, 1, 2, 3), {"normed": False}),
    "gated_rms, norms alone": Operation(kernels.gated_rms, residual.gated_rms_reference, without(2, residual_inputs), TOKENS[:1], (0, 1, 3)),
    "norm_rope, halves": Operation(kernels.norm_rope, rope.norm_rope_reference, rope_inputs, HEADS, (0, 1)),
    "norm_rope, a table per sample": Operation(kernels.norm_rope, rope.norm_rope_reference, tables_inputs, HEADS[:2], (0, 1), {"interleaved": True}),
    "norm_rope, neighbors": Operation(kernels.norm_rope, rope.norm_rope_reference, rope_inputs, HEADS, (0, 1), {"interleaved": True}),
    "dmd_step, per sample": Operation(kernels.dmd_step, fused_dmd.dmd_step_reference, dmd_inputs, PICTURES, (0,), {"guidance": 3.5}),
    "dmd_step, per pixel": Operation(kernels.dmd_step, fused_dmd.dmd_step_reference, dmd_inputs, PICTURES, (0,), {"guidance": 3.5, "norm": "pixel"}),
    "dmd_step, unguided": Operation(kernels.dmd_step, fused_dmd.dmd_step_reference, without(4, dmd_inputs), PICTURES[:2], (0,)),
    "guided_step": Operation(kernels.guided_step, sampler.guided_step_reference, step_inputs, PICTURES, (0, 1, 2, 3), {"guidance": 3.5}),
    "guided_step, unguided": Operation(kernels.guided_step, sampler.guided_step_reference, without(2, step_inputs), PICTURES[:2], (0, 1, 3)),
    "guided_step, one gradient": Operation(kernels.guided_step, sampler.guided_step_reference, step_inputs, PICTURES[:1], (1,), {"guidance": 3.5}),
    "answer_loss": Operation(kernels.answer_loss, answer.answer_loss_reference, answer_inputs, SEQUENCES, (0,), ASKED),
    "answer_loss, capped": Operation(kernels.answer_loss, answer.answer_loss_reference, answer_inputs, SEQUENCES[:1], (0,), {**ASKED, "cap": 3.0}),
    "vlm_patches, as Qwen-VL": Operation(
        kernels.vlm_patches, patches.vlm_patches_reference, picture_inputs, ((2, 2, 5, 3), (2, 1, 9, 5), (1, 1, 1, 1)), (0,), {"size": (4, 8), "patch": 2, "merge": 2, "frames": 2},
    ),
    "vlm_patches, as SigLIP": Operation(kernels.vlm_patches, patches.vlm_patches_reference, picture_inputs, ((1, 2, 5, 7),), (0,), {"size": (6, 3), "patch": 3, "mode": "bilinear"}),
    "vlm_patches, pixels": Operation(kernels.vlm_patches, patches.vlm_patches_reference, picture_inputs, ((1, 2, 11, 5), (2, 1, 6, 9)), (0,), {"size": (6, 9)}),
}  # fmt: skip


def inputs(op: Operation, shape: tuple, dtype: torch.dtype, strided: bool = False) -> list[Tensor | None]:
    """Drawn in float64 and rounded to `dtype`, whole numbers as they are. `strided`: same values, every tensor a part of one that is larger
    on each axis."""
    generator = torch.Generator().manual_seed(sum(shape))
    cast = lambda v: v.to(DEVICE, dtype if v.is_floating_point() else None)
    drawn = [v if v is None else cast(v) for v in op.make(shape, lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64))]
    if strided:
        drawn = [v if v is None else inner(v) for v in drawn]
    return [v if v is None else v.requires_grad_(i in op.wanted) for i, v in enumerate(drawn)]


def exactly(arguments: list[Tensor | None], op: Operation) -> list[Tensor | None]:
    """The same numbers in float64."""
    wide = lambda i, v: v.detach().double().requires_grad_(i in op.wanted) if v.is_floating_point() else v
    return [v if v is None else wide(i, v) for i, v in enumerate(arguments)]


def inner(v: Tensor) -> Tensor:
    """The same values in a view with gaps between rows; the axes are stored in another order."""
    room = torch.full([n + 2 for n in v.shape], torch.nan if v.is_floating_point() else -99, dtype=v.dtype, device=v.device)
    if v.ndim > 2:
        room = room.transpose(1, 2).contiguous().transpose(1, 2)
    view = room[tuple(slice(1, n + 1) for n in v.shape)]
    return view.copy_(v).detach()


def outputs(function: Callable, arguments: list, op: Operation, cotangents: list[Tensor] | None = None) -> list[Tensor]:
    """Results, then gradients; drawn cotangents, the same at every call, for all results that carry a graph."""
    found = function(*arguments, **op.fixed)
    found = list(found) if isinstance(found, (tuple, list)) else [found]
    live = [f for f in found if f.requires_grad]
    generator = torch.Generator().manual_seed(9)
    cotangents = [torch.randn(f.shape, generator=generator, dtype=torch.float64).to(DEVICE, arguments[0].dtype).to(f.dtype) for f in live]
    return [f.detach() for f in found] + list(torch.autograd.grad(live, [arguments[i] for i in op.wanted], cotangents))


def off(got: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Largest difference of each pair, relative to the largest expected value, which is not zero."""
    assert len(got) == len(expected)
    for g, e in zip(got, expected):
        assert g.shape == e.shape and g.isfinite().all()
    return [float((g.double() - e.double()).abs().max() / e.double().abs().max()) for g, e in zip(got, expected)]


CASES = [pytest.param(op, shape, id=f"{name}, {shape}") for name, op in OPERATIONS.items() for shape in op.shapes]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("op", "shape"), CASES)
def test_equals_the_reference_in_float64(op, shape, path):
    """Values and every gradient in float32, odd shapes, on both paths; none of them is zero where the reference's is not."""
    arguments = inputs(op, shape, torch.float32)
    expected = outputs(op.plain, exactly(arguments, op), op)
    with kernels.backend(path):
        got = outputs(op.fused, arguments, op)
    nonzero = [i for i, e in enumerate(expected) if e.abs().max() > 1e-9]
    assert nonzero and all(got[i].abs().max() > 0 for i in nonzero)
    assert max(off([got[i] for i in nonzero], [expected[i] for i in nonzero])) < TOLERANCE[torch.float32]
    assert all(g.dtype == torch.float32 for g in got)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_dtype_and_any_strides(name, path):
    """Strided inputs whose gaps hold NaN, in each dtype: what is read outside would show."""
    op = OPERATIONS[name]
    for dtype in TOLERANCE:
        arguments = inputs(op, op.shapes[0], dtype, strided=True)
        assert not arguments[0].is_contiguous()
        with kernels.backend(path):
            got = outputs(op.fused, arguments, op)
        worst = max(off(got, outputs(op.plain, exactly(arguments, op), op)))
        assert worst < TOLERANCE[dtype] * (2 if path == "reference" else 1), (dtype, worst)  # plain torch rounds after each step
        assert got[-1].dtype == dtype


@needs_triton
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_cotangent_without_strides(name):
    """`sum().backward()` sends one number, expanded: stride 0 on every axis."""
    op = OPERATIONS[name]
    arguments = inputs(op, op.shapes[0], torch.float32)

    def gradients(function, values):
        found = function(*values, **op.fixed)
        live = [f for f in (found if isinstance(found, tuple) else (found,)) if f.requires_grad]
        return torch.autograd.grad(sum((f * (i + 1)).sum() if f.ndim == 0 else f.sum() for i, f in enumerate(live)), [values[i] for i in op.wanted])

    with kernels.backend("triton"):
        got = gradients(op.fused, arguments)
    expected = gradients(op.plain, exactly(arguments, op))
    nonzero = [i for i, e in enumerate(expected) if e.abs().max() > 1e-9]
    assert nonzero and max(off([got[i] for i in nonzero], [expected[i] for i in nonzero])) < 10 * TOLERANCE[torch.float32]


MIXED = {  # which inputs keep float32 beside half precision
    "gated_adaln": (2, 3, 4), "adaln": (1, 2), "gated_rms": (2, 3), "norm_rope, halves": (2, 3), "norm_rope, neighbors": (1, 2, 3), "dmd_step, per sample": (2,), "dmd_step, per pixel": (2,), "guided_step": (4, 5),
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", MIXED)
def test_times_tables_and_modulation_keep_their_own_dtype(name, path):
    """Half-precision pictures or tokens beside float32 times, tables or modulation, as autocast has them: results have the dtype of the
    former, gradients that of their inputs, and nothing is rounded before it must be."""
    op = OPERATIONS[name]
    for dtype in (torch.float16, torch.bfloat16):
        arguments = inputs(op, op.shapes[0], torch.float32)
        kept = lambda i, v: v if i in MIXED[name] else v.detach().to(dtype).requires_grad_(v.requires_grad)
        arguments = [kept(i, v) for i, v in enumerate(arguments)]
        with kernels.backend(path):
            got = outputs(op.fused, arguments, op)
        expected = outputs(op.plain, exactly(arguments, op), op)
        assert max(off(got, expected)) < TOLERANCE[dtype] * (2 if path == "reference" else 1)
        gradients = got[-len(op.wanted) :]
        assert [g.dtype for g in gradients] == [arguments[i].dtype for i in op.wanted] and got[0].dtype in (dtype, torch.float32)
    if name == "guided_step":  # bfloat16 would make 243 / 256 of this time, and so -1 of the result
        x, v, noise = (torch.full((1, 4), n, dtype=torch.bfloat16, device=DEVICE) for n in (242.0, 256.0, 0.0))
        t, s = torch.tensor([0.9474], device=DEVICE), torch.zeros(1, device=DEVICE)
        with kernels.backend(path):
            assert torch.allclose(kernels.guided_step(x, v, None, noise, t, s).float(), torch.tensor(242 - 0.9474 * 256, device=DEVICE), rtol=0.01)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["gated_adaln", "adaln", "gated_rms", "gated_rms, a plain residual", "norm_rope, halves", "norm_rope, neighbors", "guided_step"])
def test_what_is_frozen_costs_nothing(name, path, monkeypatch):
    """Each input alone wants a gradient: it is the one that all of them got together, the others' are neither computed nor, where the
    modulation is frozen, is the branch kept."""
    op, asked = OPERATIONS[name], []
    real = dispatch.start
    monkeypatch.setattr(dispatch, "start", lambda kernel, grid, *a, **settings: (asked.append(settings), real(kernel, grid, *a, **settings)))
    with kernels.backend(path):
        whole = outputs(op.fused, inputs(op, op.shapes[0], torch.float64), op)[-len(op.wanted) :]
        for place, one in enumerate(op.wanted):
            asked.clear()
            arguments = [v if v is None else v.detach().requires_grad_(i == one) for i, v in enumerate(inputs(op, op.shapes[0], torch.float64))]
            kept: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda v: (kept.append(v.data_ptr()), v)[1], lambda v: v):
                found = op.fused(*arguments, **op.fixed)
            live = [f for f in (found if isinstance(found, tuple) else (found,)) if f.requires_grad]
            generator = torch.Generator().manual_seed(9)
            sent = [torch.randn(f.shape, generator=generator, dtype=torch.float64).to(DEVICE) for f in live]
            (got,) = torch.autograd.grad(live, arguments[one], sent)
            assert whole[place].abs().max() > 0 and torch.allclose(got, whole[place], rtol=1e-6, atol=1e-9)
            if path == "triton":
                flags = {k: v for k, v in asked[-1].items() if k in ("X", "BRANCH", "GATE", "SCALE", "SHIFT", "FACTOR", "WEIGHT", "COND", "UNCOND", "NOISE")}
                assert sum(flags.values()) == 1
            if name == "gated_adaln":
                assert (arguments[1].data_ptr() in kept) == (one == 2)
            if name.startswith("gated_rms"):
                assert (arguments[1].data_ptr() in kept) == (one in (1, 2) and name == "gated_rms")


@needs_triton
def test_more_rows_than_int32_counts_go_to_the_reference(monkeypatch):
    op = OPERATIONS["norm_rope, halves"]
    arguments = inputs(op, op.shapes[0], torch.float32)
    monkeypatch.setattr(rope, "MOST_ROWS", 29)
    assert kernels.norm_rope(*arguments).shape == op.shapes[0]
    with kernels.backend("triton"), pytest.raises(RuntimeError, match="batch x heads x tokens below"):
        kernels.norm_rope(*arguments)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_autocast_changes_nothing(name, path):
    """Operations say themselves in which precision they compute: forward and backward within autocast give what they give without, bit by bit."""
    op = OPERATIONS[name]
    with kernels.backend(path):
        plain = outputs(op.fused, inputs(op, op.shapes[0], torch.float32), op)
        with torch.autocast(DEVICE, torch.bfloat16):
            cast = outputs(op.fused, inputs(op, op.shapes[0], torch.float32), op)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(cast, plain))


@pytest.mark.parametrize("path", PATHS)
def test_pictures_in_any_memory_format(path):
    """Channels last and transposed pictures, in every layout of the result."""
    pictures = torch.randn(2, 3, 6, 8, device=DEVICE)
    half = torch.full((3,), 0.5, device=DEVICE), torch.full((3,), 0.5, device=DEVICE)
    with kernels.backend(path):
        for layout in ({}, {"patch": 2}, {"patch": 1, "merge": 2, "frames": 2}):
            for size in ((6, 8), (4, 2)):
                want = kernels.vlm_patches(pictures, *half, size, **layout)
                for same in (pictures.contiguous(memory_format=torch.channels_last), pictures.mT.contiguous().mT):
                    assert torch.allclose(kernels.vlm_patches(same, *half, size, **layout), want, atol=1e-5)


FAR = {  # operation: (input, axis) that is stretched over more than 2^31 elements
    "gated_adaln": ((0, 0), (0, 1), (1, 1), (2, 0), (3, 0), (4, 0)), "gated_rms": ((0, 1), (1, 0), (1, 1), (2, 0), (3, 0)),
    "norm_rope, halves": ((0, 0), (0, 1), (0, 2)), "norm_rope, a table per sample": ((2, 0), (3, 1)),
    "answer_loss": ((0, 0), (0, 1), (1, 0)), "vlm_patches, pixels": ((0, 1), (0, 2), (0, 3)),
}  # fmt: skip


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="4 GiB that only a CPU gives without filling them")
def test_addresses_beyond_32_bits():
    """Every input that keeps its strides, one axis of it spread over more than 2^31 elements of memory that is never touched: same values."""
    room = torch.empty(2**31 + 2**22, dtype=torch.float16)
    for name, places in FAR.items():
        op = OPERATIONS[name]
        for index, axis in places:
            arguments = [v.detach() for v in inputs(op, op.shapes[0], torch.float16)]
            want = outputs_of(op, arguments)
            v, strides, dense = arguments[index], [0] * arguments[index].ndim, 1
            for i in reversed(range(v.ndim)):
                if i != axis:
                    strides[i], dense = dense, dense * v.shape[i]
            strides[axis] = (2**31 + 2**20) // max(v.shape[axis] - 1, 1)
            arguments[index] = room.as_strided(v.shape, strides).copy_(v)
            with kernels.backend("triton"):
                got = outputs_of(op, arguments)
            assert max(off(got, want)) < TOLERANCE[torch.float16], (name, index, axis)


def outputs_of(op: Operation, arguments: list) -> list[Tensor]:
    found = op.fused(*arguments, **op.fixed)
    return list(found) if isinstance(found, tuple) else [found]


@needs_triton
def test_more_samples_than_a_grid_holds_go_to_the_reference(monkeypatch):
    """CUDA counts programs of the second and third axis in 16 bits."""
    many = torch.zeros(65536, 1, 2, device=DEVICE)
    assert kernels.adaln(many, many[:, 0], many[:, 0]).shape == many.shape
    with kernels.backend("triton"), pytest.raises(RuntimeError, match="at most 65535 samples"):
        kernels.adaln(many, many[:, 0], many[:, 0])
    assert rope.MOST_ROWS + rope.MOST_ROWS + 1024 < 2**31  # the last tile's start and a step as long as all rows


# what lies around the tensors

SENTINEL, ROOM = -77, 512


def guarded(real: Callable, harmed: list) -> Callable:
    """A launch on copies that lie, with their own strides, in the middle of larger buffers; lists the kernels that wrote elsewhere."""

    def start(kernel, grid, *arguments, **settings):
        boxes, moved = {}, []
        for v in arguments:
            if not isinstance(v, Tensor) or not v.numel():
                moved.append(v)
                continue
            if id(v) not in boxes:
                extent = 1 + sum((n - 1) * stride for n, stride in zip(v.shape, v.stride()))
                buffer = torch.full((extent + 2 * ROOM,), SENTINEL, dtype=v.dtype, device=v.device)
                view = buffer.as_strided(v.shape, v.stride(), ROOM)
                once = tuple(slice(None if stride else 1) for stride in v.stride())  # an expanded axis is one place
                view[once].copy_(v[once])
                boxes[id(v)] = v, buffer, view, once
            moved.append(boxes[id(v)][2])
        real(kernel, grid, *moved, **settings)
        for v, buffer, view, once in boxes.values():
            v.detach()[once].copy_(view[once])
            ours = torch.zeros(len(buffer), dtype=torch.bool, device=v.device)
            ours.as_strided(view.shape, view.stride(), ROOM).fill_(True)
            if buffer[~ours].ne(SENTINEL).any():
                harmed.append(kernel.__name__)

    return start


@needs_triton
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_kernel_writes_beside_its_tensors(name, monkeypatch):
    """Sentinels on both sides and in the gaps of every tensor of every launch; the results are right at the same time."""
    op, harmed, started = OPERATIONS[name], [], []
    real = dispatch.start
    monkeypatch.setattr(dispatch, "start", guarded(lambda *a, **k: (started.append(a[0]), real(*a, **k)), harmed))
    for strided in (False, True):
        arguments = inputs(op, op.shapes[0], torch.float32, strided)
        with kernels.backend("triton"):
            got = outputs(op.fused, arguments, op)
        assert max(off(got, outputs(op.plain, exactly(arguments, op), op))) < TOLERANCE[torch.float32]
    assert len(started) >= (4 if "dmd" not in name or "sample" in name else 2) and not harmed


if not kernels.triton_missing():
    tl = dispatch.tl

    @dispatch.triton.jit
    def careless(x, cond, uncond, noise, t, s, out, guidance, size, GUIDED: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
        """guided_step without the mask of its store."""
        i, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        at = i * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        at += b * size
        v = sampler.guided_velocity(cond, uncond, at, inside, guidance, GUIDED, ACC)
        clean = tl.load(x + at, mask=inside, other=0.0).to(ACC) - tl.load(t + b).to(ACC) * v
        level = tl.load(s + b).to(ACC)
        result = (1 - level) * clean + level * tl.load(noise + at, mask=inside, other=0.0).to(ACC)
        tl.store(out + at, result.to(out.dtype.element_ty))


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="writes outside a buffer")
def test_a_store_without_its_mask_is_caught(monkeypatch):
    """The mutant's values are right in a batch of one; the sentinels tell."""
    op, harmed = OPERATIONS["guided_step"], []
    monkeypatch.setattr(sampler, "_forward", careless)
    monkeypatch.setattr(sampler, "BLOCK", 128)
    monkeypatch.setattr(dispatch, "start", guarded(dispatch.start, harmed))
    arguments = inputs(op, (1, 3, 5, 7), torch.float32)
    with kernels.backend("triton"):
        got = op.fused(*arguments, **op.fixed)
    assert torch.allclose(got, op.plain(*arguments, **op.fixed), atol=1e-5) and harmed == ["careless"]


def test_no_second_derivative_is_made_up():
    """A gradient of a gradient is refused by name, not returned as zero."""
    op = OPERATIONS["norm_rope, halves"]
    arguments = inputs(op, op.shapes[0], torch.float32)
    (first,) = torch.autograd.grad(op.fused(*arguments).square().sum(), arguments[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="norm_rope_backward"):
        torch.autograd.grad(first.sum(), arguments[:1])


@pytest.mark.parametrize("path", PATHS)
def test_nothing_in_nothing_out(path):
    """A batch of no samples has empty results and empty gradients."""
    for name in ("gated_adaln", "gated_rms", "norm_rope, halves", "guided_step", "answer_loss", "vlm_patches, as Qwen-VL"):
        op = OPERATIONS[name]
        arguments = inputs(op, (0, *op.shapes[0][1:]), torch.float32)
        with kernels.backend(path):
            found = op.fused(*arguments, **op.fixed)
            found = found if isinstance(found, tuple) else (found,)
            gradients = torch.autograd.grad(sum(f.sum() for f in found), [arguments[i] for i in op.wanted])
        assert all(len(f) == 0 for f in found)
        assert all(g.shape == arguments[i].shape and not g.any() for i, g in zip(op.wanted, gradients))


@needs_triton
@pytest.mark.parametrize("name", OPERATIONS)
def test_twice_gives_the_same_bits(name):
    op = OPERATIONS[name]
    with kernels.backend("triton"):
        one, two = (outputs(op.fused, inputs(op, op.shapes[0], torch.float32), op) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two))


@needs_triton
def test_a_small_sum_of_programs_is_the_whole(monkeypatch):
    """The backward passes share tokens among fewer programs than there are: the sums over tokens stay complete."""
    monkeypatch.setattr(modulation, "processors", lambda on: 5)  # two per sample, of gated_rms too
    monkeypatch.setattr(rope, "processors", lambda on: 2)
    monkeypatch.setattr(rope, "PER_PROCESSOR", 1)
    monkeypatch.setattr(rope, "_tile", lambda width: (2, dispatch.power_of_2(width // 2)))
    for name in ("gated_adaln", "gated_rms", "norm_rope, halves"):
        op = OPERATIONS[name]
        arguments = inputs(op, op.shapes[0], torch.float64)
        with kernels.backend("triton"):
            got = outputs(op.fused, arguments, op)
        assert max(off(got, outputs(op.plain, arguments, op))) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("norm", dmd.NORMS)
def test_dmd_step_survives_what_the_package_survives(norm, path):
    """A picture that equals its teacher's opinion, a level of zero, a NaN and an infinity: the same finite numbers as `dmd_gradient`."""
    torch.manual_seed(3)
    x, eps, cond, fake = (torch.randn(5, 2, 3, 3, device=DEVICE) for _ in range(4))
    t = torch.tensor([0.5, 0.0, 0.5, 0.5, 0.5], device=DEVICE)
    cond[0] = eps[0] - x[0]
    cond[2, 0, 0, 0], cond[3, 1, 0, 0] = torch.nan, torch.inf
    x_t = flow.interpolate(x, eps, t)
    expected = dmd.dmd_gradient(x, flow.to_x0(x_t, cond, t), flow.to_x0(x_t, fake, t), norm)
    with kernels.backend(path):
        _, gradient = kernels.dmd_step(x, eps, t, cond, None, fake, norm=norm)
    assert gradient.isfinite().all() and gradient[4].ne(0).all()
    assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))
    assert torch.allclose(gradient[1:], expected[1:], rtol=1e-4, atol=1e-5)
    # sample 0 is divided by the floor or by rounding noise: the quotient is huge and its sign is what both agree on
    assert gradient[0].abs().min() > 1e3 and torch.equal(gradient[0].sign(), expected[0].sign())


@pytest.mark.parametrize("path", PATHS)
def test_the_suites_own_block_is_what_they_compute(path):
    """rotary table, rotation, norms and modulation as `vlmedit.networks.dit` has them; sampler and DMD as `vlmedit.flow`, `vlmedit.equations.dmd`."""
    torch.manual_seed(0)
    block = Block(16, 2, 16, 2).to(DEVICE)
    torch.nn.init.uniform_(block.q_norm.weight, 0.5, 1.5)
    q = torch.randn(2, 2, 4, 8, device=DEVICE)
    table = rotary_table(2, 8).to(DEVICE)
    x, branch = torch.randn(2, 2, 4, 16, device=DEVICE)
    gate, scale, shift = torch.randn(3, 2, 16, device=DEVICE)
    with torch.no_grad(), kernels.backend(path):
        assert torch.allclose(kernels.norm_rope(q, block.q_norm.weight, *table), rotate(block.q_norm(q), table), atol=1e-6)
        y, h = kernels.gated_adaln(x, branch, gate, scale, shift, eps=1e-5)
        assert torch.allclose(y, x + gate[:, None] * branch, atol=1e-6)
        assert torch.allclose(h, torch.nn.functional.layer_norm(y, (16,)) * (1 + scale[:, None]) + shift[:, None], atol=1e-5)
        t, s = torch.tensor([0.9, 0.6], device=DEVICE), torch.tensor([0.5, 0.0], device=DEVICE)
        stepped = kernels.guided_step(x, branch, None, h, t, s)
        assert torch.allclose(stepped, torch.stack([flow.step_renoise(*v) for v in zip(x, branch, t, s, h)]), atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cap", [None, 2.0])
def test_answer_loss_is_what_the_judges_compute(cap, path):
    """`two_row_margin` of the real judges and `yes_no_loss`, over a right-padded batch; extreme margins; and the loss alone or the margin
    alone sends the right gradient."""
    from vlmedit.equations.judge_loss import yes_no_loss
    from vlmedit.networks.judges import two_row_margin

    torch.manual_seed(0)
    lengths, answers = torch.tensor([5, 2, 4, 1], device=DEVICE), torch.tensor([1, 0, 0, 1], device=DEVICE)
    head = torch.randn(9, 6, device=DEVICE)
    for scale in (1.0, 60.0):
        states = (scale * torch.randn(4, 5, 6, device=DEVICE)).requires_grad_()
        expected = two_row_margin(states, lengths, head, 3, 7, cap)
        pair = yes_no_loss(expected, answers, 0.55), expected
        with kernels.backend(path):
            mine = kernels.answer_loss(states, head, lengths - 1, answers, 3, 7, 0.55, cap)
            for got, want in zip(mine, pair):
                assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)
                (there,), (here,) = (torch.autograd.grad(v.sum(), states, retain_graph=True) for v in (want, got))
                assert there.abs().max() > 1e-3 or cap and scale > 1  # a capped logit of 60 has no slope left
                assert torch.allclose(here, there, rtol=1e-4, atol=1e-5)
                assert here[1, 2:].eq(0).all() and here[0, :4].eq(0).all()


@needs_triton
def test_a_position_nobody_checked_gives_nan(monkeypatch):
    """As on a GPU, where looking would wait for it: no stranger's memory is read, and the loss cannot be mistaken for a number.
    And a NaN of one question stays at its answer's position."""
    monkeypatch.setattr(answer, "_look", lambda *a: None)
    states, head = torch.randn(3, 4, 5, device=DEVICE, requires_grad=True), torch.randn(6, 5, device=DEVICE)
    for path in ("triton", "reference"):
        with kernels.backend(path):
            loss, margin = kernels.answer_loss(states, head, torch.tensor([0, 4, -1], device=DEVICE), torch.ones(3, device=DEVICE), 1, 2)
        assert loss.isnan().tolist() == margin.isnan().tolist() == [False, True, True]
    spoiled = states.detach().clone()
    spoiled[0, 1, 2] = torch.nan
    for path in ("triton", "reference"):
        with kernels.backend(path):
            loss, _ = kernels.answer_loss(spoiled.requires_grad_(), head, torch.tensor([1, 2, 3], device=DEVICE), torch.ones(3, device=DEVICE), 1, 2)
            (gradient,) = torch.autograd.grad(loss.sum(), spoiled)
        assert gradient[0, 1].isnan().all() and gradient[0, [0, 2, 3]].eq(0).all() and gradient[1:].isfinite().all()


def judge_settings(**more):
    """What `prepare` of a real judge asks of itself, without a model."""
    from vlmedit.networks.judges import Judge

    me = SimpleNamespace(settings={"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], **more})
    me.mean, me.std = (torch.tensor(me.settings[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))
    me.setting, me.normalize = me.settings.__getitem__, lambda v: Judge.normalize(me, v)
    return me


@pytest.mark.parametrize("path", PATHS)
def test_vlm_patches_is_what_the_judges_prepare(path):
    """Qwen-VL's merged order with two frames and InternVL's pixels, values and gradients of pictures with saturated pixels."""
    from vlmedit.networks.judges import InternVL, QwenVL

    torch.manual_seed(0)
    picture = (0.8 * torch.randn(3, 11, 14)).to(DEVICE).requires_grad_()
    qwen = judge_settings(patch_size=2, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 32, "longest_edge": 64})
    qwen.size = lambda p: QwenVL.size(qwen, p)
    intern = judge_settings(size={"height": 6, "width": 6})
    for family, me, layout in ((QwenVL, qwen, {"patch": 2, "merge": 2, "frames": 2}), (InternVL, intern, {})):
        me.mean, me.std = me.mean.to(DEVICE), me.std.to(DEVICE)
        want = family.prepare(me, picture)
        size = me.size(picture) if layout else want.shape[-2:]
        with kernels.backend(path):
            (got,) = kernels.vlm_patches(picture[None], me.mean.flatten(), me.std.flatten(), tuple(size), **layout)
            assert got.shape == want.shape and torch.allclose(got, want, atol=1e-5)
            cotangent = torch.randn_like(want)
            (here,), (there,) = (torch.autograd.grad(v, picture, cotangent) for v in (got, want))
        assert there.abs().max() > 0.1 and torch.allclose(here, there, atol=1e-5)
        assert here[picture.abs() > 1].abs().min() > 0  # through the clamp


def test_patches_times_a_matrix_are_the_towers_convolution():
    """SigLIP's and CLIP's embedding is a convolution whose stride is its size: the same as patches times its flattened weight."""
    torch.manual_seed(0)
    pictures, weight = torch.rand(2, 3, 10, 15, dtype=torch.float64) * 2 - 1, torch.randn(4, 3, 3, 3, dtype=torch.float64)
    plain = torch.full((3,), 0.5, dtype=torch.float64), torch.full((3,), 0.5, dtype=torch.float64)
    pixels = kernels.vlm_patches(pictures, *plain, (9, 12))
    cut = kernels.vlm_patches(pictures, *plain, (9, 12), patch=3)
    assert torch.allclose(cut @ weight.flatten(1).T, torch.nn.functional.conv2d(pixels, weight, stride=3).flatten(2).mT)
    assert torch.equal(kernels.vlm_patches(pictures, *plain, (10, 15)), pictures)  # no resize, and (v + 1) / 2 - 1 / 2 over 1 / 2


@pytest.mark.parametrize("mode", patches.SUPPORT)
@pytest.mark.parametrize("sizes", [(37, 14), (14, 37), (9, 9), (1, 4), (4, 1)])
def test_the_resize_is_pillows(mode, sizes):
    """The weights of one side against Pillow's own resize, which rounds to 8 bits; in float64 they are torch's to the last digits."""
    from PIL import Image

    old, new = sizes
    grays = torch.randint(0, 256, (old, 3), generator=torch.Generator().manual_seed(old), dtype=torch.uint8)
    picture = Image.fromarray(grays.numpy()).resize((3, new), {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[mode])
    matrix, _ = patches.resize_map(old, new, mode)
    mine = (matrix @ grays.double()).clamp(0, 255)
    assert (mine - torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(new, 3)).abs().max() <= 0.51
    if old != new:
        theirs = torch.nn.functional.interpolate(grays.double()[None, None], size=(new, 3), mode=mode, antialias=True)[0, 0]
        assert torch.allclose((matrix @ grays.double()), theirs, rtol=1e-12)
    assert torch.allclose(matrix.sum(1), torch.ones(new, dtype=torch.float64))


@pytest.mark.parametrize("path", PATHS)
def test_gated_rms_is_z_images_block_and_a_judges_layer(path):
    """What stands between attention and feed-forward of diffusers' block, between feed-forward and the next block's attention, and between the two
    halves of a Qwen2 layer; with gradients to tokens, branch, modulation and the norms' weights."""
    from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    torch.manual_seed(0)
    block = ZImageTransformerBlock(0, 16, 2, 2, 1e-5, True).to(DEVICE)
    norms = block.attention_norm2, block.ffn_norm1, block.ffn_norm2, block.attention_norm1
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x, branch = (torch.randn(2, 5, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    gate, scale = (torch.randn(2, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    sent = torch.randn(2, 2, 5, 16, device=DEVICE)
    for before, after in (norms[:2], norms[2:]):
        y = x + gate.tanh().unsqueeze(1) * before(branch)
        want = y, after(y) * (1 + scale.unsqueeze(1))
        with kernels.backend(path):
            got = kernels.gated_rms(x, branch, gate.tanh() * before.weight, after.weight * (1 + scale), 1e-5)
            leaves = x, branch, gate, scale, before.weight, after.weight
            here, there = (torch.autograd.grad(v, leaves, tuple(sent)) for v in (got, want))
        assert all(b.abs().max() > 0.1 and torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip((*got, *here), (*want, *there)))
    norm = Qwen2RMSNorm(16, 1e-6).to(DEVICE)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    y = x + branch
    with kernels.backend(path):
        got = kernels.gated_rms(x, branch, None, norm.weight.expand(2, -1), 1e-6, normed=False)
        here, there = (torch.autograd.grad(v, (x, branch, norm.weight), tuple(sent)) for v in (got, (y, norm(y))))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip((*got, *here), (y, norm(y), *there)))


@pytest.mark.parametrize("path", PATHS)
def test_blocks_with_kernels_inside_are_the_plain_ones(path, monkeypatch):
    """`use` within diffusers' Z-Image block and transformers' Qwen2 layer: results and every gradient, from tokens to weights, recomputation included;
    afterwards both classes are as they were."""
    from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock, ZSingleStreamAttnProcessor
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

    torch.manual_seed(0)
    block = ZImageTransformerBlock(0, 16, 2, 2, 1e-5, True).to(DEVICE)
    config = Qwen2Config(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, attn_implementation="eager")
    layer = Qwen2DecoderLayer(config, 0).to(DEVICE)
    for name, weight in [*block.named_parameters(), *layer.named_parameters()]:
        torch.nn.init.uniform_(weight, 0.5, 1.5) if "norm" in name else torch.nn.init.normal_(weight, std=0.2)
    x, time = torch.randn(2, 5, 16, device=DEVICE, requires_grad=True), torch.randn(2, 16, device=DEVICE, requires_grad=True)
    turn = torch.polar(torch.ones(2, 5, 4, device=DEVICE), torch.randn(2, 5, 4, device=DEVICE))
    angles = torch.ones(2, 5, 8, device=DEVICE), torch.zeros(2, 5, 8, device=DEVICE)
    calls = (
        (block, lambda: block(x, None, turn, adaln_input=time), [x, time, *block.parameters()]),
        (layer, lambda: layer(x, attention_mask=None, position_embeddings=angles), [x, *layer.parameters()]),
    )
    launched, real = [], dispatch.start
    monkeypatch.setattr(dispatch, "start", lambda kernel, *a, **k: (launched.append(kernel), real(kernel, *a, **k)))
    before = ZImageTransformerBlock.forward, Qwen2DecoderLayer.forward, ZSingleStreamAttnProcessor.__call__
    for module, call, leaves in calls:
        sent = torch.randn(2, 5, 16, device=DEVICE)
        out = call()
        want = out.detach(), *torch.autograd.grad(out, leaves, sent)
        for recomputed in (False, True):
            with kernels.backend(path), kernels.use("norm_rope", "gated_rms"):
                out = checkpoint(call, use_reentrant=False) if recomputed else call()
                got = out.detach(), *torch.autograd.grad(out, leaves, sent)
            assert all(torch.allclose(g, w, rtol=1e-4, atol=1e-6 + 1e-4 * float(w.abs().max())) for g, w in zip(got, want)), type(module)
            assert sum(bool(w.abs().max() > 1e-3) for w in want) >= len(want) - 1  # a bias of the keys moves no softmax
    assert bool(launched) == (path == "triton")
    assert (ZImageTransformerBlock.forward, Qwen2DecoderLayer.forward, ZSingleStreamAttnProcessor.__call__) == before


@pytest.mark.parametrize("path", PATHS)
def test_the_norm_is_that_of_the_rounded_residual(path):
    """A branch that half precision rounds away from y is not in h either: a constant token has no direction left."""
    x, branch = torch.full((1, 1, 6), 2048.0, dtype=torch.float16, device=DEVICE), torch.tensor([0.3, -0.3] * 3, dtype=torch.float16, device=DEVICE).view(1, 1, 6)
    ones = torch.ones(1, 6, dtype=torch.float16, device=DEVICE)
    with kernels.backend(path):
        y, h = kernels.gated_adaln(x, branch, ones, ones, ones)
    assert torch.equal(y, x) and torch.equal(h[0], ones)


def test_rotation_of_neighbors_is_diffusers():
    """`interleaved` against FLUX's own function, halves against ours."""
    from diffusers.models.embeddings import apply_rotary_emb

    torch.manual_seed(0)
    x, angle = torch.randn(2, 3, 5, 8), torch.randn(5, 4)
    normed = torch.nn.functional.rms_norm(x, (8,), eps=1e-6)
    wide_table = tuple(t.repeat_interleave(2, 1) for t in (angle.cos(), angle.sin()))
    got = kernels.norm_rope(x, torch.ones(8), angle.cos(), angle.sin(), interleaved=True)
    assert torch.allclose(got, apply_rotary_emb(normed, wide_table), atol=1e-6)
    assert not torch.allclose(got, kernels.norm_rope(x, torch.ones(8), angle.cos(), angle.sin()), atol=0.1)


def test_the_exercises_are_the_kernels():
    """Notebook 09: programs of the first two exercises, put together, give the reference's residual and norm; the third is its gradient."""
    from vlmedit.teaching.exercises.kernels import (
        GATED_BLOCK,
        MODULATION_BACKWARD,
        NORMED_ROW,
        Memory,
        gated_block,
        normed_row,
    )

    x, branch = torch.randn(2, 2, 3, 5)
    gate, scale, shift = torch.randn(3, 2, 5)
    memory = [Memory(v) for v in (x, branch, gate)]
    y = torch.full((32,), torch.nan)
    for program in range(4):
        at, value, inside = gated_block(*memory, program, 8, 3, 5)
        y[at[inside]] = value[inside]
    expected, h = modulation.gated_adaln_reference(x, branch, gate, scale, shift)
    assert torch.equal(y[:30].view_as(x), expected) and y[30:].isnan().all()
    rows = [normed_row(Memory(torch.nn.functional.pad(expected, (0, 2))), program, 8, 5, 7, 1e-6) for program in range(6)]
    normed = torch.stack([value[inside] for _, value, inside in rows]).view_as(x)
    assert torch.allclose(normed * (1 + scale[:, None]) + shift[:, None], h, atol=1e-5)
    for exercise in (GATED_BLOCK, NORMED_ROW):  # a load beside its tensor is refused although what it reads is thrown away

        def greedy(*arguments, right=exercise.reference):
            first = arguments[0]
            first.load(torch.arange(len(first) + 1))
            return right(*arguments)

        with pytest.raises(checking.WrongAnswer, match=f"reads address {len(exercise.cases()[0][0])} of a tensor that ends at"):
            checking.check(greedy, exercise)
    for whole in (2, 3, 4):  # a mask that is right where the size divides

        def rounded(x, branch, gate, program, block, tokens, width, whole=whole):
            at, value, inside = gated_block(x, branch, gate, program, block, tokens, width)
            return at, value, inside & (at < len(x) // whole * whole)

        with pytest.raises(checking.WrongAnswer):
            checking.check(rounded, GATED_BLOCK)
    for grad, value, factor, eps in MODULATION_BACKWARD.cases():
        leaves = value.requires_grad_(), factor.requires_grad_(), torch.zeros_like(factor, requires_grad=True)
        out = modulation.gated_adaln_reference(leaves[0], None, None, *leaves[1:], eps)[1]
        for got, want in zip(MODULATION_BACKWARD.reference(grad, value, factor, eps), torch.autograd.grad(out, leaves, grad)):
            assert torch.allclose(got, want, atol=1e-5) and want.abs().max() > 0.1


# one node for torch


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "name", ["gated_adaln", "adaln", "gated_rms", "gated_rms, a plain residual", "norm_rope, halves", "dmd_step, per sample", "guided_step", "answer_loss", "vlm_patches, as Qwen-VL"]
)
def test_is_a_proper_custom_op(name, path):
    """torch's own check of schema, fake tensors, autograd's registration and tracing with dynamic shapes."""
    op = OPERATIONS[name]
    a = inputs(op, op.shapes[0], torch.float32, strided=path == "reference")
    node, arguments = {
        "gated_adaln": (modulation._op, (*a, 1e-6)),
        "adaln": (modulation._op, (a[0], None, None, a[1], a[2], 1e-6) if name == "adaln" else ()),
        "gated_rms": (residual._op, (*a, 1e-6, True)),
        "gated_rms, a plain residual": (residual._op, (*a, 1e-6, False)),
        "norm_rope, halves": (rope._op, (*a, 1e-6, False)),
        "dmd_step, per sample": (fused_dmd._op, (*a, 2.0, "sample", 1e-6)),
        "guided_step": (sampler._op, (*a, 2.0)),
        "answer_loss": (answer._op, (*a, 5, 2, 0.4, 3.0)),
        "vlm_patches, as Qwen-VL": (patches._op, (*a, 4, 8, 2, 2, 2, "bicubic", torch.float32)),
    }[name]
    with kernels.backend(path):
        torch.library.opcheck(node, arguments)


@pytest.mark.parametrize("name", OPERATIONS)
def test_compile_sees_one_graph_and_checkpointing_the_same_gradient(name):
    op = OPERATIONS[name]
    expected = outputs(op.fused, inputs(op, op.shapes[0], torch.float32), op)
    whole = torch.compile(op.fused, backend="aot_eager", fullgraph=True)
    again = lambda *a, **fixed: checkpoint(op.fused, *a, use_reentrant=False, **fixed)
    for function in (whole, again):
        assert all(torch.equal(a, b) for a, b in zip(outputs(function, inputs(op, op.shapes[0], torch.float32), op), expected))


def test_scores_get_no_gradient():
    """Eq. 7 is a constant: nothing reaches teacher, fake score, noise or time, and the gradient itself carries no graph."""
    tensors = [v.requires_grad_() for v in dmd_inputs((2, 1, 2, 2), lambda *s: torch.randn(*s, dtype=torch.float64))]
    loss, gradient = kernels.dmd_step(*tensors, guidance=2.0)
    loss.backward()
    assert not gradient.requires_grad and torch.allclose(tensors[0].grad, gradient / gradient.numel())
    assert all(v.grad is None for v in tensors[1:])


# the choice of the path


def test_cpu_tensors_take_the_reference_unless_told_otherwise(monkeypatch):
    """auto never launches on a CPU; triton always does."""

    class Launched(Exception):
        pass

    class Kernel:
        def __getitem__(self, grid):
            raise Launched

    for module in (modulation, residual, rope, fused_dmd, sampler, answer, patches):
        monkeypatch.setattr(module, "_errors" if module is fused_dmd else "_forward", Kernel())
    for name in ("gated_adaln", "gated_rms", "norm_rope, halves", "dmd_step, per sample", "guided_step", "answer_loss", "vlm_patches, as Qwen-VL"):
        op = OPERATIONS[name]
        arguments = [v.detach().cpu() for v in inputs(op, op.shapes[0], torch.float32)]
        op.fused(*arguments, **op.fixed)
        if not kernels.triton_missing() and kernels.interpreting():
            with kernels.backend("triton"), pytest.raises(Launched):
                op.fused(*arguments, **op.fixed)


def test_a_gpu_is_never_interpreted_for(monkeypatch):
    """TRITON_INTERPRET=1 on a GPU: auto takes the reference, which is fast; triton by name still interprets."""
    on_gpu = SimpleNamespace(is_cuda=True, shape=(1,))
    monkeypatch.setattr(dispatch, "triton_missing", lambda: "")
    for interpreted in (True, False):
        monkeypatch.setattr(dispatch, "interpreting", lambda: interpreted)
        assert dispatch.use_triton(on_gpu, True, "") is not interpreted
        assert not dispatch.use_triton(on_gpu, False, "") and not dispatch.use_triton(SimpleNamespace(is_cuda=False, shape=(1,)), True, "")
        with kernels.backend("triton"):
            assert dispatch.use_triton(on_gpu, True, "")


def test_backend_is_restored_and_unknown_ones_are_refused():
    with pytest.raises(ValueError, match="'gpu'; known: auto, reference, triton"), kernels.backend("gpu"):
        pass
    with pytest.raises(KeyError), kernels.backend("reference"):
        raise KeyError
    assert dispatch._chosen == "auto"


@needs_triton
def test_a_shape_without_a_kernel_goes_to_the_reference_and_says_so_when_asked(monkeypatch):
    monkeypatch.setattr(modulation, "WIDEST", 4)
    op = OPERATIONS["adaln"]
    arguments = inputs(op, (1, 2, 5), torch.float32)
    assert kernels.adaln(*arguments).shape == (1, 2, 5)
    with kernels.backend("triton"), pytest.raises(RuntimeError, match=r"no Triton kernel for shape \(1, 2, 5\)"):
        kernels.adaln(*arguments)
    long, plain = torch.rand(1, 1, 1, 400), (torch.zeros(1), torch.ones(1))
    assert kernels.vlm_patches(long, *plain, (1, 20)).shape == (1, 1, 1, 20)  # 80 taps
    with kernels.backend("triton"), pytest.raises(RuntimeError, match="a pixel depends on more than 64 others"):
        kernels.vlm_patches(long, *plain, (1, 20))


x345, row = torch.zeros(3, 4, 5), torch.zeros(3, 5)
head, table = torch.zeros(1, 2, 3, 4), torch.zeros(3, 2)
flat, time = torch.zeros(2, 3), torch.zeros(2)
words, first = torch.zeros(6, 5), torch.zeros(3, dtype=torch.int64)  # a language head; the first position of each question
shot, rgb = torch.zeros(1, 3, 8, 8), torch.ones(3)
ask = lambda states=x345, head=words, position=first, answers=torch.ones(3), yes=1, no=2, **more: kernels.answer_loss(states, head, position, answers, yes, no, **more)
cut = lambda pictures=shot, mean=rgb, std=rgb, size=(8, 8), *more, **named: kernels.vlm_patches(pictures, mean, std, size, *more, **named)
meta = lambda v: v.to("meta")
BAD = {
    "gate's shape": (lambda: kernels.gated_adaln(x345, x345, row[:2], row, row), ValueError, r"gate has shape \(2, 5\); it must be \(3, 5\)"),
    "branch's shape": (lambda: kernels.gated_adaln(x345, x345[:, :1], row, row, row), ValueError, "branch has shape"),
    "rank": (lambda: kernels.adaln(row, row, row), ValueError, r"must be \(batch, tokens, width\)"),
    "two dtypes": (lambda: kernels.adaln(x345, row.half(), row), TypeError, "shift is torch.float32 and scale is torch.float16; cast"),
    "branch's dtype": (lambda: kernels.gated_adaln(x345, x345.half(), row, row, row), TypeError, "branch is torch.float16 and x is torch.float32; cast"),
    "integers": (lambda: kernels.adaln(x345.int(), row, row), TypeError, "x is torch.int32; it must be one of float16"),
    "two devices": (lambda: kernels.adaln(x345, meta(row), row), ValueError, "scale is on meta and x on cpu; move"),
    "no branch of a norm": (lambda: kernels.gated_rms(x345, None, None, row), TypeError, "gated_rms: branch is None; it must be a tensor"),
    "factor's shape": (lambda: kernels.gated_rms(x345, x345, None, row[0]), ValueError, r"factor has shape \(5,\); it must be \(3, 5\)"),
    "gate's dtype": (lambda: kernels.gated_rms(x345, x345, row.half(), row), TypeError, "gate is torch.float16 and factor is torch.float32; cast"),
    "factor's device": (lambda: kernels.gated_rms(x345, x345, None, meta(row)), ValueError, "factor is on meta and x on cpu"),
    "residual's rank": (lambda: kernels.gated_rms(row, row, None, row), ValueError, r"must be \(batch, tokens, width\)"),
    "odd head": (lambda: kernels.norm_rope(head[..., :3], row[0, :3], table, table), ValueError, "an even head width"),
    "weight's shape": (lambda: kernels.norm_rope(head, row[0], table, table), ValueError, r"weight has shape \(5,\)"),
    "table's shape": (lambda: kernels.norm_rope(head, row[0, :4], table[:2], table), ValueError, r"cos has shape \(2, 2\); it must be \(3, 2\)"),
    "table's device": (lambda: kernels.norm_rope(head, row[0, :4], meta(table), meta(table)), ValueError, "cos is on meta"),
    "table's gradient": (lambda: kernels.norm_rope(head, row[0, :4], table.clone().requires_grad_(), table), ValueError, "detach it"),
    "no branch": (lambda: kernels.gated_adaln(x345, None, row, row, row), TypeError, "branch is None; it must be a tensor"),
    "no tensor": (lambda: kernels.adaln(x345.numpy(), row, row), TypeError, "x is of type ndarray; it must be a tensor"),
    "dmd's device": (lambda: kernels.dmd_step(flat, meta(flat), time, flat, None, flat), ValueError, "eps is on meta and x on cpu"),
    "step's device": (lambda: kernels.guided_step(flat, flat, meta(flat), flat, time, time), ValueError, "uncond is on meta and x on cpu"),
    "step's dtype": (lambda: kernels.guided_step(flat, flat.half(), None, flat, time, time), TypeError, "cond is torch.float16 and x is torch.float32"),
    "states' rank": (lambda: ask(row), ValueError, r"states has shape \(3, 5\); it must be \(questions, positions, width\)"),
    "head's dtype": (lambda: ask(head=words.half()), TypeError, "weight is torch.float16 and states is torch.float32; cast"),
    "head's width": (lambda: ask(head=words[:, :4]), ValueError, r"weight has shape \(6, 4\); it must be \(words, 5\)"),
    "head's gradient": (lambda: ask(head=words.clone().requires_grad_()), ValueError, "weight requires a gradient, which a frozen judge has none of; detach it"),
    "position's dtype": (lambda: ask(position=first.float()), TypeError, "position is torch.float32; it must be int32 or int64"),
    "position's device": (lambda: ask(position=meta(first)), ValueError, "position is on meta and states on cpu"),
    "position outside": (lambda: ask(position=first + 4), ValueError, "position runs from 4 to 4; the sequence has 0 to 3"),
    "answer's shape": (lambda: ask(answers=torch.ones(2)), ValueError, r"answer has shape \(2,\); it must be \(3,\)"),
    "unknown word": (lambda: ask(yes=6), ValueError, "yes is token 6; the output layer has 0 to 5"),
    "one word": (lambda: ask(yes=2), ValueError, "both token 2"),
    "cap": (lambda: ask(cap=0.0), ValueError, "cap is 0.0; it must be above 0"),
    "pictures' rank": (lambda: cut(shot[0]), ValueError, r"pictures has shape \(3, 8, 8\); it must be \(batch, channels, height, width\)"),
    "pictures' dtype": (lambda: cut(shot.byte()), TypeError, "pictures is torch.uint8; it must be one of float16"),
    "pictures' device": (lambda: cut(meta(shot)), ValueError, "mean is on cpu and pictures on meta"),
    "mean's shape": (lambda: cut(mean=rgb[:2], std=rgb[:2]), ValueError, r"mean has shape \(2,\); it must be \(3,\)"),
    "std's gradient": (lambda: cut(std=rgb.clone().requires_grad_()), ValueError, "std requires a gradient"),
    "patches' size": (lambda: cut(shot, rgb, rgb, (12, 10), 2, 2), ValueError, r"size \(12, 10\) must be a multiple of patch x merge = 4"),
    "no size": (lambda: cut(size=(0, 8)), ValueError, r"size \(0, 8\), patch None, merge 1 and frames 1 must be at least 1"),
    "merge alone": (lambda: cut(merge=2), ValueError, "merge is 2 and frames 1 without a patch"),
    "mode": (lambda: cut(mode="lanczos"), ValueError, "unknown mode 'lanczos'; known: bilinear, bicubic"),
    "patches' dtype": (lambda: cut(dtype=torch.uint8), TypeError, "dtype is torch.uint8"),
    "norm": (lambda: kernels.dmd_step(flat, flat, time, flat, None, flat, norm="batch"), ValueError, "unknown normalizer 'batch'; known: sample, pixel"),
    "guided without": (lambda: kernels.dmd_step(flat, flat, time, flat, None, flat, guidance=2.0), ValueError, "uncond is None"),
    "dmd's time": (lambda: kernels.dmd_step(flat, flat, time[:1], flat, None, flat), ValueError, r"t has shape \(1,\)"),
    "dmd's dtype": (lambda: kernels.dmd_step(flat, flat, time, flat, None, flat.double()), TypeError, "fake is torch.float64"),
    "step guided without": (lambda: kernels.guided_step(flat, flat, None, flat, time, time, 2.0), ValueError, "uncond is None"),
    "step's noise": (lambda: kernels.guided_step(flat, flat, None, flat[:1], time, time), ValueError, "noise has shape"),
    "step's time": (lambda: kernels.guided_step(flat, flat, None, flat, time, time.clone().requires_grad_()), ValueError, "s requires a gradient"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what):
    call, error, words = BAD[what]
    with pytest.raises(error, match=words):
        call()


# the folder


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=580, env={**os.environ, **environment})


def test_the_folder_is_no_package_of_the_hubs_name():
    """From the repository's root transformers and diffusers import, find no Hub kernels, and a stray import gets nothing of ours."""
    code = """
import transformers, diffusers, transformers.integrations.hub_kernels
from transformers.utils.import_utils import is_kernels_available
from diffusers.utils.import_utils import is_kernels_available as diffusers_sees
import importlib.metadata
installed = any(d.name == "kernels" for d in importlib.metadata.distributions())
assert is_kernels_available() == diffusers_sees() == installed, (is_kernels_available(), diffusers_sees())
import sys
sys.modules.pop("kernels", None)
if not installed:
    import kernels
    assert getattr(kernels, "__file__", None) is None and not hasattr(kernels, "gated_adaln")
    try:
        import kernels.src
    except ImportError as error:
        assert "import it by that name" in str(error)
    else:
        raise AssertionError("kernels.src was imported")
import vlmedit.kernels
assert vlmedit.kernels.__name__ == "vlmedit.kernels" and callable(vlmedit.kernels.gated_adaln)
print("fine")
"""
    done = python(code)
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stderr[-2000:]
    assert not (ROOT / "kernels/__init__.py").exists()


def test_without_triton_everything_else_works():
    """An interpreter that finds no triton: import and references work, the backend says what to install."""
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ImportError("blocked")
sys.meta_path.insert(0, Blocker())
import torch
from vlmedit import kernels
x = torch.randn(2, 3, 4, requires_grad=True)
kernels.adaln(x, torch.ones(2, 4), torch.zeros(2, 4)).square().sum().backward()
assert x.grad.abs().max() > 0 and not kernels.interpreting()
try:
    with kernels.backend("triton"):
        pass
except RuntimeError as error:
    print(error)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "triton is not installed; on Linux: pip install 'vlmedit[kernels]'"


def test_nothing_in_the_package_calls_a_kernel():
    """They are for real-size models: the default path of package and trainers imports none of them."""
    callers = [p for p in (ROOT / "vlmedit").rglob("*.py") if "vlmedit.kernels" in p.read_text() or "import kernels" in p.read_text()]
    assert {str(p.relative_to(ROOT)) for p in callers} <= {"vlmedit/teaching/exercises/kernels.py", "vlmedit/teaching/exercises/__init__.py"}
    sources = "".join(p.read_text() for p in (ROOT / "kernels/src").glob("*.py") if p.name != "inside.py")  # whose swaps are asked for
    assert not any(word in sources for word in ("vlmedit.world", "vlmedit.evaluation", "vlmedit.methods", "vlmedit.training", "vlmedit.data.judge_lessons"))


COMPILE = """
import sys
sys.path[:0] = ["tests", "tests/kernels"]
import torch, test_kernels as T
from vlmedit.kernels import bench, compiled
if why := compiled.why_not():
    print("skip", why); raise SystemExit
wanted = (512, "FLUX"), (512, "FLUX frozen"), (512, "16 channels")
real, said = [c for c in bench.cases() if (c.side, c.model) in wanted or c.model == "Qwen2.5-VL" or (c.side, c.operation) == (512, "gated_rms")], set()
for case in real:
    if case.operation == "answer_loss":
        case = bench._answer(case.model, case.side, 600, case.shape[2], 9000)
    with compiled.compiling(90) as made:
        compiled.update(case.kernel, case.make("cpu"))
    for b in made:
        said.add(("real", b.kernel, b.size, b.spilled, b.count("div.s64") + b.count("rem.s64"), b.count("div.s32") + b.count("rem.s32"), b.accesses["ld 128"], b.accesses["ld 16"]))
for op in T.OPERATIONS.values():
    for dtype, strided in ((torch.float32, False), (torch.bfloat16, True)):
        arguments = T.inputs(op, op.shapes[0], dtype, strided)
        with compiled.compiling(90) as made:
            compiled.update(op.fused, arguments, op.fixed)
        said |= {("odd", b.kernel, b.size, b.spilled, 0, 0, 0, 0) for b in made}
for row in sorted(said): print(*row)
"""


def test_every_kernel_compiles_as_it_is_launched():
    """The very launches of the bench's real shapes and of the odd, strided ones above, compiled for compute capability 9.0 with their own types,
    warps and specialization, without a GPU. At real shapes nothing spills, no address is divided in 64 bits, and `norm_rope` reads 16 bytes
    at a time although its pairs are neighbors."""
    done = python(COMPILE, TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-3000:]
    if done.stdout.startswith("skip"):
        pytest.skip(done.stdout)
    rows = [line.split() for line in done.stdout.splitlines()]
    names = {f"{module}.{way}" for module in ("modulation", "residual", "rope", "sampler", "answer", "patches") for way in ("_forward", "_backward")} | {"dmd._errors", "dmd._by_sample"}
    real = [r for r in rows if r[0] == "real"]
    assert {r[1] for r in real} == names and {r[1] for r in rows if r[0] == "odd"} == names | {"dmd._by_pixel"}
    assert all(int(r[2]) > 1000 for r in rows)  # bytes of machine code
    assert all(int(r[3]) <= 0 and int(r[4]) == 0 for r in real), real
    for _, name, _, _, _, divided, wide, narrow in real:
        assert int(divided) <= 3, name  # those before the loops
        if name.startswith("rope"):
            assert int(wide) >= 4 and int(narrow) <= 1, (name, wide, narrow)  # the weight's one row may be read by twos


@pytest.mark.skipif(DEVICE == "cuda", reason="this run is the one on the GPU")
def test_the_whole_file_passes_on_the_gpu_where_there_is_one():
    """The suite hides GPUs from itself, since its tolerances are the CPU's; these tests are for both, so a process of its own sees the first GPU."""
    hidden = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")}
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True).stdout if (tool := shutil.which("nvidia-smi")) else ""
    if "GPU 0" not in listed:
        pytest.skip("NO GPU: nvidia-smi lists none, so the kernels were checked in the interpreter alone")
    sees = subprocess.run([sys.executable, "-c", "import torch; print(torch.cuda.is_available())"], capture_output=True, text=True, env={**hidden, "CUDA_VISIBLE_DEVICES": "0"})
    if sees.stdout.strip() != "True":
        pytest.skip(f"A GPU THAT TORCH CANNOT USE: nvidia-smi lists {listed.splitlines()[0]}; install a torch with CUDA")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", __file__], capture_output=True, text=True, env={**hidden, "CUDA_VISIBLE_DEVICES": "0"}, timeout=1800)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.skipif(DEVICE == "cuda", reason="says what is missing where there is no GPU")
def test_the_bench_claims_nothing_without_a_gpu(tmp_path, capsys):
    """Shapes and bytes of every operation and model, no time, no verdict; and the file says why."""
    from vlmedit.kernels import bench

    bench.main(["--json", str(tmp_path / "bench.json")])
    said = capsys.readouterr().out
    assert "Nothing is measured, so nothing is claimed: no CUDA device" in said and "Missing (-): milliseconds" in said and "norm_rope" in said
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["measured"] is False and report["reason"] == "no CUDA device" and report["copy_bytes_per_second"] is None
    seen = {(r["operation"], r["side"]) for r in report["rows"]}
    diffusion = {(o, s) for o in ("gated_adaln", "gated_rms", "norm_rope", "dmd_step", "guided_step") for s in (512, 1024)}
    assert seen == diffusion | {(o, s) for o in ("answer_loss", "vlm_patches", "gated_rms") for s in (384, 448)}
    assert {r["model"] for r in report["rows"]} >= {"Z-Image", "FLUX", "Qwen-Image", "InternVL3", "Qwen2.5-VL", "Qwen3-VL", "LLaVA-OneVision"}
    assert set(report["verdicts"]) == {o for o, _ in seen} and set(report["verdicts"].values()) == {"not measured"}
    told = ("share_of_copy", "earns_its_place", "faster", "smaller", "max_error", "error")
    measured = [v for r in report["rows"] for k, v in r.items() if k.endswith(("_ms", "_mib")) or k in told]
    assert len(measured) >= 15 * len(report["rows"]) and not any(v is not None for v in measured) and all(r["bytes_moved"] > 0 for r in report["rows"])
    assert any("milliseconds" in what for what in report["not_measured"])
    with pytest.raises(SystemExit):
        bench.main(["--json", str(tmp_path / "nowhere" / "bench.json")])


def test_the_bench_counts_what_moves():
    """Bytes of each case, from tensors of its kind: inputs, outputs and gradients once, and what the backward pass reads again. And the update
    it times runs, on both paths, with equal gradients."""
    from vlmedit.kernels import bench

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "DTYPE", torch.float32)
        frozen = bench._modulation("m", 8, 3, 8, True), bench._rope("m", 8, 3, 2, 4, True)
        norms = bench._residual("m", 8, 3, 8), bench._residual("m", 8, 3, 8, True), bench._norm("j", 8, 3, 8)
        cases = *frozen, *norms, bench._modulation("m", 8, 3, 8), bench._rope("m", 8, 3, 2, 4), *bench._latents(32), bench._patches("m", 8, 12, 2, 2, 2), bench._answer("m", 8, 5, 4, 9)
        for case in cases:
            arguments = case.make("cpu")
            torch.manual_seed(1)
            got = bench._update(case.kernel, arguments)()
            torch.manual_seed(1)
            want = bench._update(case.reference, arguments)()
            assert max(off(list(got), list(want))) < 1e-5
            size = arguments[0].nbytes
            if case.operation == "vlm_patches":
                with torch.no_grad():
                    assert case.moved == 2 * size + 2 * case.kernel(*arguments).nbytes
                continue
            if case.operation == "answer_loss":
                assert case.moved == size + (2 + 4) * 4 * 4  # the gradient, a state per question, and two rows twice
                continue
            if case.operation == "gated_rms":
                assert case.moved == (8 if case.model == "j" else 10) * size
                continue
            assert case.moved // size in {"gated_adaln": (9,) if "frozen" in case.model else (10,), "norm_rope": (5, 6, 7, 8), "dmd_step": (8,), "guided_step": (8,)}[case.operation]


@pytest.fixture
def mocked_gpu(monkeypatch):
    """A clock and an allocator that tick as told, for the bench's measured branch: milliseconds per pass and peak bytes by path."""
    from vlmedit.kernels import bench

    clock = SimpleNamespace(path="kernel", ms={"plain": 3.0, "compiled": 2.0, "kernel": 1.0}, peak={"plain": 300, "compiled": 200, "kernel": 100}, asleep=0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def elapsed_time(self, end):
            return clock.ms[clock.path]

    update = bench._update

    def watched(function, arguments):
        clock.path = "compiled" if getattr(function, "rival", False) else "kernel" if dispatch._chosen == "triton" else "plain"
        return update(function, arguments)

    def rival(function):
        wrapped = lambda *a: function(*a)
        wrapped.rival = True
        return wrapped

    empty = torch.empty
    cuda = {
        "Event": Event, "synchronize": lambda: None, "memory_allocated": lambda: 7 * 2**20, "max_memory_allocated": lambda: (7 + clock.peak[clock.path]) * 2**20,
        "reset_peak_memory_stats": lambda: None, "empty_cache": lambda: None, "_sleep": lambda cycles: setattr(clock, "asleep", cycles),
    }  # fmt: skip
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "compile", rival)
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: empty(*(min(n, 9) if isinstance(n, int) else n for n in a), **k))  # no flush of 256 MiB
    monkeypatch.setattr(bench, "_update", watched)
    monkeypatch.setattr(bench, "REPEATS", 1)
    monkeypatch.setattr(bench, "WARM_UP", 0)
    monkeypatch.setattr(bench, "DTYPE", torch.float32)
    small = bench._modulation("m", 8, 3, 8), bench._rope("m", 8, 3, 2, 4, True), *bench._latents(32), bench._answer("j", 8, 5, 4, 9)
    on_cpu = [replace(case, make=lambda device, make=case.make: make("cpu")) for case in small]
    monkeypatch.setattr(bench, "cases", lambda: iter(on_cpu))
    return bench, clock, on_cpu


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="the clock is mocked")
def test_the_bench_measures_and_judges(mocked_gpu, monkeypatch, tmp_path):
    """The measured branch with a mocked clock: times, share of the copy, memory, errors from real launches, and both verdicts; a kernel must be
    faster and smaller. One failing case is a row with its error, and the file holds every row that was finished."""
    bench, clock, on_cpu = mocked_gpu
    rows = list(bench.run(1e9))
    for row, case in zip(rows, on_cpu, strict=True):
        assert row.error is None, row.error
        assert (row.reference_ms, row.compiled_ms, row.kernel_ms, row.reference_mib, row.compiled_mib, row.kernel_mib, row.saved_mib) == (3, 2, 1, 300, 200, 100, 100)
        assert row.share_of_copy == pytest.approx(case.moved / 1e-3 / 1e9) and 0 < row.max_error < 1e-5 and row.host_ms > 0 and row.compiled_host_ms > 0
        assert row.faster and row.smaller and row.earns_its_place and bench.line(row).split()[-3:] == ["yes", "yes", "yes"]
    assert set(bench.verdicts(rows)) == {c.operation for c in on_cpu} and bench.verdicts(rows)["norm_rope"] == "stays: faster and smaller at all 1 shapes"
    slow = replace(rows[0], kernel_ms=2.5, faster=False, earns_its_place=False)
    assert bench.verdicts([slow])["gated_adaln"] == "goes: faster and smaller at none of 1 shapes"
    assert bench.verdicts([rows[0], slow, replace(slow, kernel_ms=None, earns_its_place=None, error="broken")])["gated_adaln"] == (
        "stays for these shapes alone (1 of 3), to be written into its choice: m 1x3x8"
    )
    for ms, peak, verdict in ((2.5, 100, (False, True)), (1.0, 199, (True, False)), (2.0, 200, (False, False)), (1.99, 100, (False, True))):
        clock.ms["kernel"], clock.peak["kernel"] = ms, peak
        row = next(bench.run(1e9))
        assert (row.faster, row.smaller) == verdict and row.earns_its_place is False

    def broken(*arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch")

    def wrong(*arguments):
        return tuple(0 * v for v in on_cpu[0].kernel(*arguments))

    clock.ms["kernel"] = 1.0
    spoiled = [replace(on_cpu[0], kernel=broken), replace(on_cpu[0], kernel=wrong), on_cpu[1]]

    def dying():
        yield from spoiled
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "cases", dying)
    monkeypatch.setattr(bench, "why_not", lambda: "")
    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 1e9)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--json", str(tmp_path / "bench.json")])
    report = json.loads((tmp_path / "bench.json").read_text())
    first, second, third = report["rows"]
    assert report["verdicts"]["gated_adaln"].startswith("goes") and report["verdicts"]["norm_rope"].startswith("stays")
    assert first["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate" and first["kernel_ms"] is None
    assert "is zero or no number" in second["error"] and third["error"] is None and third["kernel_ms"] == 1.0


def test_traffic_is_counted_where_it_arises(tmp_path, monkeypatch, capsys):
    """A layer whose bytes one can add up by hand, backward pass included; and a small Z-Image called as plan calls the real one, whose norms move
    most between its products, as the real ones do."""
    from vlmedit.kernels import traffic

    from vlmedit.cost import calls
    from vlmedit.networks.backbones import families
    from vlmedit.networks.backbones._base import Published
    from vlmedit.testing import random_models as tiny

    with torch.device("meta"):
        layer, x = torch.nn.Sequential(torch.nn.Linear(3, 5, bias=False), torch.nn.ReLU()), torch.empty(2, 3)
    found = traffic.count(layer, lambda: layer(x))
    products, relu = found[traffic.PRODUCTS], found["Sequential/ReLU"]
    assert (products.launches, products.bytes, products.flops) == (2, 2 * 4 * (6 + 15 + 10), 2 * 2 * 30)  # x, weight, result; and the weight's gradient
    assert (relu.launches, relu.bytes, dict(relu.operations)) == (2, 80 + 120, {"relu": 80, "threshold_backward": 120}) and len(found) == 2
    q = torch.empty(1, 2, 6, 4, device="meta", requires_grad=True)
    k, v = (torch.empty(1, 1, 3, 4, device="meta", requires_grad=True) for _ in range(2))
    found = traffic.count(layer, lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    attention = found[traffic.ATTENTION]
    assert attention.bytes == 4 * (48 + 12 + 12 + 48) + 4 * (2 * (48 + 12 + 12) + 2 * 48) and attention.flops == 14 * 48 * 3
    with torch.device("meta"):
        small = families()["z-image"].tiny.transformer(tiny.WIDTH)
    monkeypatch.setattr(calls, "published", lambda place: Published((place,), lambda: small, lambda: None, ""))
    traffic.main(["--network", "Z-Image", "--json", str(tmp_path / "traffic.json")])
    counts = json.loads((tmp_path / "traffic.json").read_text())["networks"]["Z-Image"]
    between = {kind: m["bytes"] for kind, m in counts.items() if kind not in (traffic.PRODUCTS, traffic.ATTENTION)}
    assert max(between, key=between.get) == "ZImageTransformerBlock/RMSNorm" and counts["attention"]["operations"].keys() == {"forward", "backward"}
    assert "ZImageTransformerBlock/RMSNorm" in capsys.readouterr().out and not small._forward_hooks
    with pytest.raises(SystemExit):
        traffic.main(["--json", str(tmp_path / "nowhere" / "traffic.json")])


def test_the_notebook_skips_politely_without_triton(tmp_path):
    """Notebook 09 where triton cannot be imported: it runs through, says what it leaves out, and claims nothing for the kernels."""
    (tmp_path / "triton.py").write_text("raise ImportError('not here')")
    out = tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks/09_kernels.ipynb"), str(out), "-k", "python3", "--no-progress-bar"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=580, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = checking.recorded(out)
    assert metrics["ran_triton"] is False and metrics["measured_on_gpu"] is False
    assert set(metrics["worst_error"]) == {"float32, reference", "float16, reference"}
    assert "skipped: triton is not installed" in out.read_text()
