"""Whether both sides computed the same, to rounding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Units of the dtype's rounding, relative to the tensor's largest element: a sum in another order stays within.
UNITS = {torch.float32: 32, torch.bfloat16: 2, torch.float16: 2, torch.float64: 32}


@dataclass(frozen=True)
class Difference:
    """The tensor that differs most, measured by what its dtype allows."""

    tensor: str
    relative: float  # largest difference over the largest element
    allowed: float

    @property
    def within(self) -> bool:
        return self.relative <= self.allowed


def worst_difference(old: Path, new: Path) -> Difference:
    """Of all tensors that the two files hold.

    Raises:
        ValueError: They hold other tensors, or other shapes or dtypes.
    """
    olds, news = torch.load(old), torch.load(new)
    if describe(olds) != describe(news):
        raise ValueError(f"the sides returned different things: {describe(olds)} and {describe(news)}")
    found = [difference(name, olds[name], news[name]) for name in olds]
    return max(found, key=lambda d: d.relative / d.allowed)


def difference(name: str, old: Tensor, new: Tensor) -> Difference:
    allowed = UNITS[old.dtype] * torch.finfo(old.dtype).eps
    scale = max(old.abs().max().item(), torch.finfo(old.dtype).tiny)
    largest = (old.double() - new.double()).abs().max().item()
    return Difference(name, largest / scale if largest == largest else float("inf"), allowed)


def describe(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for name, t in tensors.items()}
