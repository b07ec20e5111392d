"""The head as the engine sees it: something that yields slices of the vocabulary and takes their gradients.

What is particular to a kind of head (how its rows are stored, which of them this process holds, where their gradients
go) is known here and in `gradients.py` alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spo_kernels.backends.contract import LogitTransform
from spo_kernels.engine.gradients import HeadGradient


@dataclass(frozen=True)
class HeadSlices:
    """A plain head: all rows of the vocabulary, in this process, in one tensor."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    transform: LogitTransform

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, transform: Tensor) -> HeadSlices:
        """From the tensors that an op takes; see `ModelInputs.tensors`."""
        scale, softcap = transform.tolist()
        return cls(weight, bias, LogitTransform(scale, softcap or None))

    @property
    def vocab(self) -> int:
        """V, how many rows this process has to multiply with."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """H."""
        return self.weight.shape[1]

    @property
    def weight_bytes(self) -> int:
        """Of one entry of the weight as it is stored."""
        return self.weight.dtype.itemsize

    def rows(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Rows of the weight that are a slice of the vocabulary, in the dtype of the products."""
        return self._whole(self.weight, part).to(dtype)

    def bias_rows(self, part: slice, dtype: torch.dtype) -> Tensor | None:
        """The same of the bias."""
        return None if self.bias is None else self._whole(self.bias, part).to(dtype).contiguous()

    def _whole(self, values: Tensor, part: slice) -> Tensor:
        return values if part.stop - part.start == self.vocab else values[part]

    def label_rows(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """The labels' rows of the weight, `[n, H]`."""
        return self.weight[labels].to(dtype)

    def of_classes(self, classes: Tensor, dtype: torch.dtype) -> HeadSlices:
        """A head that has these rows alone, cast."""
        bias = None if self.bias is None else self.bias[classes].to(dtype)
        return HeadSlices(self.label_rows(classes, dtype), bias, self.transform)

    def gradient(self, wide: torch.dtype, *, weight: bool, bias: bool, onto: Tensor | None = None) -> HeadGradient:
        """Where the gradients of weight and bias, if they are wanted, are to be collected. Not written yet.

        The weight's is added to `onto`, where that is given.
        """
        found = HeadGradient.empty(self.weight, wide, weight=weight and onto is None, bias=bias)
        return found if onto is None else replace(found, weight=onto, adds=True)
