"""Whether a kernel earns its place on this GPU: time, bandwidth, memory and error of each at the shapes of real models.

    python -m vlmedit.kernels.bench [--json FILE]

For each operation and shape, forward plus backward in bfloat16: milliseconds of the plain reference, of torch.compile of it and of the
kernel; the bytes that must move (every input read once, every output and gradient written once, what the backward pass needs read
again); the kernel's share of the copy bandwidth measured on the same GPU; the peak memory above the inputs of all three, with what the
kernel saves against torch.compile; the milliseconds of host time per call; and the largest error of all results and gradients against the
reference in float64, relative to the largest value of each. Rows named "frozen" train an adapter: the norm's or the modulation's own
numbers want no gradient. The rule of the suite: a kernel that is not faster than torch.compile, or saves no memory against it, is removed,
and its numbers stay in the log; both verdicts are columns, and the last lines say what follows for each operation.

A case that fails is a row with its error, and the others go on; with --json the file is written anew after every row.

Without a CUDA device nothing is measured and nothing is claimed: the table then holds shapes and bytes alone, says what is missing and why,
and the command succeeds.

Shapes: Z-Image (width 3840, 30 heads of 128), FLUX and Qwen-Image (3072, 24 heads of 128), 16 latent channels at an eighth of the side, tokens
of 2 x 2 latents; an editor's sequence holds the reference's tokens too. Queries and keys are normed and turned with the text's where both are one
sequence (all of Z-Image's layers, FLUX's single blocks), and without in Qwen-Image, which turns either by itself. Z-Image's blocks, x + tanh(gate) RMS(branch)
without a shift, are `gated_rms`'s, and so is the plain residual with the next norm in a judge's language model. Judges (side: what the tower sees)
read pictures of 512 and 1024 pixels and answer two questions on two pictures each: InternVL3 14B, Qwen2.5-VL 7B, Qwen3-VL 8B, and LLaVA-OneVision 7B, which sees 384.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from vlmedit.kernels import answer, dmd, modulation, patches, residual, rope, sampler
from vlmedit.kernels.dispatch import backend, interpreting, triton, triton_missing

DTYPE = torch.bfloat16
RMS_BLOCKS = {"Z-Image"}  # models whose blocks norm by the root mean square, before and after a branch
MODELS = {"Z-Image": (3840, 30, 128), "FLUX": (3072, 24, 512), "Qwen-Image": (3072, 24, 0)}  # width, heads, text tokens beside the pictures' where they are turned
JUDGES = {
    "InternVL3": (448, None, 1, 1, 5120, 151674), "Qwen2.5-VL": (448, 14, 2, 2, 3584, 152064), "Qwen3-VL": (448, 16, 2, 2, 4096, 151936),
    "LLaVA-OneVision": (384, None, 1, 1, 3584, 152000),
}  # fmt: skip
# side of the resized picture, patch, merge, frames; width of the states, words
VISUAL = {"InternVL3": 256, "Qwen2.5-VL": 256, "Qwen3-VL": 196, "LLaVA-OneVision": 730}  # tokens of a picture at that side
QUESTIONS, WORDS = 2, 64  # rows, and tokens of text in each
LATENT_CHANNELS = 16
MEASURED = ("milliseconds", "copy bandwidth and each kernel's share of it", "peak and saved memory", "errors", "whether a kernel earns its place")
WARM_UP, REPEATS = 5, 30
FASTER = 0.98  # of torch.compile's time counts as less: above it the clock's scatter decides
SMALLER = 0.95  # of torch.compile's peak memory counts as less: above it the allocator's rounding decides


@dataclass(frozen=True)
class Case:
    """One operation at one shape. `make` draws its inputs on a device; `moved` counts the bytes of forward and backward."""

    operation: str
    model: str
    side: int
    shape: tuple[int, ...]
    reference: Callable
    kernel: Callable
    make: Callable[[str], list[Tensor]]
    moved: int


@dataclass(frozen=True)
class Row:
    """Milliseconds and MiB; None where there is no GPU."""

    operation: str
    model: str
    side: int
    shape: tuple[int, ...]
    bytes_moved: int
    reference_ms: float | None = None
    compiled_ms: float | None = None
    kernel_ms: float | None = None
    share_of_copy: float | None = None
    reference_mib: float | None = None
    compiled_mib: float | None = None
    kernel_mib: float | None = None
    saved_mib: float | None = None  # compiled - kernel
    host_ms: float | None = None  # of the kernel's wrapper
    compiled_host_ms: float | None = None
    max_error: float | None = None  # of the kernel against float64, relative
    faster: bool | None = None  # than torch.compile
    smaller: bool | None = None
    earns_its_place: bool | None = None  # faster and smaller
    error: str | None = None  # what went wrong, in place of numbers


def _drawn(device: str, *shapes: tuple, wanted: int) -> list[Tensor]:
    """Random tensors, the first `wanted` with gradient."""
    return [torch.randn(*s, device=device, dtype=DTYPE).requires_grad_(i < wanted) for i, s in enumerate(shapes)]


def _modulation(model: str, side: int, tokens: int, width: int, frozen: bool = False) -> Case:
    shape, per = (1, tokens, width), (1, width)
    size = tokens * width * DTYPE.itemsize
    make = lambda d: _drawn(d, shape, shape, per, per, per, wanted=2 if frozen else 5)
    # forward: x, branch -> y, h; backward: two cotangents, y, and for the gate's gradient branch -> two gradients
    moved = (9 if frozen else 10) * size
    return Case("gated_adaln", model + " frozen" * frozen, side, shape, modulation.gated_adaln_reference, modulation.gated_adaln, make, moved)


def _residual(model: str, side: int, tokens: int, width: int, frozen: bool = False) -> Case:
    """Z-Image's residual: both norms, a gate."""
    shape, per = (1, tokens, width), (1, width)
    make = lambda d: _drawn(d, shape, shape, per, per, wanted=2 if frozen else 4)
    # forward: x, branch -> y, h; backward: two cotangents, y, branch -> two gradients
    return Case("gated_rms", model + " frozen" * frozen, side, shape, residual.gated_rms_reference, residual.gated_rms, make, 10 * tokens * width * DTYPE.itemsize)


def _norm(model: str, side: int, length: int, width: int) -> Case:
    """A frozen judge's: no gate, and the branch as it is."""
    shape = (QUESTIONS, length, width)

    def make(device: str) -> list[Tensor]:
        x, branch = _drawn(device, shape, shape, wanted=2)
        return [x, branch, torch.randn(width, device=device, dtype=DTYPE).expand(QUESTIONS, -1)]

    plain = lambda f: lambda x, branch, weight: f(x, branch, None, weight, 1e-6, False)
    # forward: x, branch -> y, h; backward: two cotangents, y -> one gradient for both
    return Case("gated_rms", model, side, shape, plain(residual.gated_rms_reference), plain(residual.gated_rms), make, 8 * QUESTIONS * length * width * DTYPE.itemsize)


def _rope(model: str, side: int, tokens: int, heads: int, head: int, frozen: bool = False) -> Case:
    shape = (1, tokens, heads, head)  # as the projection gives it
    size = tokens * heads * head * DTYPE.itemsize

    def make(device: str) -> list[Tensor]:
        angle = torch.randn(tokens, head // 2, device=device)
        return [*_drawn(device, shape, (head,), wanted=1 if frozen else 2), angle.cos(), angle.sin()]

    through = lambda f: lambda x, weight, cos, sin: f(x.transpose(1, 2), weight, cos, sin, interleaved=True)
    # forward: x -> out; backward: cotangent, x -> gradient; the table in float32, twice
    return Case("norm_rope", model + " frozen" * frozen, side, shape, through(rope.norm_rope_reference), through(rope.norm_rope), make, 5 * size + 2 * tokens * head * 4)


def _latents(side: int) -> tuple[Case, Case]:
    shape = (1, LATENT_CHANNELS, side // 8, side // 8)
    size = LATENT_CHANNELS * (side // 8) ** 2 * DTYPE.itemsize

    def scores(device: str) -> list[Tensor]:
        x, eps, cond, uncond, fake = _drawn(device, *[shape] * 5, wanted=1)
        return [x, eps, torch.full((1,), 0.5, device=device, dtype=DTYPE), cond, uncond, fake]

    def step(device: str) -> list[Tensor]:
        times = [torch.full((1,), v, device=device, dtype=DTYPE) for v in (0.75, 0.5)]
        return [*_drawn(device, *[shape] * 4, wanted=2), *times]

    loss = lambda f: lambda *a: f(*a, guidance=3.5)[0]
    guided = lambda f: lambda *a: f(*a, guidance=3.5)
    return (
        # x, eps, cond, uncond, fake -> gradient; backward: gradient -> gradient. The kernel's second pass reads cond and uncond again: not a must
        Case("dmd_step", "16 channels", side, shape, loss(dmd.dmd_step_reference), loss(dmd.dmd_step), scores, 8 * size),
        # forward: x, cond, uncond, noise -> x'; backward: cotangent -> gradients of x and cond
        Case("guided_step", "16 channels", side, shape, guided(sampler.guided_step_reference), guided(sampler.guided_step), step, 8 * size),
    )


def _patches(model: str, side: int, picture: int, patch: int | None, merge: int, frames: int) -> Case:
    shape = (1, 3, picture, picture)

    def make(device: str) -> list[Tensor]:
        (pictures,) = _drawn(device, shape, wanted=1)
        return [pictures, *(torch.full((3,), 0.5, device=device) for _ in range(2))]

    cut = lambda f: lambda *a: f(*a, (side, side), patch, merge, frames)
    # forward: pictures -> patches; backward: cotangent -> gradient
    moved = 2 * 3 * (picture**2 + frames * side**2) * DTYPE.itemsize
    return Case("vlm_patches", model, side, shape, cut(patches.vlm_patches_reference), cut(patches.vlm_patches), make, moved)


def _answer(model: str, side: int, length: int, width: int, words: int) -> Case:
    shape = (QUESTIONS, length, width)

    def make(device: str) -> list[Tensor]:
        head, states = _drawn(device, (words, width), shape, wanted=0)
        position = torch.full((QUESTIONS,), length - 1, device=device)
        return [states.requires_grad_(), head, position, torch.ones(QUESTIONS, device=device)]

    ask = lambda f: lambda *a: f(*a, yes=words // 2, no=words // 3, gain=0.5)
    # forward: a state per question, two rows; backward: two rows -> gradient of all states
    moved = (QUESTIONS * length + QUESTIONS + 4) * width * DTYPE.itemsize
    return Case("answer_loss", model, side, shape, ask(answer.answer_loss_reference), ask(answer.answer_loss), make, moved)


def cases() -> Iterator[Case]:
    """Every operation at the shapes of the models that it is for."""
    for side in (512, 1024):
        for model, (width, heads, text) in MODELS.items():
            tokens = 2 * (side // 16) ** 2  # the target's and the reference's
            for frozen in (False, True):
                if model in RMS_BLOCKS:
                    yield _residual(model, side, tokens + text, width, frozen)
                else:
                    yield _modulation(model, side, tokens, width, frozen)
                yield _rope(model, side, tokens + text, heads, width // heads, frozen)
        yield from _latents(side)
    for model, (side, patch, merge, frames, width, words) in JUDGES.items():
        for picture in (512, 1024):
            yield _patches(model, side, picture, patch, merge, frames)
        length = 2 * VISUAL[model] + WORDS
        yield _norm(model, side, length, width)
        yield _answer(model, side, length, width, words)


def _update(function: Callable, arguments: list[Tensor]) -> Callable[[], None]:
    """One forward and backward pass, cotangents drawn once."""
    leaves = [a for a in arguments if a.requires_grad]
    live = lambda found: [f for f in (found if isinstance(found, tuple) else (found,)) if f.requires_grad]
    cotangents = [torch.randn_like(f) for f in live(function(*arguments))]
    return lambda: torch.autograd.grad(live(function(*arguments)), leaves, cotangents)


@dataclass(frozen=True)
class Measured:
    """Of one way to compute a case: median milliseconds of an update, of the host's part of it, and peak MiB above what it starts with."""

    ms: float
    host_ms: float
    mib: float


def _measure(function: Callable, arguments: list[Tensor]) -> Measured:
    """Inputs are evicted from the cache before each update."""
    update = _update(function, arguments)
    for _ in range(WARM_UP):
        update()
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    times, hosts = [], []
    for _ in range(REPEATS):
        flush.zero_()
        torch.cuda._sleep(10_000_000)  # milliseconds, so that the launches are queued before the clock starts
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began = time.perf_counter()
        start.record()
        update()
        end.record()
        hosts.append(1e3 * (time.perf_counter() - began))
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    del flush
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    update()
    torch.cuda.synchronize()
    return Measured(statistics.median(times), statistics.median(hosts), (torch.cuda.max_memory_allocated() - before) / 2**20)


def max_error(case: Case, arguments: list[Tensor]) -> float:
    """Of the kernel's results and gradients at the case's own shape against the reference in float64, relative to the largest value of each.
    Raises ValueError where the kernel gives zeros or no numbers."""
    exact = [a.detach().double().requires_grad_(a.requires_grad) if a.is_floating_point() else a for a in arguments]
    listed = lambda found: list(found) if isinstance(found, tuple) else [found]
    got, want = listed(case.kernel(*arguments)), listed(case.reference(*exact))
    live = [i for i, g in enumerate(got) if g.requires_grad]
    cotangents = [torch.randn_like(got[i]) for i in live]
    gradients = lambda found, inputs, sent: torch.autograd.grad([found[i] for i in live], [a for a in inputs if a.requires_grad], sent)
    got += gradients(got, arguments, cotangents)
    want += gradients(want, exact, [c.double() for c in cotangents])
    worst = 0.0
    for g, w in ((g.detach(), w.detach()) for g, w in zip(got, want)):
        size = float(w.abs().max())
        if not size:
            continue
        if not g.isfinite().all() or not g.any():
            raise ValueError(f"{case.operation} at {case.shape}: the kernel's result or gradient of shape {tuple(g.shape)} is zero or no number")
        worst = max(worst, float((g.double() - w).abs().max()) / size)
    return worst


def copy_bandwidth() -> float:
    """Bytes per second of a copy of 1 GiB, read and write counted."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * 2**30 / (statistics.median(times) / 1e3)


def why_not() -> str:
    """Why nothing can be measured here; empty when it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if why := triton_missing():
        return why
    return "TRITON_INTERPRET=1 is set, and the interpreter's times mean nothing; unset it" if interpreting() else ""


def measured(case: Case, head: tuple, bandwidth: float) -> Row:
    """A case on the GPU."""
    arguments = case.make("cuda")
    torch._dynamo.reset()
    with backend("triton"):
        error = max_error(case, arguments)
        kernel = _measure(case.kernel, arguments)
    plain, rival = _measure(case.reference, arguments), _measure(torch.compile(case.reference), arguments)
    faster, smaller = kernel.ms < FASTER * rival.ms, kernel.mib < SMALLER * rival.mib
    return Row(
        *head, plain.ms, rival.ms, kernel.ms, case.moved / (kernel.ms / 1e3) / bandwidth, plain.mib, rival.mib, kernel.mib, rival.mib - kernel.mib, kernel.host_ms, rival.host_ms,
        error, faster, smaller, faster and smaller,
    )  # fmt: skip


def run(bandwidth: float | None) -> Iterator[Row]:
    """A row per case; with times where a copy's bandwidth (bytes per second) is given. A case that fails is a row with its error."""
    for case in cases():
        head = (case.operation, case.model, case.side, case.shape, case.moved)
        if bandwidth is None:
            yield Row(*head)
            continue
        try:
            yield measured(case, head, bandwidth)
        except Exception as error:  # out of memory, a compiler's refusal: the other cases still count
            yield Row(*head, error=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"[:300])
            torch.cuda.empty_cache()


def verdicts(rows: list[Row]) -> dict[str, str]:
    """What the rule says of each operation, from all of its rows; one that failed earns nothing."""
    said = {}
    for operation in dict.fromkeys(row.operation for row in rows):
        own = [row for row in rows if row.operation == operation]
        earning = [f"{row.model} {'x'.join(map(str, row.shape))}" for row in own if row.earns_its_place]
        if not any(row.kernel_ms or row.error for row in own):
            said[operation] = "not measured"
        elif len(earning) == len(own):
            said[operation] = f"stays: faster and smaller at all {len(own)} shapes"
        elif earning:
            said[operation] = f"stays for these shapes alone ({len(earning)} of {len(own)}), to be written into its choice: {', '.join(earning)}"
        else:
            said[operation] = f"goes: faster and smaller at none of {len(own)} shapes"
    return said


def line(row: Row) -> str:
    """A row of the table."""
    cell = lambda v, digits: f"{'-':>9}" if v is None else f"{v:>9.{digits}f}"
    yes_no = lambda v: f"{ {True: 'yes', False: 'no', None: '-'}[v]:>8}"
    numbers = [cell(v, 3) for v in (row.reference_ms, row.compiled_ms, row.kernel_ms)]
    numbers += [cell(row.share_of_copy, 2), *(cell(v, 1) for v in (row.reference_mib, row.compiled_mib, row.kernel_mib, row.saved_mib))]
    numbers += [cell(row.host_ms, 3), f"{'-':>9}" if row.max_error is None else f"{row.max_error:>9.0e}"]
    shape = "x".join(map(str, row.shape))
    verdict = f"  failed: {row.error}" if row.error else "".join(yes_no(v) for v in (row.faster, row.smaller, row.earns_its_place))
    return f"{row.operation:<12}{row.model:<18}{row.side:>5}  {shape:<16}{row.bytes_moved / 2**20:>9.1f}{''.join(numbers)}{verdict}"


HEAD = (
    f"{'operation':<12}{'model':<18}{'side':>5}  {'shape':<16}{'MiB moved':>9}{'plain ms':>9}{'compiled':>9}{'kernel':>9}{'of copy':>9}{'plain MiB':>10}{'compiled':>9}"
    f"{'kernel':>9}{'saved':>9}{'host ms':>9}{'error':>9}{'faster':>8}{'smaller':>8}{'earns':>8}"
)


def written(report: dict, path: str) -> None:
    """The file is whole at any moment: a session that ends early keeps its rows."""
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)
    os.replace(path + ".part", path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlmedit.kernels.bench", description="Time, bandwidth and memory of every fused operation at real models' shapes.")
    parser.add_argument("--json", metavar="FILE", help="write device, bandwidth and rows there as well")
    options = parser.parse_args(arguments)
    if options.json and not os.path.isdir(os.path.dirname(os.path.abspath(options.json))):
        parser.error(f"--json {options.json}: its folder does not exist; make it first")
    why = why_not()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    bandwidth = None if why else copy_bandwidth()
    if why:
        print(f"Nothing is measured, so nothing is claimed: {why}. Missing (-): {', '.join(MEASURED)}.\nWhat can be known, shapes and bytes that must move, in bfloat16:")
    else:
        print(f"{device}, torch {torch.__version__}, a copy moves {bandwidth / 1e9:.0f} GB/s")
    print(HEAD)
    report = {"measured": not why, "reason": why, "not_measured": list(MEASURED) if why else [], "device": device, "torch": torch.__version__, "triton": getattr(triton, "__version__", None)}
    report |= {"copy_bytes_per_second": bandwidth, "rows": [], "verdicts": {}}
    rows = []
    for row in run(bandwidth):
        rows.append(row)
        report["rows"].append(asdict(row))
        report["verdicts"] = verdicts(rows)
        print(line(row), flush=True)
        if options.json:
            written(report, options.json)
    if failed := [row for row in report["rows"] if row["error"]]:
        print(f"{len(failed)} of {len(report['rows'])} cases failed; their rows say why")
    for operation, verdict in report["verdicts"].items():
        if not why:
            print(f"{operation}: {verdict}")


if __name__ == "__main__":
    main()
