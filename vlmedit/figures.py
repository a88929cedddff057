"""Pictures of what happened: strips of reference, edits, judge and oracle, as PNG files that need no notebook."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from torch import Tensor

GOOD, BAD = "#0072B2", "#D55E00"  # told apart by every kind of colour vision


def to_array(picture: Tensor) -> np.ndarray:
    """(3, S, S) in [-1, 1] -> (S, S, 3) in [0, 1]."""
    return ((picture.detach().float().cpu().clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy()


def sheet(rows: Sequence[tuple[Tensor, Sequence[Tensor]]], titles: Sequence[Sequence[str]], heads: Sequence[str] = (), frames: Sequence[Sequence[bool | None]] = ()) -> Figure:
    """A grid: each row is a reference and its edits. `titles[r][c]` stands over a picture; `frames[r][c]` True or False
    draws a blue or an orange frame (done or not); `heads` names the columns."""
    from matplotlib.figure import Figure  # without pyplot, which would choose a backend for everybody

    count = max(1 + len(edits) for _, edits in rows)
    figure = Figure(figsize=(1.9 * count, 2.25 * len(rows)))
    axes = figure.subplots(len(rows), count, squeeze=False)
    for r, (reference, edits) in enumerate(rows):
        for c in range(count):
            axis = axes[r][c]
            axis.set_xticks([])
            axis.set_yticks([])
            if c > len(edits):
                axis.axis("off")
                continue
            axis.imshow(to_array(reference if c == 0 else edits[c - 1]), interpolation="nearest")
            title = titles[r][c] if r < len(titles) and c < len(titles[r]) else ""
            head = f"{heads[c]}\n" if r == 0 and c < len(heads) else ""
            axis.set_title(head + title, fontsize=7.5)
            frame = frames[r][c] if r < len(frames) and c < len(frames[r]) else None
            for spine in axis.spines.values():
                spine.set_visible(frame is not None)
                spine.set_linewidth(3)
                spine.set_color(GOOD if frame else BAD)
    figure.tight_layout()
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Lay out and write a figure, its folder made where it is missing. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return path


def wrap(text: str, width: int = 24) -> str:
    """Break a title into lines of at most `width` characters."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > width and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def curve(values: dict[str, Sequence[tuple[float, float]]], path: Path, xlabel: str, ylabel: str, title: str) -> Path:
    """Save a line plot of named series of (x, y)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4))
    axis = figure.subplots()
    for (name, points), style in zip(values.items(), ("-", "--", "-.", ":") * 4):
        axis.plot([p[0] for p in points], [p[1] for p in points], style, label=name, linewidth=1.8)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    return save(figure, path)
