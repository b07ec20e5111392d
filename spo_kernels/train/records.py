"""Read training records and check them; every complaint names the file and the line.

A file is .jsonl (one object a line), .json (an array of objects, or JSON lines) or .parquet.
Anything else is a data set of the hub, or a folder, that `datasets.load_dataset` understands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spo_kernels.train.errors import TrainError

Row = dict[str, Any]
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

FILE_TYPES = (".jsonl", ".json", ".parquet")
# Endings that say "a file", so that a typo is not looked up on the hub.
OTHER_FILE_TYPES = frozenset({".csv", ".tsv", ".txt", ".gz", ".zip", ".zst", ".arrow", ".yaml", ".xml", ".pkl", ".pt"})


def read_rows(source: str, split: str) -> Iterator[tuple[str, Row]]:
    """Yield (where, row) for every record of a file or hub data set; at least one, or an error."""
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir() or (not path.exists() and suffix not in FILE_TYPES and suffix not in OTHER_FILE_TYPES):
        rows = _read_hub(source, split)
    elif suffix not in FILE_TYPES:
        raise TrainError(f"{source}: unknown file type {suffix!r}; expected one of {', '.join(FILE_TYPES)}")
    elif not path.is_file():
        raise TrainError(f"{source}: no such file")
    else:
        rows = _READERS[suffix](path)
    empty = True
    for where, row in rows:
        empty = False
        if not isinstance(row, dict):
            raise TrainError(f"{where}: expected a JSON object with named fields, got {type(row).__name__}")
        yield where, row
    if empty:
        raise TrainError(f"{source}: no records in it")


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Line by line: the file is never in memory as a whole."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, _parse(line.removesuffix(b"\n"), where)
    except OSError as error:
        raise TrainError(f"{path}: can't be read: {error.strerror}") from error


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    content = _read_bytes(path)
    if not content.lstrip().startswith(b"["):
        # Hub data sets often hold JSON lines in a file called .json.
        yield from _read_jsonl(path)
        return
    for number, row in enumerate(_parse(content, str(path)), start=1):
        yield f"{path}: record {number}", row


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: record {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise TrainError(f"{path}: not a readable parquet file: {error}") from error


def _read_hub(source: str, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(source, split=split)
    # load_dataset raises many types (missing, gated, offline, no such split); all are about this name.
    except Exception as error:
        raise TrainError(
            f"data set {source!r}, split {split!r}: can't be loaded ({type(error).__name__}: {error}); "
            "if a local file was meant, it does not exist"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{source}[{split}]: record {number}", row


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(_BYTE_ORDER_MARK)
    except OSError as error:
        raise TrainError(f"{path}: can't be read: {error.strerror}") from error


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise TrainError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise TrainError(
            f"{where}: not valid JSON, or cut off: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from error
