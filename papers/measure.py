"""Regenerate the figures of README.md and papers/npedit.md: one JSON file each in papers/results/.

    python papers/measure.py all                # everything that needs no training, from the shipped checkpoints
    python papers/measure.py teacher judge editor foreign cost strip
    python papers/measure.py live                               # the main job
    python papers/measure.py rivals --updates 2000              # trains the paired rival for as many updates as the editor first
    python papers/measure.py distilled --updates 400            # trains the teacher's 4-step student first

Arms and rivals at equal cost are studies: `vlmedit study`. Then `python papers/tables.py` writes the tables of the pages.

Figures are of held-out requests, by the oracle; standard errors are over requests, binomial.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results"
sys.path.insert(0, str(HERE.parent / "tests"))  # the foreign drawings live with the tests

from vlmedit.evaluation.editing import evaluate_student, judge_against_oracle  # noqa: E402
from vlmedit.evaluation.judge import evaluate_judge  # noqa: E402
from vlmedit.evaluation.teacher import evaluate_teacher  # noqa: E402
from vlmedit.experiments import study  # noqa: E402
from vlmedit.methods.distill import DistillConfig, train_distill  # noqa: E402
from vlmedit.methods.npedit import train_npedit  # noqa: E402
from vlmedit.methods.sft import SFTConfig, train_sft  # noqa: E402
from vlmedit.networks.dit import DiT  # noqa: E402
from vlmedit.networks.judge import JudgeModel  # noqa: E402
from vlmedit.pipelines.shapes import checkpoint  # noqa: E402

SEEDS = (0, 1, 2)


def load(role: str):
    kind = JudgeModel if "judge" in role else DiT
    return kind.from_pretrained(checkpoint("shapes", role)).eval()


def read(name: str) -> dict:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(name: str, figures) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(name, json.dumps(figures, indent=2))


def measure_teacher(args) -> None:
    """Caption fidelity of the teacher at 30 guided steps."""
    write("teacher", {**read("teacher"), "teacher": [evaluate_teacher(load("teacher"), args.n, s, steps=30)[0] for s in args.seeds]})


def measure_distilled(args) -> None:
    """The same of its 4-step distillation by DMD alone, without guidance."""
    out = Path(args.out) / f"distilled-{args.updates}"
    for _ in train_distill(DistillConfig.make("laptop", teacher=str(checkpoint("shapes", "teacher")), out=str(out), steps=args.updates)):
        pass
    student = DiT.from_pretrained(out / "model").eval()
    figures = [evaluate_teacher(student, args.n, s, steps=4, guidance=1, sampler="renoise")[0] for s in args.seeds]
    write("teacher", {**read("teacher"), "distilled": figures, "distilled_updates": args.updates})


def measure_judge(args) -> None:
    """Accuracy per question: clean, under attack, on the warm student's and the editor's outputs."""
    edits = {role: evaluate_student(load(role), None, args.n)[1] for role in ("warm", "editor")}
    for name, roles in (("judge", ("warm", "editor")), ("second_judge", ("editor",))):
        judge = load(name)
        figures = {"clean": evaluate_judge(judge, 1024), "attacked": evaluate_judge(judge, 512, radius=2.5)}
        write(name, figures | {f"on {role} outputs": judge_against_oracle(judge, edits[role]) for role in roles})


def measure_editor(args) -> None:
    """The shipped editor and its warm start, three seeds; steps 1, 2, 4, 8 at the first."""
    judge = load("judge")
    figures = {role: [evaluate_student(load(role), judge, args.n, s)[0] for s in args.seeds] for role in ("warm", "editor")}
    known = {4: figures["editor"][0]}
    figures["steps"] = {k: known.get(k) or evaluate_student(load("editor"), judge, args.n, args.seeds[0], steps=k)[0] for k in (1, 2, 4, 8)}
    write("editor", figures)


def paired(student: DiT, judge: JudgeModel, n: int, seeds) -> dict[str, list[dict]]:
    """A paired student at 4 re-noising steps, at 4 and at 30 Euler steps."""
    return {way: [evaluate_student(student, judge, n, s, **study.WAYS[way])[0] for s in seeds] for way in study.PAIRED.ways}


def measure_rivals(args) -> None:
    """Paired SFT from the same warm start, `--updates` of it."""
    out = Path(args.out) / f"paired-{args.updates}"
    for _ in train_sft(SFTConfig.make("laptop", student=str(checkpoint("shapes", "warm")), out=str(out), steps=args.updates)):
        pass
    write("rivals", {"paired SFT": paired(DiT.from_pretrained(out / "model").eval(), load("judge"), args.n, args.seeds), "updates": args.updates})


def measure_live(args) -> None:
    """The main job from the shipped warm start, as `make run` does it."""
    from vlmedit.experiments.live import LIVE, run_main

    metrics = run_main(out=str(Path(args.out) / "live"))
    kept = {k: metrics["live"][k] for k in ("success", "success_by_type", "keep_psnr", "manifold_psnr", "hacking_gap", "judge_p_yes", "n")}
    write("live", {"updates": LIVE["laptop"]["steps"], "training_seconds": metrics["training_seconds"], **kept})


def measure_strip(args) -> None:
    """README's strip of pictures: the first held-out edits, one of each type."""
    from vlmedit.data.world import held_out
    from vlmedit.evaluation.editing import edit_examples, judge_by_oracle
    from vlmedit.evaluation.judge import ask_judge
    from vlmedit.figures import save, sheet, wrap
    from vlmedit.world.edits import EDIT_TYPES

    judge, examples, roles = load("judge"), held_out(2 * len(EDIT_TYPES), 0, EDIT_TYPES), ("warm", "editor")
    judged = {r: judge_by_oracle(examples, *edit_examples(load(r), examples)) for r in roles}
    p = {r: ask_judge(judge, examples, judged[r].reference, judged[r].output).prod(0) for r in roles}
    rows, titles, frames = [], [], []
    for i in range(len(EDIT_TYPES)):
        rows.append((judged["warm"].reference[i], [judged[r].output[i] for r in roles]))
        verdicts = [judged[r].verdicts[i].success for r in roles]
        titles.append([wrap(examples[i].instruction)] + [f"P(yes) {p[r][i]:.2f}, oracle: {'success' if v else 'failed'}" for r, v in zip(roles, verdicts)])
        frames.append([None, *verdicts])
    half = len(rows) // 2  # two edits per line
    lines = [(rows[i][0], [*rows[i][1], rows[i + half][0], *rows[i + half][1]]) for i in range(half)]
    join = lambda parts: [parts[i] + parts[i + half] for i in range(half)]
    heads = ("reference", "warm start", "no-pair editor") * 2
    save(sheet(lines, join(titles), heads, join(frames)), RESULTS / "strip.png")


def measure_foreign(args) -> None:
    """Success on drawings of other programs."""
    from foreign import draw_all

    import vlmedit
    from vlmedit.io import load_picture
    from vlmedit.world.oracle import judge_edit, parse

    pipe = vlmedit.load("shapes")
    verdicts: dict[str, list[bool]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for drawing in draw_all(Path(folder)):
            output = pipe(load_picture(drawing.path).view, drawing.instruction, seed=0, output_type="pt").images
            verdict = judge_edit(drawing.scene, parse(output)[0], drawing.edit)
            for key in ("all", drawing.program, drawing.edit.type):
                verdicts.setdefault(key, []).append(verdict.success)
    write("foreign", {k: {"success": sum(v) / len(v), "n": len(v)} for k, v in verdicts.items()})


def measure_cost(args) -> None:
    """CPU-seconds per NP-Edit update and their split; latency of one 4-step edit; peak memory."""
    import vlmedit
    from vlmedit.experiments.live import live_config

    split: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as out:
        config = live_config("laptop", out, steps=12)
        began = time.process_time()
        for step in train_npedit(config):
            if step.index == 2:
                began, split = time.process_time(), {}
            for name, value in step.metrics.items():
                if name.startswith("cpu_") and name != "cpu_seconds" and step.index > 2:
                    split[name[4:]] = split.get(name[4:], 0) + value / 10
        seconds = (time.process_time() - began) / 10
    pipe = vlmedit.load("shapes")
    picture = torch.zeros(1, 3, pipe.side, pipe.side)
    pipe(picture, "make the circle red", seed=0)
    began = time.process_time()
    for _ in range(10):
        pipe(picture, "make the circle red", seed=0)
    latency = (time.process_time() - began) / 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    write("cost", {"cpu_seconds_per_update": seconds, "split": split, "batch": config.batch, "samples_per_cpu_second": config.batch / seconds, "edit_cpu_seconds": latency, "peak_memory_mib": peak})


PARTS = {"teacher": measure_teacher, "judge": measure_judge, "editor": measure_editor, "foreign": measure_foreign, "cost": measure_cost, "strip": measure_strip}
TRAINING = {"live": measure_live, "rivals": measure_rivals, "distilled": measure_distilled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["all", *PARTS, *TRAINING])
    parser.add_argument("--n", type=int, default=512, help="held-out requests")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--updates", type=int, default=400, help="of the rival, of the distillation")
    parser.add_argument("--out", default="runs/measured")
    args = parser.parse_args()
    for part in PARTS if "all" in args.parts else args.parts:
        (PARTS | TRAINING)[part](args)


if __name__ == "__main__":
    main()
