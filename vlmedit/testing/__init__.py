"""Models and data of a few thousand random weights, made where a setting says "tiny:NAME"."""

from __future__ import annotations

from pathlib import Path

PREFIX = "tiny:"


def resolve(place: str, folder: Path, what: str) -> str:
    """The place itself; of "tiny:NAME" a folder below `folder`, made unless it is there. `what`: backbone, judge, data or start.
    Raises `InputError` for a name that is not known."""
    if not place.startswith(PREFIX):
        return place
    from vlmedit.testing.tiny_data import make

    return make(place.removeprefix(PREFIX), folder, what)
