"""Where the head's gradients are collected, a slice of the vocabulary after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spo_kernels.backends.products import Products
from spo_kernels.engine.memory import in_huge_pages


@dataclass(frozen=True)
class HeadGradient:
    """Gradients of a head's weight and bias; None where they are not wanted."""

    weight: Tensor | None  # [V, H], the weight's dtype or the accumulator's
    bias: Tensor | None  # [V], the accumulator's dtype
    adds: bool = False  # the weight's holds a gradient already, which slices are added to

    @classmethod
    def empty(cls, like: Tensor, wide: torch.dtype, *, weight: bool, bias: bool) -> HeadGradient:
        """Gradients of a head whose weight is `like`, not written yet."""
        return cls(
            in_huge_pages(torch.empty_like(like, memory_format=torch.contiguous_format)) if weight else None,
            like.new_empty(like.shape[0], dtype=wide) if bias else None,
        )

    def accumulator(self, wide: torch.dtype) -> HeadGradient:
        """A like one whose weight has the accumulator's dtype, not written yet."""
        weight = None if self.weight is None else in_huge_pages(torch.empty_like(self.weight, dtype=wide))
        return HeadGradient(weight, None if self.bias is None else torch.empty_like(self.bias))

    def room(self, rows: int, wide: torch.dtype) -> HeadGradient:
        """One of so many rows, in the accumulator's dtype, not written yet."""
        weight = None if self.weight is None else self.weight.new_empty((rows, self.weight.shape[1]), dtype=wide)
        return HeadGradient(weight, None if self.bias is None else self.bias.new_empty(rows))

    def rows(self, part: slice) -> HeadGradient:
        """That of some rows, in place."""
        weight, bias = (None if value is None else value[part] for value in (self.weight, self.bias))
        return replace(self, weight=weight, bias=bias)

    def zero_(self) -> None:
        """Set to zero."""
        for value in (self.weight, self.bias):
            if value is not None:
                value.zero_()

    def scale_(self, factor: Tensor | float) -> None:
        """Multiply by a number, or a 0-d tensor."""
        for value in (self.weight, self.bias):
            if value is not None:
                value.mul_(factor)

    def add_(self, other: HeadGradient, factor: Tensor) -> None:
        """Add `factor * other`; `other` is spent."""
        other.scale_(factor)
        for value, more in ((self.weight, other.weight), (self.bias, other.bias)):
            if value is not None and more is not None:
                value.add_(more)

    def copy_(self, other: HeadGradient) -> None:
        """Take over another's values, cast."""
        for value, more in ((self.weight, other.weight), (self.bias, other.bias)):
            if value is not None and more is not None and value is not more:
                value.copy_(more)


class SliceGradient:
    """One slice of a `HeadGradient` while its addends, products of tiles and hidden states, come in.

    They are summed in the accumulator's dtype: where the gradient lies, if it has that dtype, else in a buffer that is
    cast once. A single product that rounds its sums once may go to a gradient of the operands' dtype directly.
    """

    def __init__(self, gradient: HeadGradient, products: Products, wide: torch.dtype) -> None:
        self._gradient, self._products, self._wide = gradient, products, wide
        self._buffer: Tensor | None = None  # made for the widest slice and used for all
        self._sum: Tensor | None = None
        self._cast = False

    def begin(self, part: slice, operand: Tensor, terms: int | None = None, *, fresh: bool = True) -> None:
        """A slice of the vocabulary. `operand` is one of the products'; `terms`, where only one is to come, its depth.

        Where it is not `fresh`, products are added to what the gradient has; it then has the accumulator's dtype.
        """
        self._part, self._begun = part, not fresh
        weight = self._gradient.weight
        if weight is None:
            return
        rounded = fresh and not self._gradient.adds and terms is not None and self._products.can_round(operand, terms)
        self._cast = weight.dtype not in ((self._wide, operand.dtype) if rounded else (self._wide,))
        if not self._cast:
            self._sum = weight[part]
            return
        columns = part.stop - part.start
        if self._buffer is None or self._buffer.shape[0] < columns:
            self._buffer = weight.new_empty((columns, weight.shape[1]), dtype=self._wide)
        self._sum = self._buffer[:columns]

    def add(self, tile: Tensor, states: Tensor, listed: Tensor | None = None) -> None:
        """Add `tile.T @ states`, or `tile.T @ states[listed]`, and the tile's column sums for the bias."""
        if self._sum is not None:
            if self._sum.shape[1] != states.shape[1]:  # of the last entries of a row alone
                states = states[:, -self._sum.shape[1] :]
            onto = self._begun or (self._gradient.adds and not self._cast)
            self._products.matmul(tile.t(), states, out=self._sum, accumulate=onto, b_rows=listed)
        if self._gradient.bias is not None:
            sums, bias = tile.sum(0, dtype=self._wide), self._gradient.bias[self._part]
            bias.add_(sums) if self._begun else bias.copy_(sums)
        self._begun = True

    def finish(self, unit: Tensor | None = None) -> None:
        """Cast the slice to where it belongs, multiplied by `unit`. A slice without addends becomes zero."""
        bias = self._gradient.bias
        # where slices are added to the gradient itself there is nothing to begin with, and no unit: see `headroom`
        weight = None if self._gradient.adds and not self._cast else self._sum
        for total in (weight, None if bias is None else bias[self._part]):
            if total is not None and not self._begun:
                total.zero_()
            elif total is not None and unit is not None:
                total.mul_(unit)
        if self._gradient.weight is None or self._sum is None or not self._cast:
            return
        if self._gradient.adds:
            self._gradient.weight[self._part] += self._sum
        else:
            self._gradient.weight[self._part] = self._sum

    def close(self) -> None:
        """All slices are finished."""
