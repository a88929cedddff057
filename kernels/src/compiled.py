"""Machine code of every kernel exactly as it is launched, without a GPU: the real operations run on CPU tensors, and each launch is compiled for
a compute capability with its own arguments (types, specialization on strides and sizes, warps) instead of run. What the tensors hold after
that means nothing. `python -m vlmedit.kernels.compiled` prints registers, spilled bytes and the widths of global accesses at the shapes of
the bench; it needs Triton imported for compiling (TRITON_INTERPRET=0).
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from vlmedit.kernels import dispatch


@dataclass(frozen=True)
class Binary:
    """One launch's machine code; registers per thread, bytes spilled per thread, and PTX by which one can count instructions."""

    kernel: str  # module.function
    grid: tuple[int, ...]
    warps: int
    size: int  # bytes
    registers: int
    spilled: int
    ptx: str

    def count(self, what: str) -> int:
        """How often an instruction's name, such as div.s64, occurs."""
        return len(re.findall(rf"\b{re.escape(what)}\b", self.ptx))

    @property
    def accesses(self) -> Counter:
        """Global loads and stores by the bits that one thread moves in one of them."""
        found = re.findall(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", self.ptx)
        return Counter(f"{kind} {int(lanes or 1) * int(bits)}" for kind, lanes, bits in found)


class _Driver:
    """As much of a GPU's driver as the compiler asks for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def why_not() -> str:
    """Why nothing can be compiled here; empty when it can."""
    if why := dispatch.triton_missing():
        return why
    if dispatch.interpreting():
        return "triton was imported for interpreting; start Python with TRITON_INTERPRET=0"
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        get_ptxas(90)
    except Exception as error:
        return f"triton finds no ptxas: {error}"
    return ""


@contextmanager
def compiling(capability: int = 90) -> Iterator[list[Binary]]:
    """Within it every launch is compiled and listed, none runs, and CPU tensors go to Triton. Raises RuntimeError where it cannot be."""
    if why := why_not():
        raise RuntimeError(f"nothing can be compiled: {why}")
    from triton.runtime import driver

    made: list[Binary] = []

    def start(kernel, grid, *arguments, **settings):
        code = kernel.warmup(*arguments, grid=grid, **settings)
        usage = _usage(code.asm["cubin"])
        made.append(Binary(f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}", grid, settings["num_warps"], len(code.asm["cubin"]), *usage, code.asm["ptx"]))

    before = driver._active
    driver.set_active(_Driver(capability))
    try:
        with mock.patch.object(dispatch, "start", start), mock.patch.object(dispatch, "interpreting", lambda: True), dispatch.backend("triton"):
            yield made
    finally:
        driver._active = before


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread, by NVIDIA's own tool, which triton brings along; -1 where it is missing."""
    tool = os.path.join(os.path.dirname(dispatch.triton.__file__), "backends/nvidia/bin/cuobjdump")
    if not os.path.exists(tool):
        return -1, -1
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (-1, -1)


def update(operation: Callable, arguments: list, fixed: dict | None = None) -> None:
    """Forward and backward of an operation, for what they launch."""
    found = operation(*arguments, **(fixed or {}))
    live = [f for f in (found if isinstance(found, tuple) else (found,)) if f.requires_grad]
    torch.autograd.grad(live, [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad], [torch.empty_like(f) for f in live])


def main() -> None:
    from vlmedit.kernels import bench

    if why := why_not():
        raise SystemExit(f"nothing can be compiled: {why}")
    seen = set()
    for case in bench.cases():
        with compiling() as made:
            update(case.kernel, case.make("cpu"))
        for b in made:
            key = b.kernel, b.ptx
            if key not in seen:
                seen.add(key)
                accesses = ", ".join(f"{n} x {kind}" for kind, n in sorted(b.accesses.items()))
                print(f"{case.operation:<12}{case.model:<16}{case.side:>5}  {b.kernel:<22}{b.warps:>3} warps {b.registers:>4} registers {b.spilled:>4} spilled  {accesses}", flush=True)


if __name__ == "__main__":
    main()
