"""Where two sequences part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two strings or lists begin with."""
    if a == b[: len(a)]:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
