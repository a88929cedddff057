"""Training and measuring the cells of a plan, one by one or several processes at a time.

A finished cell is not repeated, a stopped training goes on from its checkpoint, a failed cell is recorded and tried again next time.
This module measures by the oracle: no trainer may import it.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import load_file

from vlmedit.equations.search import SEARCHES
from vlmedit.experiments.study.arms import WAYS, Arm, find
from vlmedit.experiments.study.records import cell_file, finished, identity
from vlmedit.experiments.study.trainings import Plan, Task, places, prepare, student_updates
from vlmedit.io import save_json
from vlmedit.methods import find as find_method
from vlmedit.training.run import Step

Watch = Callable[[str, Step], None]  # what is trained, and its update


def times(task: Task, watched: int) -> list[int]:
    """Updates after which a watched student is kept, besides its last."""
    return sorted({round(task.config.steps * k / watched) for k in range(1, watched)} - {0, task.config.steps})


def kept(task: Task, updates: int) -> Path:
    return Path(task.config.out) / f"after-{updates}.safetensors"


def train(task: Task, watch: Watch | None = None, keep: Sequence[int] = ()) -> dict:
    """Train, or take what is there. Returns what it cost, over all interruptions, what had to be repeated left out. The averaged weights after
    `keep` updates stay beside the model; a training that was begun without keeping them is made again."""
    out = Path(task.config.out)
    file = out / "cost.json"
    fresh = {"done": False, "kept": sorted(keep), "calls": 0, "cpu_seconds": 0.0, "seconds": 0.0, "skipped": 0}
    cost = json.loads(file.read_text()) if file.is_file() else fresh
    if not set(keep) <= set(cost.get("kept", ())):
        shutil.rmtree(out)
        cost = fresh
    if cost["done"] and (out / "model" / "config.json").is_file():
        return cost
    config = task.config.replace(save_every=math.gcd(task.config.save_every, *keep))
    cpu, wall = time.process_time(), time.perf_counter()
    for step in find_method(task.stage)[1](config):
        now, then = time.process_time(), time.perf_counter()
        cost |= {"cpu_seconds": cost["cpu_seconds"] + now - cpu, "seconds": cost["seconds"] + then - wall}
        cost |= {"calls": cost["calls"] + int(step.metrics.get("calls", 0)), "skipped": cost["skipped"] + int(step.skipped)}
        cpu, wall = now, then
        if step.index % config.save_every == 0:  # what a checkpoint holds; updates after it are made again when the run is stopped
            save_json(cost, file)
        if step.index in keep:  # an update that is due is in its checkpoint before it is yielded
            shutil.copy(out / "checkpoint" / "student.ema.safetensors", kept(task, step.index))
        if watch:
            watch(f"{task.stage}, seed {task.config.seed}", step)
    save_json(cost := cost | {"done": True, "updates": task.config.steps}, file)
    for scrap in ("checkpoint", "tensorboard"):
        shutil.rmtree(out / scrap, ignore_errors=True)
    return cost


def use(model, judges: Sequence, held_out_judge, n: int, seed: int, shift: float, way: Mapping) -> dict:
    """Oracle metrics of a model used in one way, on the first `n` held-out requests, what its own judges think of them (on average) and the
    held-out one, and its calls and CPU-seconds per edit. `seed` is of an untrained editor's noise; trained ones differ by their training."""
    from vlmedit.data.world import held_out
    from vlmedit.equations.training_free import calls as calls_of_editor
    from vlmedit.evaluation.editing import edit_by_captions, evaluate_student, judge_by_oracle, summary
    from vlmedit.evaluation.judge import ask_judge
    from vlmedit.world.edits import EDIT_TYPES

    began = time.process_time()
    if "editor" in way:
        way, examples = {"guidance": 2.0, **way}, held_out(n, 0, EDIT_TYPES)
        judged = judge_by_oracle(examples, *edit_by_captions(model, examples, seed=seed, **way))
        metrics, calls = summary(judged, *judges) | {"n": n}, calls_of_editor(**way)
    else:
        metrics, judged = evaluate_student(model, judges[0], n, 0, shift=shift, others=judges[1:], **way)
        searched = {k: v for k, v in way.items() if k not in ("steps", "sampler", "search")}
        calls = SEARCHES[way["search"]].calls(way["steps"], **searched) if "search" in way else way["steps"]
    spent = time.process_time() - began
    believed = ask_judge(held_out_judge, judged.examples, judged.reference, judged.output).mean().item()
    return {**metrics, "held_out_gap": believed - metrics["success"], "calls_per_edit": calls, "use_cpu_seconds": spent}


def measure(plan: Plan, arm: Arm, tasks: Sequence[Task], seed: int) -> dict[str, dict]:
    """What comes of an arm's student, for each way of using it and each time that it was kept; and what would have come of it, had it been
    stopped where the held-out judge believed most in it."""
    from vlmedit.networks.dit import DiT
    from vlmedit.networks.judge import JudgeModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = lambda kind, folder: kind.from_pretrained(folder).eval().to(device)
    folder = Path(tasks[-1].config.out) / "model" if tasks else plan.models["teacher"]
    own = [load(JudgeModel, folder) for folder in judges_of(plan, tasks)]
    held_out = load(JudgeModel, plan.models["held_out"])
    shift = getattr(tasks[-1].config, "sampler_shift", 1.0) if tasks else 1.0
    used = lambda model, when="": {f"{way}{when}": use(model, own, held_out, plan.n, seed, shift, WAYS[way]) for way in arm.ways}
    found = used(load(DiT, tasks[-1].config.student), " before the last stage") if arm.before else {}
    if arm.watched == 1:
        found |= used(load(DiT, folder))
    else:
        before = student_updates(tasks[:-1])
        for k in times(tasks[-1], arm.watched):
            model = load(DiT, folder)
            model.load_state_dict(load_file(kept(tasks[-1], k)))
            found |= used(model, f" after {before + k}")
        found |= used(load(DiT, folder), f" after {student_updates(tasks)}")
        believed = lambda key: found[key]["success"] + found[key]["held_out_gap"]
        best = {way: max((key for key in found if key.startswith(f"{way} after ")), key=believed) for way in arm.ways}
        found |= {f"{way} where the held-out judge stops it": found[key] for way, key in best.items()}
    return found


def judges_of(plan: Plan, tasks: Sequence[Task]) -> list[str]:
    """The folders of the judges that taught an arm's student last; of the shared one, where no judge did."""
    return list(places(getattr(tasks[-1].config, "judge", None) if tasks else None)) or [plan.models["judge"]]


def run_cell(plan: Plan, arm: str, seed: int, watch: Watch | None = None) -> dict:
    """Train and measure one cell and write its record. An exception is a record too; only an interruption ends the study."""
    tasks, chosen, record = prepare(plan, arm, seed), find(plan.name).arms[arm], identity(plan, arm, seed)
    try:
        costs = [train(task, watch, times(task, chosen.watched) if task is tasks[-1] else ()) for task in tasks]
        student = [(t, c) for t, c in zip(tasks, costs) if t.stage != "judge"]
        record |= {"calls": sum(c["calls"] for _, c in student), "cpu_seconds": sum(c["cpu_seconds"] for _, c in student)}
        record |= {"seconds": sum(c["seconds"] for c in costs), "skipped": sum(c["skipped"] for c in costs)}
        record["judge_cpu_seconds"] = sum(c["cpu_seconds"] for t, c in zip(tasks, costs) if t.stage == "judge")
        record |= {"ways": measure(plan, chosen, tasks, seed), "ok": True}
    except Exception as error:  # whatever it is: the other arms go on, and the report says it
        record |= failure(error)
    save_json(record, cell_file(plan, arm, seed))
    return record


def failure(error: BaseException) -> dict:
    return {"ok": False, "error": f"{type(error).__name__}: {error}", "traceback": "".join(traceback.format_exception(error)[-3:])}


def _process(plan: Plan, arm: str, seed: int, threads: int) -> None:
    torch.set_num_threads(threads)
    run_cell(plan, arm, seed)


def run(plan: Plan, jobs: int = 1, watch: Watch | None = None) -> Iterator[tuple[dict, bool]]:
    """Every cell's record as it ends, and whether it was there already. Seeds turn slowest: an interrupted study has all arms of its
    first seeds. With several jobs each cell has a process of its own, and cells that share a training wait for each other."""
    todo = []
    for seed in plan.seeds:
        for arm in plan.arms:
            if cell := finished(plan, arm, seed):
                yield cell, True
            else:
                todo.append((arm, seed))
    if jobs == 1:
        for arm, seed in todo:
            yield run_cell(plan, arm, seed, watch), False
        return
    folders = {pair: sorted({t.key for t in prepare(plan, *pair)}) for pair in todo}
    locks = {key: threading.Lock() for keys in folders.values() for key in keys}
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def one(pair: tuple[str, int]) -> dict:
        arm, seed = pair
        with ExitStack() as held:
            for key in folders[pair]:
                held.enter_context(locks[key])
            cell_file(plan, arm, seed).unlink(missing_ok=True)
            file = cell_file(plan, arm, seed)
            process = multiprocessing.get_context("spawn").Process(target=_process, args=(plan, arm, seed, threads))
            process.start()
            process.join()
            if not file.is_file():
                died = {"ok": False, "error": f"its process died with exit code {process.exitcode}"}
                save_json(identity(plan, arm, seed) | died, file)
            return json.loads(file.read_text())

    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(one, pair) for pair in todo]):
            yield future.result(), False
