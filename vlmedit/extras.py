"""Which extra of the package brings which library, and the one line for whom it is missing.

A plain install edits and evaluates. Packages that need more say so when they are imported, before the library is.
"""

from __future__ import annotations

from importlib.util import find_spec

from vlmedit.errors import InputError

EXTRAS = {  # library, as it is imported -> extra
    "accelerate": "train",
    "peft": "train",
    "tensorboard": "train",
    "pandas": "train",
    "IPython": "notebooks",
    "ipywidgets": "notebooks",
    "nbclient": "notebooks",
    "nbformat": "notebooks",
    "papermill": "notebooks",
    "zmq": "notebooks",
    "pyarrow": "data",
    "triton": "kernels",
}


class MissingExtra(InputError, ImportError):
    """A library is not installed; the message names the extra that brings it."""

    def __init__(self, library: str):
        super().__init__(f"this needs {library}, which is not installed: pip install 'vlmedit[{EXTRAS[library]}]'")


def need(*libraries: str) -> None:
    """Raise `MissingExtra` for the first of these that is not installed; none of them is imported."""
    for library in libraries:
        if find_spec(library) is None:
            raise MissingExtra(library)


def missing(error: ImportError) -> MissingExtra | None:
    """What an import that failed asks for, where an extra brings it."""
    library = (error.name or "").partition(".")[0]
    return MissingExtra(library) if library in EXTRAS and find_spec(library) is None else None
