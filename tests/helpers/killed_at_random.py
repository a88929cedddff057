"""A run that is killed with SIGKILL at random instants, again and again, must end where the one ends that nobody
touched.

Usage: python killed_at_random.py MODELS FOLDER COUNT [SEED]

MODELS holds teacher, student and judge. One process imports everything and forks a child for every run, so an instant
costs no start. Each of COUNT runs of a tiny NP-Edit with a checkpoint after every update is killed once, wherever it is
then (one in five before its first checkpoint, while it loads), and started again; a line tells after which update, and
whether every weight, average, optimizer state and metric of the end equals the straight run's. Exit status 1 if any
does not.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import load_file

from vlmedit.methods.npedit import NPEditConfig, train_npedit

UPDATES = 4


def configuration(models: Path, out: Path, **given) -> NPEditConfig:
    places = {role: str(models / role) for role in ("teacher", "student", "judge")}
    tiny = dict(side=16, batch=2, steps=UPDATES, save_every=1, precision="no", trackers=())
    return NPEditConfig.make("smoke", **{**places, **tiny, **given, "out": str(out)})


def child(config: NPEditConfig) -> int:
    """The number of a process that trains and leaves the metrics of its updates, timeless, in a file each."""
    if number := os.fork():
        return number
    status = 1
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
        torch.set_num_threads(1)
        for step in train_npedit(config):
            metrics = {k: v for k, v in step.metrics.items() if not k.startswith(("cpu", "seconds"))}
            Path(config.out, f"metrics{step.index}.json").write_text(json.dumps(metrics))
        status = 0
    finally:
        os._exit(status)


def ended(number: int) -> int:
    """A process's exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Everything a finished run leaves: trained, averaged and saved weights."""
    out = {}
    for file in sorted([*folder.glob("checkpoint/*.safetensors"), *folder.glob("model/*.safetensors")]):
        out |= {f"{file.parent.name}/{file.name}/{k}": v for k, v in load_file(file).items()}
    return out


def same(a: Path, b: Path) -> bool:
    """Whether two finished runs left the same weights, averages, optimizer states and, of the last update, metrics."""
    states = [torch.load(folder / "checkpoint/optimizers.pt", weights_only=True) for folder in (a, b)]
    last = [json.loads((folder / f"metrics{UPDATES}.json").read_text()) for folder in (a, b)]
    return len(weights(a)) > 100 and equal(weights(a), weights(b)) and equal(*states) and last[0] == last[1]


def equal(a, b) -> bool:
    """Whether two nests of tensors and values are the same, to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def saved_step(out: Path) -> str:
    """What a killed run left: after which update its checkpoint is, and how it was found."""
    for name in ("checkpoint", "checkpoint.old"):
        if (out / name / "state.json").exists():
            step = json.loads((out / name / "state.json").read_text())["step"]
            busy = ", within a save" if (out / "checkpoint.partial").exists() or name != "checkpoint" else ""
            return f"after update {step}{busy}"
    return "before the first checkpoint"


def saved_first(number: int, out: Path) -> None:
    """Wait until a run has written a checkpoint, or has ended."""
    while not (out / "checkpoint/state.json").exists() and not os.waitid(
        os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT
    ):
        time.sleep(0.001)


def main(models: Path, folder: Path, count: int, seed: int = 0) -> int:
    rng, straight, other = random.Random(seed), folder / "straight", folder / "other"
    began = time.perf_counter()
    number = child(configuration(models, straight))
    saved_first(number, straight)
    loaded = time.perf_counter()
    assert ended(number) == 0
    loading, training, wrong, done = loaded - began, time.perf_counter() - loaded, 0, 0
    assert ended(child(configuration(models, other, seed=1))) == 0
    assert same(straight, straight) and not same(straight, other)
    for attempt in range(4 * count):
        out = folder / f"run{attempt}"
        number, early, share = child(configuration(models, out)), attempt % 5 == 2, rng.random()
        if not early:
            saved_first(number, out)
        time.sleep(share * (loading if early else training))
        os.kill(number, signal.SIGKILL)
        if ended(number) != -signal.SIGKILL:  # it was faster
            continue
        where, done = saved_step(out), done + 1
        again = ended(child(configuration(models, out)))
        fine = again == 0 and same(straight, out)
        wrong += not fine
        print(f"killed {where}: {'the same bits' if fine else f'DIFFERENT (exit code {again})'}", flush=True)
        if done == count:
            break
    print(f"{done} runs killed, {wrong} ended otherwise")
    return int(wrong > 0 or done < count)


if __name__ == "__main__":
    models, folder, count, *seed = sys.argv[1:]
    sys.exit(main(Path(models), Path(folder), int(count), *map(int, seed)))
