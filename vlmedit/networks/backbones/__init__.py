"""Backbone families: every other file of this folder (names that begin with _ are helpers), and entry points of the group
`vlmedit.backbones` in other packages, `NAME = "module:FAMILY"`. They are looked for when the first place is read.

Every family hides the same rectified flow behind conventions of its own:

| file         | latents become tokens            | reference                             | time given              | output |
|--------------|----------------------------------|---------------------------------------|-------------------------|--------|
| `flux`       | 2x2 packed here, ids (k, y, x)   | more tokens, k = 1                    | t                       | v      |
| `flux2`      | packed by its codec, (T, h, w, l)| more tokens, T = 10                   | t                       | v      |
| `qwen_image` | 2x2 packed here, grid sizes      | more tokens, a second grid            | t                       | v      |
| `z_image`    | inside                           | frame 0 of two, or omni's first image | 1 - t                   | -v     |
| `sd3`        | inside                           | more input channels (`widen`)         | 1000 t                  | v      |
| `sana`       | inside                           | more input channels (`widen`)         | 1000 t, times its scale | v      |
| `shapes`     | inside, of pixels                | keys and values of every block        | t                       | v      |
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmedit.networks.backbones._base import Family


@cache
def families() -> dict[str, Family]:
    """All that are found, by name: a file's, with hyphens. Raises ValueError for two of one name or of one transformer."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    found = [(name.replace("_", "-"), import_module(f"{__name__}.{name}").FAMILY) for name in names]
    found += [(entry.name, entry.load()) for entry in entry_points(group="vlmedit.backbones")]
    for what in ([name for name, _ in found], [family.transformer for _, family in found]):
        if twice := sorted({x for x in what if what.count(x) > 1}):
            raise ValueError(f"two backbone families for {', '.join(twice)}; uninstall one")
    return dict(found)


def family_of(transformer: str) -> Family:
    """The family of a transformer's class. Raises ValueError for a class without one."""
    known = {family.transformer: family for family in families().values()}
    if transformer not in known:
        raise ValueError(f"no adapter for {transformer}; known: {', '.join(known)}")
    return known[transformer]
