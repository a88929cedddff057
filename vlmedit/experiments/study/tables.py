"""What came out: a row per arm, way and seed; means and errors per arm; a plot."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlmedit.errors import InputError
from vlmedit.experiments.study.arms import STUDIES, find
from vlmedit.experiments.study.plans import EQUAL, results_folder
from vlmedit.experiments.study.records import cells
from vlmedit.experiments.study.trainings import Plan
from vlmedit.io import save_json

FIGURES = ("success", "done", "kept", "on_manifold", "keep_psnr", "manifold_psnr", "p_edit", "p_identity", "hacking_gap", "held_out_gap", "calibration")
SHARES = FIGURES[:4]
COSTS = ("calls", "cpu_seconds", "judge_cpu_seconds", "skipped")
IN_USE = ("calls_per_edit", "use_cpu_seconds", "n")


def rows_of(cell: Mapping) -> list[dict]:
    """One flat row for each way a cell's student was used."""
    rows = []
    for way, m in cell["ways"].items():
        name = cell["arm"] if len(cell["ways"]) == 1 else f"{cell['arm']}, {way}"
        row = {"arm": name, "seed": cell["seed"], "updates": cell["updates"], **{k: cell[k] for k in COSTS if k in cell}}
        row |= {k: m[k] for k in (*FIGURES, "keep_psnr_se", "manifold_psnr_se", *IN_USE) if k in m}
        row |= {"p_edit": m["judge_p_yes"]["edit"], "p_identity": m["judge_p_yes"]["identity"]}
        row["calibration"] = sum(m["calibration_error"].values()) / len(m["calibration_error"])
        rows.append(row | {f"success_{kind}": value for kind, value in m["success_by_type"].items()})
    return rows


def error_of(values, n: int) -> float | None:
    """Standard error of a mean over seeds, of shares at least the binomial one of n edits; None for one seed of anything else."""
    over_seeds = [float(values.std(ddof=1) / len(values) ** 0.5)] if len(values) > 1 else []
    share = values.name in SHARES or values.name.startswith("success_")
    over_edits = [float((values.mean() * (1 - values.mean()) / n) ** 0.5)] if share else []
    return max(over_seeds + over_edits, default=None)


def summarize(rows: Sequence[Mapping]) -> list[dict]:
    """Per arm, in order: seeds, and mean and standard error of every figure and cost."""
    import pandas

    table, out = pandas.DataFrame(rows), []
    for arm, group in table.groupby("arm", sort=False):
        entry = {"arm": arm, "seeds": group["seed"].tolist(), "updates": int(group["updates"].iloc[0]), "n": int(group["n"].iloc[0])}
        kinds = sum(c.startswith("success_") for c in table.columns)
        for name in (c for c in table.columns if c not in ("arm", "seed", "updates", "n") and not c.endswith("_se")):
            values = group[name].dropna()
            if len(values):
                entry[name] = float(values.mean())
                error = error_of(values, entry["n"] // kinds if name.startswith("success_") else entry["n"])
                over_edits = group[f"{name}_se"].mean() if f"{name}_se" in group else None  # of PSNRs: the requests are the same for all seeds
                if (known := [e for e in (error, over_edits) if e is not None]) and name not in (*COSTS, *IN_USE):
                    entry[f"{name}_se"] = float(max(known))
        out.append(entry)
    return out


def write_tables(plan: Plan) -> dict:
    """table.csv (a row per arm, way and seed), table.json (means, errors, what failed) and plot.png. Returns the JSON's content."""
    import pandas

    every = cells(plan)
    rows = [row for cell in every if cell["ok"] for row in rows_of(cell)]
    failed = [{"arm": c["arm"], "seed": c["seed"], "error": c["error"]} for c in every if not c["ok"]]
    study, out = STUDIES[plan.name], Path(plan.out)
    result = {
        "study": plan.name, "question": study.question, "tier": plan.tier, "equal": plan.equal, "updates": plan.updates, "n": plan.n,
        "overrides": {k: dict(v) for k, v in plan.overrides.items() if v}, "arms": summarize(rows) if rows else [], "failed": failed,
    }  # fmt: skip
    save_json(result, out / "table.json")
    if rows:
        pandas.DataFrame(rows).to_csv(out / "table.csv", index=False)
        draw(result, out / "plot.png")
    return result


def draw(result: Mapping, path: Path) -> Path:
    """Dots with errors per arm: success; done and kept; what the judges believe beyond it; distance to the manifold; what it cost; and
    success by edit type."""
    from matplotlib.figure import Figure

    from vlmedit.figures import BAD, GOOD, save

    arms = result["arms"]
    names = [a["arm"] for a in arms]
    panels = [
        ("success", {"success": ("", GOOD, "o")}),
        ("edit and rest", {"done": ("done", GOOD, "o"), "kept": ("kept", BAD, "s")}),
        ("belief above success", {"hacking_gap": ("its judge", BAD, "o"), "held_out_gap": ("held-out judge", "#999999", "D")}),
        ("manifold-PSNR, dB", {"manifold_psnr": ("", GOOD, "o")}),
        ("CPU-seconds", {"cpu_seconds": ("", GOOD, "o")}),
    ]
    kinds = [k.removeprefix("success_") for k in arms[0] if k.startswith("success_") and not k.endswith("_se")]
    figure = Figure(figsize=(15, 1.6 + 0.36 * len(arms)))
    *axes, by_type = figure.subplots(1, len(panels) + 1, sharey=True, width_ratios=[1] * len(panels) + [1.6])
    for axis, (title, series) in zip(axes, panels):
        for key, (label, color, mark) in series.items():
            errors = [a.get(f"{key}_se", 0.0) for a in arms]
            axis.errorbar([a[key] for a in arms], range(len(arms)), xerr=errors, fmt=mark, color=color, capsize=3, label=label)
        axis.set_title(title, fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(alpha=0.3)
        if len(series) > 1:
            axis.legend(fontsize=7)
    by_type.imshow([[a[f"success_{k}"] for k in kinds] for a in arms], vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for i, a in enumerate(arms):
        for j, kind in enumerate(kinds):
            value = a[f"success_{kind}"]
            by_type.text(j, i, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=7, color="black" if value > 0.5 else "white")
    by_type.set_xticks(range(len(kinds)), kinds, rotation=40, fontsize=7)
    by_type.set_title("success by type", fontsize=9)
    axes[0].set_yticks(range(len(arms)), names, fontsize=8)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)  # the first on top
    best = max(arms, key=lambda a: a["success"])
    counts = sorted({len(a["seeds"]) for a in arms})
    seeds = f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else f"{counts[0]} seed{'s' * (counts[0] > 1)}"
    spent = f"{result['updates']} updates" if result["equal"] == "updates" else f"equal {EQUAL[result['equal']]}"
    figure.suptitle(f"{result['study']}, {spent}, {seeds}: {best['arm']} does best, {best['success']:.2f}", fontsize=10)
    return save(figure, path)


def read(name: str, folder: str | os.PathLike | None = None) -> dict:
    """A study's table.json. Raises `InputError` where it has not been run."""
    find(name)
    path = Path(folder or results_folder() / name) / "table.json"
    if not path.is_file():
        raise InputError(f"{path}: study {name!r} has not been run; run it: vlmedit study {name}")
    return json.loads(path.read_text())
