"""JSON lines, as `spo-train` reads and writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from .task import Record


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
