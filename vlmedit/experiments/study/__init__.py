"""Studies: a claim's arms, each trained on several seeds at equal cost, measured by the oracle, in one table and one plot.

A study is a dictionary of arms; an arm is one or more trainings, one after the other, and the ways its student is then used.
Whatever an arm does not say is the tier's configuration, from the shipped warm start, teacher and judge. A cell is an arm and a seed.

    plan = study.plan("objective", seeds=(0, 1))
    for cell in study.run(plan): ...
    study.write_tables(plan)

* Equal cost means equally many updates of the student, of its calls on one picture, or of CPU-seconds (`equal`). For the latter two the
  first arm's updates are the measure: a short pilot of every arm tells what its updates cost, and each gets as many as cost the same. What
  was spent in the end is in the table; it differs by what the pilot did not see (a percent or two of seconds; calls drawn at random).
* Cost: every cell records the student's calls on one picture (`calls`) and the process's CPU-seconds (`cpu_seconds`) of its
  trainings; a judge that an arm schools for itself is counted apart (`judge_cpu_seconds`). What the teacher does for an arm, synthetic
  pairs for instance, shows in the seconds alone.
* Results live in `out`: cells/*.json, table.csv, table.json, plot.png. A cell is found by what its record says of its trainings, not by a name.
* A student that is `watched` is measured several times on its way, so that a judge's word can be seen to come apart from the oracle's. What
  a judge believes is compared with the oracle three ways: on average (`hacking_gap`), answer by answer (`calibration`, the expected
  calibration error), and against the belief of a held-out judge that taught nobody (`held_out_gap`), who may also say when to stop.
* Errors are standard errors over seeds, and never below that over requests, which are the same for all seeds: two seeds may agree by luck.

The way: arms -> trainings -> records -> plans -> costs -> cells -> tables.
"""

from vlmedit.experiments.study.arms import PAIRED, STUDIES, WAYS, find
from vlmedit.experiments.study.cells import run
from vlmedit.experiments.study.costs import balance
from vlmedit.experiments.study.plans import EQUAL, plan, sort_overrides
from vlmedit.experiments.study.tables import read, rows_of, summarize, write_tables
from vlmedit.experiments.study.trainings import ROLES, Plan, prepare

__all__ = [
    "EQUAL", "PAIRED", "ROLES", "STUDIES", "WAYS", "Plan", "balance", "find", "plan", "prepare", "read", "rows_of", "run", "sort_overrides", "summarize", "write_tables",
]  # fmt: skip
