"""Strips and curves: pictures shown as they are, frames in the color of the verdict, and no say in a notebook's backend."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vlmedit.figures import BAD, GOOD, curve, save, sheet, to_array, wrap


def pixels(path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


def count(path, color: str) -> int:
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((pixels(path) == rgb).all(-1).sum())


def plain(*rgb: float) -> torch.Tensor:
    """A picture of one color, given in [-1, 1]."""
    return torch.tensor(rgb).view(3, 1, 1).expand(3, 8, 8)


RED, CYAN = plain(1.0, -1.0, -1.0), plain(-1.0, 1.0, 1.0)


def test_to_array_maps_the_range_and_clamps():
    """-1, 0, 1 become 0, .5, 1; what lies outside is clamped; channels come last; a graph does not matter."""
    x = torch.tensor([-3.0, 0.0, 1.0]).view(3, 1, 1).expand(3, 2, 5).clone().requires_grad_()
    array = to_array(x)
    assert array.shape == (2, 5, 3) and array[0, 0].tolist() == [0.0, 0.5, 1.0]


def test_a_strip_shows_every_picture_and_its_verdict(tmp_path):
    """Both pictures' colors cover thousands of pixels; a blue frame stands for done, an orange one for not, none for neither."""
    titles, heads = [["make it cyan", "yes", "no"]], ("reference", "a", "b")
    figure = sheet([(RED, [CYAN, CYAN])], titles, heads, [[None, True, False]])
    path = save(figure, tmp_path / "new" / "strip.png")
    assert path.is_file()
    assert count(path, "#FF0000") > 5000 and count(path, "#00FFFF") > 10_000
    assert count(path, GOOD) > 300 and count(path, BAD) > 300
    bare = save(sheet([(RED, [CYAN, CYAN])], [[]]), tmp_path / "bare.png")
    assert count(bare, GOOD) == count(bare, BAD) == 0


def test_rows_may_differ_in_length(tmp_path):
    """A short row leaves its last places empty: fewer cyan pixels than a full one, by one picture."""
    full = save(sheet([(RED, [CYAN, CYAN]), (RED, [CYAN, CYAN])], []), tmp_path / "full.png")
    short = save(sheet([(RED, [CYAN, CYAN]), (RED, [CYAN])], []), tmp_path / "short.png")
    assert count(short, "#00FFFF") == pytest.approx(0.75 * count(full, "#00FFFF"), rel=0.1)


def test_curves_are_saved_with_every_series(tmp_path):
    """Six named series, more than there are line styles, into a folder that does not exist yet."""
    few = curve({"a": [(0, 0), (1, 1)]}, tmp_path / "runs" / "few.png", "update", "success", "one")
    many = curve({str(i): [(0, i), (1, i)] for i in range(6)}, tmp_path / "runs" / "many.png", "update", "success", "six")
    ink = lambda path: int((pixels(path) < 200).any(-1).sum())
    assert ink(many) > 1.5 * ink(few)


def test_wrap_keeps_the_words_and_the_width():
    """No line is longer than the width unless a single word is; nothing is lost."""
    text = "change the color of the triangle to turquoise"
    lines = wrap(text, 16).split("\n")
    assert " ".join(lines) == text and all(len(line) <= 16 for line in lines) and len(lines) == 3
    assert wrap("extraordinarily long", 5) == "extraordinarily\nlong"
    assert wrap("", 5) == ""


def test_the_plotting_backend_is_left_alone():
    """Drawing neither loads pyplot nor chooses a backend: a notebook keeps its inline figures. Importing loads no
    matplotlib at all."""
    code = """
import sys, torch, vlmedit.figures as show
assert 'matplotlib' not in sys.modules
show.sheet([(torch.zeros(3, 2, 2), [])], [])
assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
