"""A plan as a table in the terminal."""

from __future__ import annotations

from vlmedit.cost.counting import GB
from vlmedit.cost.plan import Plan


def show(plan: Plan) -> None:
    """Print the plan."""
    from rich.console import Console
    from rich.table import Table

    c = plan.config
    what = f"with {', '.join(c.judge)}" if len(plan.parts) > 1 else "copying its reference"
    table = Table(title=f"{c.backbone} {what}: {c.roles}, batch {c.batch} x {c.accumulate} x {plan.processes} processes{', sharded' if plan.sharded else ''}")
    for name in ("role", "parameters", "weights", "gradients", "moments", "average", "activations", "TFLOP", "notes"):
        table.add_column(name, justify="left" if name in ("role", "notes") else "right")
    gb = lambda b: f"{b / GB:.2f} GB" if b else ""
    for r in plan.roles:
        notes = [*r.notes, *(["waits on the CPU"] if r.role in c.offload and len(plan.parts) > 1 else [])]
        table.add_row(r.role, f"{r.parameters / 1e9:.3f} B" if r.parameters >= 1e7 else f"{r.parameters:,}", *(gb(getattr(r, k)) for k in ("weights", "gradients", "moments", "average", "activations")), f"{r.flops / 1e12:.1f}", "; ".join(notes))
    Console(width=max(140, Console().width)).print(table)
    parts = ", ".join(f"{part} {plan.memory(part) / GB:.1f}" for part in plan.parts)
    print(f"memory per device while each part runs, GB: {parts}; peak {plan.peak / GB:.1f}")
    print(f"one update: {sum(r.flops for r in plan.roles) / 1e12:.1f} TFLOP per process; {c.steps} updates")
    if plan.prompts and not plan.prompts.count:
        print("prompts on disk: none; a batch carries the words themselves")
    elif p := plan.prompts:
        print(f"prompts on disk: {p.count:,} x {p.tokens} tokens{' (assumed)' if p.assumed else ''}, {p.bytes / GB:.3g} GB in {c.text_cache or f'{c.out}/text'}")
    else:
        print(f"prompts on disk: not counted, because {c.data} cannot be read; data=MANIFEST names one")
    print("not counted: the block under recomputation, workspaces, fragmentation, the text encoder (it is gone before training)")
