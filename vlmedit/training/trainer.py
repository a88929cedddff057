"""The one trainer: the loop of every method, on the world of shapes and on real models.

A run is a generator: it yields a `Step` per update and knows nothing of progress bars, plots or early stops. All
randomness of update k is seeded from (seed, k, number of the batch), so that resuming from a checkpoint repeats the
uninterrupted run exactly, and two processes do what one does that accumulates two batches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from accelerate import Accelerator

from vlmedit.config import TrainConfig
from vlmedit.errors import ConfigError
from vlmedit.protocols import Data, Method, Phase
from vlmedit.training.run import Run, Step


def train(method: Method, data: Data, config: TrainConfig, accelerator: Accelerator | None = None) -> Iterator[Step]:
    """Yield a `Step` per update; the (averaged) result is in `out/model` at the end. Raises ConfigError for data that
    do not give what the method is trained on, and for a checkpoint of another configuration."""
    run = Run(method, data, config, accelerator)
    for index in run.updates():
        memory: dict[int, dict] = defaultdict(dict)
        held, first = [], []
        for phase in method.phases(index):
            check_phase(phase, bool(held), method, data, config)
            if phase.batch is not None:
                held = run.draw(phase, index)
                first = first or held
            for number, batch in held:
                with run.stream(index, number), run.autocast():
                    run.note(number, method.backward(phase, batch, memory[number], index))
            run.step(phase, index)
        run.move_averages(index)
        method.after(index)
        yield run.record(index, first, memory)
    run.finish()


def check_phase(phase: Phase, drawn: bool, method: Method, data: Data, config: TrainConfig) -> None:
    """Raise ConfigError for data that cannot give a phase's batches, ValueError for a phase that nobody can carry out.
    `drawn`: whether an earlier phase of the update left batches."""
    if phase.batch is not None and not data.gives(phase.batch):
        what = f"data is {config.data.place!r}, which gives no {phase.batch.__name__}"
        raise ConfigError(f"{what}; this method needs them: data=world")
    if phase.batch is None and not drawn:
        raise ValueError(f"phase {phase.name!r} is an update's first and names no batch to draw")
    if unknown := sorted(set(phase.trains) - method.trained.keys()):
        trained = ", ".join(method.trained)
        raise ValueError(
            f"phase {phase.name!r} trains {', '.join(unknown)}, which the method does not; it trains {trained}"
        )
