"""The fused operations against their references in float64, forward and backward, in Triton's interpreter (on a GPU where one is visible:
`CUDA_VISIBLE_DEVICES=0 pytest tests/test_kernels.py`), and the folder they lie in.

Tolerances are relative to the largest value of each output: a few roundings of the dtype. Shapes are odd, tiny, wider than one block and
strided; all are small, since the interpreter takes milliseconds per program.
"""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlmedit import dmd, flow, learn
from vlmedit.models.dit import Block, rotary_table, rotate

kernels = pytest.importorskip("vlmedit.kernels", reason="vlmedit.kernels is not installed; run: pip install --no-deps --no-build-isolation -e .")
from vlmedit.kernels import dispatch, modulation, rope, sampler  # noqa: E402
from vlmedit.kernels import dmd as fused_dmd  # noqa: E402

ROOT = Path(__file__).parent.parent
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


def rope_inputs(shape, draw):
    angle = draw(shape[2], shape[3] // 2)
    return draw(*shape), 1 + 0.3 * draw(shape[3]), angle.cos(), angle.sin()


def dmd_inputs(shape, draw):
    distance = torch.arange(1.0, shape[0] + 1, dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))  # no two samples alike
    t = torch.linspace(0.2, 0.9, shape[0], dtype=torch.float64)
    return draw(*shape), draw(*shape), t, draw(*shape) * distance, draw(*shape), draw(*shape)


def step_inputs(shape, draw):
    t = torch.linspace(0.5, 0.9, shape[0], dtype=torch.float64)
    return draw(*shape), draw(*shape), draw(*shape), draw(*shape), t, t.flip(0) * 0.5


def without(index: int, make: Callable) -> Callable:
    """The inputs with None at one place."""
    return lambda shape, draw: tuple(None if i == index else v for i, v in enumerate(make(shape, draw)))


TOKENS = ((2, 5, 7), (1, 1, 3), (3, 2, 33))
HEADS = ((2, 3, 5, 6), (1, 1, 1, 2), (1, 2, 3, 20))
PICTURES = ((3, 3, 5, 7), (1, 1, 1, 1), (2, 4, 17, 31), (2, 3))
OPERATIONS = {
    "gated_adaln": Operation(kernels.gated_adaln, modulation.gated_adaln_reference, modulation_inputs, TOKENS, (0, 1, 2, 3, 4)),
    "adaln": Operation(
        kernels.adaln, lambda x, scale, shift: modulation.gated_adaln_reference(x, None, None, scale, shift)[1],
        lambda shape, draw: (draw(*shape), draw(shape[0], shape[2]), draw(shape[0], shape[2])), TOKENS, (0, 1, 2),
    ),
    "norm_rope, halves": Operation(kernels.norm_rope, rope.norm_rope_reference, rope_inputs, HEADS, (0, 1)),
    "norm_rope, neighbors": Operation(kernels.norm_rope, rope.norm_rope_reference, rope_inputs, HEADS, (0, 1), {"interleaved": True}),
    "dmd_step, per sample": Operation(kernels.dmd_step, fused_dmd.dmd_step_reference, dmd_inputs, PICTURES, (0,), {"guidance": 3.5}),
    "dmd_step, per pixel": Operation(kernels.dmd_step, fused_dmd.dmd_step_reference, dmd_inputs, PICTURES, (0,), {"guidance": 3.5, "norm": "pixel"}),
    "dmd_step, unguided": Operation(kernels.dmd_step, fused_dmd.dmd_step_reference, without(4, dmd_inputs), PICTURES[:2], (0,)),
    "guided_step": Operation(kernels.guided_step, sampler.guided_step_reference, step_inputs, PICTURES, (0, 1, 2, 3), {"guidance": 3.5}),
    "guided_step, unguided": Operation(kernels.guided_step, sampler.guided_step_reference, without(2, step_inputs), PICTURES[:2], (0, 1, 3)),
    "guided_step, one gradient": Operation(kernels.guided_step, sampler.guided_step_reference, step_inputs, PICTURES[:1], (1,), {"guidance": 3.5}),
}  # fmt: skip


def inputs(op: Operation, shape: tuple, dtype: torch.dtype, strided: bool = False) -> list[Tensor | None]:
    """Drawn in float64 and rounded to `dtype`. `strided`: same values, every tensor a part of one that is larger on each axis."""
    generator = torch.Generator().manual_seed(sum(shape))
    drawn = [v if v is None else v.to(DEVICE, dtype) for v in op.make(shape, lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64))]
    if strided:
        drawn = [v if v is None else inner(v) for v in drawn]
    return [v if v is None else v.requires_grad_(i in op.wanted) for i, v in enumerate(drawn)]


def inner(v: Tensor) -> Tensor:
    """The same values in a view with gaps between rows; the axes are stored in another order."""
    room = torch.full([n + 2 for n in v.shape], torch.nan, dtype=v.dtype, device=v.device)
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
    exact = [v if v is None else v.detach().double().requires_grad_(i in op.wanted) for i, v in enumerate(arguments)]
    expected = outputs(op.plain, exact, op)
    with kernels.backend(path):
        got = outputs(op.fused, arguments, op)
    nonzero = [i for i, e in enumerate(expected) if e.abs().max() > 1e-9]
    assert nonzero and all(got[i].abs().max() > 0 for i in nonzero)
    assert max(off([got[i] for i in nonzero], [expected[i] for i in nonzero])) < TOLERANCE[torch.float32]
    assert all(g.dtype == torch.float32 for g in got)


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_dtype_and_any_strides(name, dtype):
    """Strided inputs whose gaps hold NaN, in each dtype: what is read outside would show."""
    op = OPERATIONS[name]
    arguments = inputs(op, op.shapes[0], dtype, strided=True)
    assert not arguments[0].is_contiguous()
    exact = [v if v is None else v.detach().double().requires_grad_(i in op.wanted) for i, v in enumerate(arguments)]
    with kernels.backend("triton"):
        got = outputs(op.fused, arguments, op)
    expected = outputs(op.plain, exact, op)
    assert max(off(got, expected)) < TOLERANCE[dtype]
    assert got[-1].dtype == dtype


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
    monkeypatch.setattr(modulation, "PROGRAMS", 2)
    monkeypatch.setattr(rope, "PROGRAMS", 2)
    monkeypatch.setattr(rope, "_tile", lambda width: (2, dispatch.power_of_2(width // 2)))
    for name in ("gated_adaln", "norm_rope, halves"):
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
    """rotary table, rotation, norms and modulation as `vlmedit.models.dit` has them; sampler and DMD as `vlmedit.flow`, `vlmedit.dmd`."""
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
    from vlmedit.exercises.kernels import MODULATION_BACKWARD, Memory, gated_block, normed_row

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
    for grad, value, factor, eps in MODULATION_BACKWARD.cases():
        leaves = value.requires_grad_(), factor.requires_grad_(), torch.zeros_like(factor, requires_grad=True)
        out = modulation.gated_adaln_reference(leaves[0], None, None, *leaves[1:], eps)[1]
        for got, want in zip(MODULATION_BACKWARD.reference(grad, value, factor, eps), torch.autograd.grad(out, leaves, grad)):
            assert torch.allclose(got, want, atol=1e-5) and want.abs().max() > 0.1


# one node for torch


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["gated_adaln", "adaln", "norm_rope, halves", "dmd_step, per sample", "guided_step"])
def test_is_a_proper_custom_op(name, path):
    """torch's own check of schema, fake tensors, autograd's registration and tracing with dynamic shapes."""
    op = OPERATIONS[name]
    a = inputs(op, op.shapes[0], torch.float32, strided=path == "reference")
    node, arguments = {
        "gated_adaln": (modulation._op, (*a, 1e-6)),
        "adaln": (modulation._op, (a[0], None, None, a[1], a[2], 1e-6) if name == "adaln" else ()),
        "norm_rope, halves": (rope._op, (*a, 1e-6, False)),
        "dmd_step, per sample": (fused_dmd._op, (*a, 2.0, "sample", 1e-6)),
        "guided_step": (sampler._op, (*a, 2.0)),
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

    for module, name in ((modulation, "_forward"), (rope, "_forward"), (fused_dmd, "_errors"), (sampler, "_forward")):
        monkeypatch.setattr(module, name, Kernel())
    for name in ("gated_adaln", "norm_rope, halves", "dmd_step, per sample", "guided_step"):
        op = OPERATIONS[name]
        arguments = [v.detach().cpu() for v in inputs(op, op.shapes[0], torch.float32)]
        op.fused(*arguments, **op.fixed)
        if not kernels.triton_missing() and kernels.interpreting():
            with kernels.backend("triton"), pytest.raises(Launched):
                op.fused(*arguments, **op.fixed)


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


x345, row = torch.zeros(3, 4, 5), torch.zeros(3, 5)
head, table = torch.zeros(1, 2, 3, 4), torch.zeros(3, 2)
flat, time = torch.zeros(2, 3), torch.zeros(2)
meta = lambda v: v.to("meta")
BAD = {
    "gate's shape": (lambda: kernels.gated_adaln(x345, x345, row[:2], row, row), ValueError, r"gate has shape \(2, 5\); it must be \(3, 5\)"),
    "branch's shape": (lambda: kernels.gated_adaln(x345, x345[:, :1], row, row, row), ValueError, "branch has shape"),
    "rank": (lambda: kernels.adaln(row, row, row), ValueError, r"must be \(batch, tokens, width\)"),
    "two dtypes": (lambda: kernels.adaln(x345, row.half(), row), TypeError, "scale is torch.float16 and x is torch.float32; cast"),
    "integers": (lambda: kernels.adaln(x345.int(), row, row), TypeError, "x is torch.int32; it must be one of float16"),
    "two devices": (lambda: kernels.adaln(x345, meta(row), row), ValueError, "scale is on meta and x on cpu; move"),
    "odd head": (lambda: kernels.norm_rope(head[..., :3], row[0, :3], table, table), ValueError, "an even head width"),
    "weight's shape": (lambda: kernels.norm_rope(head, row[0], table, table), ValueError, r"weight has shape \(5,\)"),
    "table's shape": (lambda: kernels.norm_rope(head, row[0, :4], table[:2], table), ValueError, r"cos has shape \(2, 2\); it must be \(3, 2\)"),
    "table's device": (lambda: kernels.norm_rope(head, row[0, :4], meta(table), meta(table)), ValueError, "cos is on meta"),
    "table's gradient": (lambda: kernels.norm_rope(head, row[0, :4], table.clone().requires_grad_(), table), ValueError, "detach it"),
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
    assert {str(p.relative_to(ROOT)) for p in callers} <= {"vlmedit/exercises/kernels.py", "vlmedit/exercises/__init__.py"}
    sources = "".join(p.read_text() for p in (ROOT / "kernels/src").glob("*.py"))
    assert not any(word in sources for word in ("vlmedit.world", "vlmedit.evaluate", "vlmedit.train", "vlmedit.schooling"))


def test_every_package_is_declared():
    """The list in pyproject.toml, which a folder mapping needs, against the folders."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "vlmedit").rglob("__init__.py")} | {"vlmedit.kernels"}
    assert set(declared["packages"]) == found
    assert declared["package-dir"]["vlmedit.kernels"] == "kernels/src"


def test_a_wheel_holds_the_kernels_under_their_name_alone(tmp_path):
    pytest.importorskip("setuptools", "77.0.3")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tree / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("vlmedit", "kernels"):
        for source in (ROOT / folder).rglob("*.py"):
            copy = tree / source.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"vlmedit/kernels/{p.name}" for p in (ROOT / "kernels/src").glob("*.py")} <= set(names)
    assert not [n for n in names if n.startswith("kernels")]


@needs_triton
def test_every_kernel_compiles_for_gpus():
    """Without a GPU the compiler still runs: machine code for compute capability 8.0 and 9.0, every kernel, as launched for bfloat16."""
    done = python("from vlmedit.kernels.bench import compiled\nfor row in compiled((80, 90)): print(*row)", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {r[0] for r in rows} == {"modulation", "rope", "dmd", "sampler"} and len(rows) >= 2 * 12
    assert all(int(r[-1]) > 1000 for r in rows)  # bytes of machine code


@pytest.mark.skipif(DEVICE == "cuda", reason="says what is missing where there is no GPU")
def test_the_bench_claims_nothing_without_a_gpu(tmp_path, capsys):
    """Shapes and bytes of every operation and model, no time, no verdict; and the file says why."""
    from vlmedit.kernels import bench

    bench.main(["--json", str(tmp_path / "bench.json")])
    assert "Nothing is measured, so nothing is claimed: no CUDA device" in capsys.readouterr().out
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["measured"] is False and report["reason"] == "no CUDA device" and report["copy_bytes_per_second"] is None
    seen = {(r["operation"], r["side"]) for r in report["rows"]}
    assert seen == {(o, s) for o in ("gated_adaln", "norm_rope", "dmd_step", "guided_step") for s in (512, 1024)}
    measured = [v for r in report["rows"] for k, v in r.items() if k.endswith(("_ms", "_mib")) or k in ("share_of_copy", "earns_its_place")]
    assert measured and not any(v is not None for v in measured) and all(r["bytes_moved"] > 0 for r in report["rows"])
    with pytest.raises(SystemExit):
        bench.main(["--json", str(tmp_path / "nowhere" / "bench.json")])


def test_the_bench_counts_what_moves():
    """Bytes of each case, from tensors of its kind: inputs, outputs and gradients once, and what the backward pass reads again. And the update
    it times runs, on both paths, with equal gradients."""
    from vlmedit.kernels import bench

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "DTYPE", torch.float32)
        for case in (bench._modulation("m", 8, 3, 8), bench._rope("m", 8, 3, 2, 4), *bench._latents(32)):
            arguments = case.make("cpu")
            torch.manual_seed(1)
            got = bench._update(case.kernel, arguments)()
            torch.manual_seed(1)
            want = bench._update(case.reference, arguments)()
            assert max(off(list(got), list(want))) < 1e-5
            size = arguments[0].nbytes
            assert case.moved // size in {"gated_adaln": (10,), "norm_rope": (5, 6, 7, 8), "dmd_step": (10,), "guided_step": (8,)}[case.operation]


def test_the_notebook_skips_politely_without_triton(tmp_path):
    """Notebook 09 where triton cannot be imported: it runs through, says what it leaves out, and claims nothing for the kernels."""
    (tmp_path / "triton.py").write_text("raise ImportError('not here')")
    out = tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks/09_kernels.ipynb"), str(out), "-k", "python3", "--no-progress-bar"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=580, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = learn.recorded(out)
    assert metrics["ran_triton"] is False and metrics["measured_on_gpu"] is False
    assert set(metrics["worst_error"]) == {"float32, reference", "float16, reference"}
    assert "skipped: triton is not installed" in out.read_text()
