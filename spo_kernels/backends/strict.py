"""Products of float32, or of half precision into float32, whatever the process allows torch to round on the way.

TF32 costs 0.02 to 0.028 nat per 512 tokens; sums in float16 are worse, and have no float32 result. A bfloat16 result is
rounded once: its partial sums are not, which torch allows by default.
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
_mkldnn: Any = torch.backends.mkldnn  # whose stub does not know `matmul`
_Product = tuple[str, torch.dtype, torch.dtype]
# by kind of device, dtype of operands and result: who has the setting, its name and the only value that is exact
_SETTINGS: dict[_Product, tuple[Any, str, Any]] = {
    ("cpu", torch.float32, torch.float32): (_mkldnn.matmul, "fp32_precision", "ieee"),
    ("cuda", torch.float32, torch.float32): (torch.backends.cuda.matmul, "fp32_precision", "ieee"),
    ("cuda", torch.float16, torch.float32): (torch.backends.cuda.matmul, "allow_fp16_accumulation", False),
    ("cuda", torch.bfloat16, torch.bfloat16): (
        torch.backends.cuda.matmul,
        "allow_bf16_reduced_precision_reduction",
        False,
    ),
}
_under_way = dict.fromkeys(_SETTINGS, 0)
_changed: dict[_Product, Any] = {}  # what was found


@contextmanager
def strict(device: torch.device, operands: torch.dtype, result: torch.dtype) -> Iterator[None]:
    """Inside, torch's products of such operands with such a result on the device round their results only."""
    key = (device.type, operands, result)
    if key not in _SETTINGS:
        yield
        return
    owner, name, exact = _SETTINGS[key]
    with _lock:
        if _under_way[key] == 0:
            found = getattr(owner, name)
            if found not in (exact, "none"):
                _changed[key] = found
                setattr(owner, name, exact)
        _under_way[key] += 1
    try:
        yield
    finally:
        with _lock:
            _under_way[key] -= 1
            if _under_way[key] == 0 and key in _changed:
                _put_back(owner, name, _changed.pop(key))


def _put_back(owner: Any, name: str, value: Any) -> None:
    if isinstance(value, str):
        # one that followed torch.backends.fp32_precision goes on to
        setattr(owner, name, "none")
    if getattr(owner, name) != value:
        setattr(owner, name, value)
