"""Rows of files of others: JSON lines, JSON arrays and parquet, read piece by piece and no further than they are asked
for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmedit.errors import InputError

CHUNK = 2**20  # characters of a JSON file read at a time


def json_rows(path: Path) -> Iterator[dict]:
    """The objects of a JSONL file or of one JSON array, read piece by piece: arrays of a million rows do not fit a
    small memory. Raises `InputError` for a file that is cut short or no JSON."""
    decoder, buffer, end = json.JSONDecoder(), "", False
    _check_ends(path)
    with open(path, encoding="utf-8-sig") as file:
        while True:
            buffer = buffer.lstrip("[, \r\n\t") if not buffer.startswith("{") else buffer
            if buffer.startswith("{"):
                try:
                    row, at = decoder.raw_decode(buffer)
                    buffer = buffer[at:]
                    yield row
                    continue
                except json.JSONDecodeError as error:
                    if end:
                        raise InputError(f"{path}: not JSON ({error}); download it again") from None
            elif end:
                if buffer.strip("] \r\n\t"):
                    raise InputError(f"{path}: not JSON rows ({buffer[:40]!r}); download it again")
                return
            more = file.read(CHUNK)
            end, buffer = not more, buffer + more


def _check_ends(path: Path) -> None:
    """Raises InputError for a file that is cut short, before its first row is given out."""
    with open(path, "rb") as file:
        first = file.read(64).lstrip(b"\xef\xbb\xbf \r\n\t")[:1]
        file.seek(max(0, os.path.getsize(path) - 64))
        last = file.read().rstrip()[-1:]
    if first and last != {b"[": b"]"}.get(first, b"}"):
        raise InputError(f"{path}: not JSON rows to its end, which is {last.decode(errors='replace')!r}; download it again")


def parquet_library():
    """pyarrow and its parquet. Raises InputError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("parquet files need pyarrow, which is not installed (pip install pyarrow); tar shards do without") from None
    return pyarrow, pyarrow.parquet


@contextmanager
def whole_parquet(path: Path):
    """An open parquet file. Raises InputError for one that is cut short or no such file."""
    pyarrow, parquet = parquet_library()
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]}); copy, download or write it again") from None


def parquet_rows(path: Path, columns: list[str]) -> Iterator[dict]:
    """Rows of a parquet file, of which only these columns are read from the disk. Raises `InputError` where one is
    lacking."""
    with whole_parquet(path) as file:
        lacking = [c for c in columns if c not in file.schema_arrow.names]
        if lacking:
            raise InputError(f"{path}: lacks the columns {', '.join(lacking)}; it has {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(batch_size=64, columns=columns):
            yield from batch.to_pylist()
