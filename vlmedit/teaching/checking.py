"""What the notebooks need besides the method: exercises that check themselves, and metrics that can be read back.

* An `Exercise` is a reference from the package, cases to try, and the mistakes people make, each as a function with its name.
* `check(mine, exercise)` returns `mine` when it is right, the reference while `mine` is an untouched stub (a bare
  `raise NotImplementedError`), so that a notebook runs through unsolved, and raises `WrongAnswer` with a diagnosis otherwise.
* `record(...)` leaves metrics in the notebook's output; `recorded(path)` reads them from an executed notebook.

A mistake is recognised by behaviour: an answer that equals a known wrong function on every case gets that function's name.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import torch
from torch import Tensor

METRICS = "application/vnd.vlmedit.metrics+json"  # the output's type that `recorded` looks for


class WrongAnswer(AssertionError):
    """An exercise's answer differs from the reference; the message says how."""


@dataclass(frozen=True)
class Exercise:
    """`cases()` gives the same argument tuples at every call; `mistakes` maps a diagnosis to a function that makes it."""

    reference: Callable
    cases: Callable[[], Sequence[tuple]]
    mistakes: Mapping[str, Callable] = field(default_factory=dict)
    tolerance: float = 1e-4  # relative, of numbers
    observe: Callable | None = None  # (result, arguments) -> what is compared, where the value is not the point: a loss's derivative

    @property
    def name(self) -> str:
        return self.reference.__name__


def banner(difficulty: int, importance: int, minutes: int) -> None:
    """Show how hard and how important an exercise is (1 to 5) and about how long it takes."""
    for name, value in (("difficulty", difficulty), ("importance", importance)):
        if not 1 <= value <= 5:
            raise ValueError(f"{name} is {value}; it goes from 1 to 5")
    if minutes < 1:
        raise ValueError(f"minutes is {minutes}; it must be at least 1")
    from IPython.display import Markdown, display

    dots = lambda n: "●" * n + "○" * (5 - n)
    display(Markdown(f"Difficulty {dots(difficulty)} · importance {dots(importance)} · about {minutes} minutes"))


def check(mine: Callable, exercise: Exercise) -> Callable:
    """`mine` if it is right, the reference if it is still a stub. Raises `WrongAnswer` with a diagnosis otherwise."""
    if not callable(mine):
        raise WrongAnswer(f"{exercise.name} is a {type(mine).__name__}; define a function")
    for number, (mine_gets, reference_gets, pristine) in enumerate(zip(exercise.cases(), exercise.cases(), exercise.cases()), 1):
        where = f"{exercise.name}, case {number}"
        try:
            got = _call(mine, mine_gets, exercise.observe)
        except NotImplementedError as error:
            if error.args:  # a library's own, not the stub's
                raise WrongAnswer(f"{where}: fails with NotImplementedError: {error}") from error
            print(f"{exercise.name}: not solved yet; the notebook goes on with the reference")
            return exercise.reference
        except Exception as error:
            raise WrongAnswer(f"{where}: fails with {type(error).__name__}: {error}") from error
        fault = difference(got, _call(exercise.reference, reference_gets, exercise.observe), exercise.tolerance)
        if fault:
            known = recognise(mine, exercise)
            raise WrongAnswer(f"{where}: {fault}" + (f". It looks as if {known}" if known else ""))
        if difference(mine_gets, pristine, 0.0):
            raise WrongAnswer(f"{where}: the arguments are changed in place; work on copies")
    print(f"{exercise.name}: right on {number} cases; the notebook goes on with yours")
    return mine


def recognise(mine: Callable, exercise: Exercise) -> str | None:
    """The known mistake that `mine` makes, if it equals one on every case."""
    for diagnosis, wrong in exercise.mistakes.items():
        if all(_same(mine, wrong, a, b, exercise) for a, b in zip(exercise.cases(), exercise.cases())):
            return diagnosis
    return None


def _call(function: Callable, arguments: tuple, observe: Callable | None):
    """Call with fixed noise, leaving the notebook's own generator as it was; what is observed of the result."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = function(*arguments)
        return result if observe is None else observe(result, arguments)


def _same(one: Callable, other: Callable, mine_gets: tuple, other_gets: tuple, exercise: Exercise) -> bool:
    try:
        return difference(_call(one, mine_gets, exercise.observe), _call(other, other_gets, exercise.observe), exercise.tolerance) is None
    except Exception:  # an answer that fails on a later case is no known mistake
        return False


def difference(got, expected, tolerance: float) -> str | None:
    """How a result differs from what it should be, in one sentence, or None. `tolerance` is relative to the largest value."""
    if isinstance(expected, Tensor):
        return _tensor_difference(got, expected, tolerance)
    if isinstance(expected, (tuple, list)):
        if not isinstance(got, (tuple, list)) or len(got) != len(expected):
            return f"returns {_name(got)}, expected {_name(expected)}"
        faults = (difference(a, b, tolerance) for a, b in zip(got, expected))
        return next((f"item {i}: {f}" for i, f in enumerate(faults) if f), None)
    if isinstance(expected, float) and not isinstance(got, bool) and isinstance(got, (int, float)):
        near = math.isclose(got, expected, rel_tol=tolerance, abs_tol=tolerance)
        return None if near else f"returns {got:.6g}, expected {expected:.6g}"
    if type(got) is not type(expected):
        return f"returns {_name(got)}, expected {_name(expected)}"
    return None if got == expected else f"returns {got!r}, expected {expected!r}"


def _tensor_difference(got, expected: Tensor, tolerance: float) -> str | None:
    if not isinstance(got, Tensor):
        return f"returns {_name(got)}, expected {_name(expected)}"
    if got.shape != expected.shape:
        return f"returns {_name(got)}, expected {_name(expected)}; look at the axes you average over, and at broadcasting"
    if got.dtype != expected.dtype:
        return f"returns {got.dtype}, expected {expected.dtype}"
    if got.requires_grad != expected.requires_grad:
        return "carries a graph and must not: a detach is missing" if got.requires_grad else "carries no graph: a detach too many"
    got, expected = got.detach().double(), expected.detach().double()
    if not got.isfinite().all() and expected.isfinite().all():
        return "is not finite"
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    allowed = tolerance * scale
    off = float((got - expected).abs().max()) if expected.numel() else 0.0
    if off <= allowed:
        return None
    if float((got + expected).abs().max()) <= allowed:
        return "has the opposite sign everywhere"
    ratio = got / expected
    if expected.numel() > 1 and float((ratio - ratio.mean()).abs().max()) <= tolerance * float(ratio.mean().abs()):
        return f"is {ratio.mean():.4g} times too large everywhere"
    shift = got - expected
    if expected.numel() > 1 and float((shift - shift.mean()).abs().max()) <= allowed:
        return f"is off by the same {shift.mean():.4g} everywhere"
    return f"differs by up to {off:.4g}, where values go up to {scale:.4g}"


def _name(value) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (tuple, list)) else "")


def solution(exercise: Exercise) -> None:
    """Show the reference's source, folded. It cannot drift from the package: it is the package."""
    from IPython.display import HTML, display

    title = f"{exercise.reference.__module__}.{exercise.name}"
    source = escape(inspect.getsource(exercise.reference))
    display(HTML(f"<details><summary>Solution: <code>{title}</code></summary><pre>{source}</pre></details>"))


def _plain(name: str, value):
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, Mapping):
        return {str(k): _plain(f"{name}.{k}", v) for k, v in value.items()}
    if isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"the metric {name} is {value!r}; metrics are finite numbers, texts, or mappings of them")


def record(**metrics) -> None:
    """Leave metrics in the output of this cell. Raises ValueError for what JSON cannot hold."""
    from IPython.display import display

    plain = {name: _plain(name, value) for name, value in metrics.items()}
    display({METRICS: plain, "text/plain": json.dumps(plain, indent=2)}, raw=True)


def recorded(path: str | Path) -> dict:
    """All metrics that an executed notebook recorded; a later value wins."""
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    outputs = [o for c in cells for o in c.get("outputs", ())]
    return {k: v for o in outputs for k, v in o.get("data", {}).get(METRICS, {}).items()}
