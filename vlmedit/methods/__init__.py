"""Methods, one per file, found by file name: `methods/sft.py` holds the configuration, the method and `train_sft`. Helpers begin with `_`.

A method is equations and phases; the loop is vlmedit/training/trainer.py. Importing this package imports none of them.
"""

from __future__ import annotations

import pkgutil
import typing
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any


def names() -> list[str]:
    """Every method's name, in alphabetical order."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def find(name: str) -> tuple[type, Callable[..., Iterator[Any]]]:
    """A method's configuration class and its `train_<name>`. Raises KeyError for an unknown name."""
    if name not in names():
        raise KeyError(f"unknown method {name!r}; known: {', '.join(names())}")
    train = getattr(import_module(f"{__name__}.{name}"), f"train_{name}")
    return typing.get_type_hints(train)["config"], train
