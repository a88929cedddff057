"""The scripts of papers/ as modules."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def script(name: str):
    """A script of papers/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "papers" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module
