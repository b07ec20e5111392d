"""Products of float32, or of half precision into float32, whatever the process allows torch to round on the way.

TF32 costs 0.02 to 0.028 nat per 512 tokens; sums in float16 are worse, and have no float32 result. Reductions in
reduced precision are those of a half-precision result, which these products do not have.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# torch has no argument for it, only settings of the process. So they are changed for the launch alone: the first
# product under way changes them, the last one puts them back, and products of other threads, which may overlap,
# find them changed or lose nothing but speed. Nothing is traced here: under torch.compile this runs inside an op,
# and a graph's guards see the settings before and after it.
_lock = threading.Lock()
_under_way = {"cpu": 0, "cuda": 0}
_changed: dict[str, list[tuple[Any, str, Any]]] = {"cpu": [], "cuda": []}


def _settings(kind: str) -> list[tuple[Any, str, Any]]:
    """Who has a setting, its name and the only value that is exact."""
    if kind == "cpu":
        mkldnn: Any = torch.backends.mkldnn  # its stub does not know `matmul`
        return [(mkldnn.matmul, "fp32_precision", "ieee")]
    matmul = torch.backends.cuda.matmul
    return [(matmul, "fp32_precision", "ieee"), (matmul, "allow_fp16_accumulation", False)]


@contextmanager
def strict(device: torch.device) -> Iterator[None]:
    """Inside, torch's products on the device round their results only."""
    kind = device.type
    if kind not in _under_way:
        yield
        return
    with _lock:
        if _under_way[kind] == 0:
            for owner, name, exact in _settings(kind):
                found = getattr(owner, name)
                if found not in (exact, "none"):
                    _changed[kind].append((owner, name, found))
                    setattr(owner, name, exact)
        _under_way[kind] += 1
    try:
        yield
    finally:
        with _lock:
            _under_way[kind] -= 1
            if _under_way[kind] == 0:
                while _changed[kind]:
                    _put_back(*_changed[kind].pop())


def _put_back(owner: Any, name: str, value: Any) -> None:
    if isinstance(value, str):
        # one that followed torch.backends.fp32_precision goes on to
        setattr(owner, name, "none")
    if getattr(owner, name) != value:
        setattr(owner, name, value)
