"""Equal cost: a short pilot of every arm tells what its updates cost, and each gets as many as cost the same."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from vlmedit.errors import InputError
from vlmedit.experiments.study.arms import find
from vlmedit.experiments.study.plans import EQUAL
from vlmedit.experiments.study.records import check_results
from vlmedit.experiments.study.trainings import Plan, digest, prepare, short_hash
from vlmedit.io import save_json
from vlmedit.methods import find as find_method

PILOT, UNTIMED = 24, 2  # updates of an arm's pilot, and how many of them warm up


def balance(plan: Plan, say: Callable[[str], object] = lambda text: None) -> Plan:
    """The plan with every arm's updates at the same cost as the first arm's of the study. Runs a pilot of each arm on the plan's first seed, once:
    what it found is kept in `out`, so that a study that goes on later goes on with the same numbers."""
    if plan.equal == "updates":
        return plan
    first = next(iter(find(plan.name).arms))
    arms = [arm for arm in dict.fromkeys((first, *plan.arms)) if find(plan.name).arms[arm].parts]
    identity = short_hash([plan.tier, plan.updates, plan.overrides, {role: digest(folder) for role, folder in plan.models.items()}])
    file = Path(plan.out) / f"equal-{plan.equal}-{identity}.json"
    costs = json.loads(file.read_text()) if file.is_file() else {}
    for arm in arms:
        if arm not in costs:
            say(f"pilot of {arm}")
            costs[arm] = pilot_cost(plan, arm)
            save_json(costs, file)
    if not costs.get(first):
        raise InputError(f"study {plan.name!r} cannot be made equal in {EQUAL[plan.equal]}: its first arm, {first!r}, has none; pass --equal updates")
    balanced = dataclasses.replace(plan, factors={arm: costs[first] / costs[arm] for arm in arms if costs[arm]})
    check_results(balanced)
    return balanced


def pilot_cost(plan: Plan, arm: str) -> float:
    """What one of an arm's updates of its student costs, its trainings weighted by their shares."""
    small = dataclasses.replace(plan, updates=PILOT if plan.tier != "smoke" else 2, pilot=True, factors={}, runs=str(Path(plan.runs) / "pilots"))
    total = 0.0
    for part, task in zip(find(plan.name).arms[arm].parts, prepare(small, arm, plan.seeds[0]), strict=True):
        shutil.rmtree(task.config.out, ignore_errors=True)
        config = task.config.replace(steps=max(task.config.steps, UNTIMED + 1), save_every=10**6)
        for step in find_method(task.stage)[1](config):
            if step.index <= UNTIMED:
                calls, began = 0, time.process_time()
            else:
                calls, spent = calls + int(step.metrics.get("calls", 0)), time.process_time() - began
        if part.gives == "student":
            total += part.share * (calls if plan.equal == "calls" else spent) / (config.steps - UNTIMED)
    shutil.rmtree(small.runs)
    return total
