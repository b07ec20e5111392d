"""metrics.jsonl, read: checked line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spo_kernels.arguments import is_number
from spo_kernels.train.errors import TrainError


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line as it is, and as a record with a `step`, a `split` and numbers; a cut last line is left out."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise TrainError(f"{path}: can't be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is not None:
            yield line, record
        elif number < len(lines) or line.endswith(b"\n"):
            start = line.strip()[:60].decode(errors="backslashreplace")
            raise TrainError(f"{path}:{number}: not a line of metrics: {start!r}; remove the line to go on without it")


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        numbers = (value for name, value in record.items() if name != "split")
        good = all(is_number(v) for v in numbers)
        return record if good and isinstance(record["step"], int) and isinstance(record["split"], str) else None
    # RecursionError: thousands of brackets.
    except (ValueError, KeyError, AttributeError, RecursionError):
        return None
