"""Which path an operation takes, and the checks that all of them share.

auto       Triton for CUDA tensors of a supported shape, the torch reference otherwise, also where Triton interprets (the default)
reference  always the torch reference
triton     always Triton; on CPU tensors through Triton's interpreter, which is slow and exact: for tests and teaching

The interpreter is chosen by TRITON_INTERPRET=1 before triton is first imported; without a CUDA device this module sets it.
Numbers such as a guidance scale reach a kernel as float32, also where it computes in float64. The interpreter cuts bfloat16 off where a GPU
rounds to the nearest: its errors there are up to twice as large.
"""

import os
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # compiled kernels could not run anyway
_missing = ""
try:
    import triton
    import triton.language as tl
except ImportError:  # an optional dependency
    _missing = "triton is not installed; on Linux: pip install 'vlmedit[kernels]'"

    class _NoTriton:
        constexpr = object  # what the kernels' signatures name

        @staticmethod
        def jit(function):
            return function

    triton = tl = _NoTriton()

BACKENDS = ("auto", "reference", "triton")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_SAMPLES = 65535  # programs along the second and third axis of a CUDA grid

_chosen = "auto"  # a plain global: the backward pass runs in threads of autograd's own


def triton_missing() -> str:
    """Why Triton cannot be used here; empty when it can."""
    return _missing


def interpreting() -> bool:
    """Whether kernels run in the interpreter; settled when triton was imported."""
    return not triton_missing() and type(tl.sum).__name__ == "InterpretedFunction"


@contextmanager
def backend(name: str):
    """Choose the path of every operation within: auto, reference or triton. Raises ValueError for an unknown name and
    RuntimeError where Triton is asked for and missing."""
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    if name == "triton" and (why := triton_missing()):
        raise RuntimeError(why)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def use_triton(x: Tensor, supported: bool, limit: str) -> bool:
    """The choice for tensors on the device of `x`, whose first axis is the samples. Raises RuntimeError where Triton was asked for by name
    and cannot serve."""
    if x.shape[0] > MOST_SAMPLES:
        supported, limit = False, f"there may be at most {MOST_SAMPLES} samples"
    if _chosen == "reference":
        return False
    if _chosen == "auto":
        return x.is_cuda and supported and not triton_missing() and not interpreting()
    if not supported:
        raise RuntimeError(f"no Triton kernel for shape {tuple(x.shape)}: {limit}; choose the backend auto or reference")
    if not x.is_cuda and not interpreting():
        raise RuntimeError("Triton was imported for compiling, which CPU tensors cannot use; start Python with TRITON_INTERPRET=1")
    return True


def start(kernel, grid: tuple[int, ...], *arguments, **settings) -> None:
    """The one place where kernels are launched: tests watch it, and `vlmedit.kernels.compiled` compiles instead."""
    kernel[grid](*arguments, **settings)


def launch(kernel, grid: tuple[int, ...], on: Tensor, *arguments, **settings) -> None:
    """Run a kernel on the device of `on`, which need not be the current one."""
    with torch.cuda.device(on.device) if on.is_cuda else nullcontext():
        start(kernel, grid, *arguments, **settings)


def processors(on: Tensor) -> int:
    """Multiprocessors of the GPU that holds `on`; on a CPU the number of a common one, so that the interpreter splits sums alike."""
    return torch.cuda.get_device_properties(on.device).multi_processor_count if on.is_cuda else 132


def same_device(operation: str, **tensors: Tensor) -> None:
    """Raises TypeError or ValueError unless all are tensors on one device."""
    first, like = next(iter(tensors.items()))
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{operation}: {name} is {'None' if t is None else f'of type {type(t).__name__}'}; it must be a tensor")
        if t.device != like.device:
            raise ValueError(f"{operation}: {name} is on {t.device} and {first} on {like.device}; move them to one device")


def same_kind(operation: str, **tensors: Tensor) -> None:
    """Raises TypeError or ValueError unless all are tensors of one supported dtype on one device."""
    first, like = next(iter(tensors.items()))
    for name, t in tensors.items():
        same_device(operation, **{first: like, name: t})
        if t.dtype not in DTYPES:
            known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise TypeError(f"{operation}: {name} is {t.dtype}; it must be one of {known}")
        if t.dtype != like.dtype:
            raise TypeError(f"{operation}: {name} is {t.dtype} and {first} is {like.dtype}; cast them to one dtype")


def shaped(operation: str, name: str, t: Tensor | None, shape: tuple) -> None:
    """Raises ValueError unless `t` is None or has the shape."""
    if t is not None and tuple(t.shape) != tuple(shape):
        raise ValueError(f"{operation}: {name} has shape {tuple(t.shape)}; it must be {tuple(shape)}")


def rows_contiguous(t: Tensor) -> Tensor:
    """`t` itself where its last axis is dense, which is all the kernels ask for; a copy otherwise."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def accumulator(t: Tensor):
    """The dtype in which a kernel computes: float32, or float64 for float64."""
    return tl.float64 if t.dtype == torch.float64 else tl.float32


def wide(t: Tensor) -> torch.dtype:
    """The same as torch's dtype, for buffers of statistics and partial sums."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def exact(t: Tensor) -> torch.autocast:
    """Where a reference multiplies matrices: autocast would round its float32 to half precision, and a kernel knows nothing of autocast."""
    return torch.autocast(t.device.type, enabled=False)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
