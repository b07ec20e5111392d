"""How labels lie, padded or packed, and sums over their sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spo_kernels.engine.checks import can_look, capturing, check_cu_seqlens, check_int, check_labels, is_traced
from spo_kernels.engine.collectives import check_same, largest, summed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class LabelLayout:
    """Labels as the caller gave them, checked: padded `[..., T]`, or packed `[N]` with the bounds of sequences.

    With a group, the other tokens of each sequence lie on its other processes; see `LMHead.sequence_group`.
    """

    labels: Tensor
    ignore_index: int | None  # None: every label counts
    shift: bool  # position t of hidden predicts label t + 1 of its sequence
    cu_seqlens: Tensor | None = None  # [S + 1], taken to labels' device
    group: ProcessGroup | None = None
    bounds: list[int] | None = field(init=False, default=None)  # cu_seqlens, where the host has them

    def __post_init__(self) -> None:
        check_labels(self.labels, self.shift)
        if self.ignore_index is not None:
            check_int("ignore_index", self.ignore_index)
        given = self.cu_seqlens
        if given is not None:
            check_cu_seqlens(given, self.labels)
            if can_look(given):
                object.__setattr__(self, "bounds", given.tolist())
            if given.device != self.labels.device:
                # the copy need not wait for what the device does: the values are read before this returns
                object.__setattr__(self, "cu_seqlens", given.to(self.labels.device, non_blocking=True))
        if self.group is not None:
            self._check_group(self.group)

    def _check_group(self, group: ProcessGroup) -> None:
        if is_traced(self.labels) or capturing(self.labels):
            raise RuntimeError("head has a sequence_group, which is not traced or recorded in a CUDA graph")
        if self.shift:
            raise ValueError(
                "shift: head has a sequence_group, and the label after a process's last token lies on another: shift "
                "labels before sequences are split, and pass shift=False"
            )
        check_same(group, "head's sequence_group", {"the number of sequences": self.sequences}, self.labels.device)

    def check_sequences(self, shape: str) -> None:
        """Raise ValueError unless labels are sequences: `[shape]` padded, or packed."""
        if self.cu_seqlens is None and self.labels.ndim != 2:
            raise ValueError(f"labels must be [{shape}], or [N] with cu_seqlens; got {list(self.labels.shape)}")

    @property
    def sequences(self) -> int:
        """How many sequences there are."""
        return self.labels.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    def check_pairs(self) -> int:
        """The number of pairs B of B chosen sequences and then B rejected ones.

        Raises:
            ValueError: There is an odd number of sequences, or labels are no sequences.
        """
        self.check_sequences("2B, T")
        if self.sequences % 2:
            name = "labels" if self.cu_seqlens is None else "cu_seqlens"
            raise ValueError(
                f"{name} must hold an even number of sequences, B chosen ones, then B rejected ones; "
                f"got {self.sequences}"
            )
        return self.sequences // 2

    def counted(self) -> Tensor:
        """`[labels' shape]` bool: labels that have a log-probability. With `shift` a sequence's first has none."""
        if self.ignore_index is None:
            counted = torch.ones_like(self.labels, dtype=torch.bool)
        else:
            counted = self.labels != self.ignore_index
        if self.shift and self.cu_seqlens is None:
            counted[..., :1] = False
        elif self.shift and self.cu_seqlens is not None:
            # a start equal to N belongs to an empty last sequence and lands in the spare place
            first = counted.new_zeros(counted.numel() + 1)
            first[self.cu_seqlens[:-1].long()] = True
            counted &= ~first[:-1]
        return counted

    def count(self, counted: Tensor) -> Tensor:
        """How many of each sequence's labels here are `counted`: `[S]` int64."""
        if self.cu_seqlens is None:
            return counted.sum(-1)
        ends = torch.nn.functional.pad(counted.cumsum(0), (1, 0))
        return ends[self.cu_seqlens.long()].diff()

    def widths(self) -> list[int] | None:
        """All labels of each sequence, whether they count or not; None where the host does not have the bounds."""
        if self.bounds is not None:
            return [stop - start for start, stop in pairwise(self.bounds)]
        if self.cu_seqlens is not None:
            return None
        *rows, width = self.labels.shape or (1,)
        return [width] * prod(rows)

    def known_counts(self) -> list[int] | None:
        """`count`, where it does not depend on labels and the host has the bounds: nothing is waited for."""
        lengths = None if self.ignore_index is not None else self.widths()
        if lengths is None or not self.shift:
            return lengths
        return [max(length - 1, 0) for length in lengths]

    def sum(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sums of `values` (or of `values * weights`), shaped like labels, over each sequence: `[S]`."""
        return self.summed(self.sum_here, values, weights)

    def summed(self, here: Callable[..., Tensor], values: Tensor, weights: Tensor | None = None) -> Tensor:
        """The sums over all processes of what `here` sums on each."""
        if self.group is None:
            return here(values, weights)
        # rounded once, as the sum of one process is
        return self.joined(here(values.double(), weights)).to(values.dtype)

    def sum_here(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """The same over this process's tokens."""
        return sum_sequences(values, self.cu_seqlens, weights)

    def joined(self, values: Tensor) -> Tensor:
        """What each process has of a sum, as the sum, differentiable."""
        return values if self.group is None else summed(values, self.group)

    def largest(self, values: Tensor) -> Tensor:
        """The largest that any process has, element by element."""
        return values if self.group is None else largest(values, self.group)


def sum_sequences(values: Tensor, cu_seqlens: Tensor | None, weights: Tensor | None = None) -> Tensor:
    """Sums (with `weights`, of `values * weights`) over the last dimension, or over the segments of `cu_seqlens`.

    Summed in float64: in float32, 512 log-probabilities in a row lose up to 0.004 nat. Deterministic.
    """
    if cu_seqlens is not None:
        return sum_segments(values, cu_seqlens.diff().long(), weights)
    if weights is not None:
        return (values.double() * weights).sum(-1).to(values.dtype)
    return values.sum(-1, dtype=torch.float64).to(values.dtype)


def checked_bounds(name: str, values: Tensor, cu_seqlens: Tensor | None, shape: str) -> Tensor | None:
    """`cu_seqlens` of packed values of this name, where they are; None where the values are padded, `[shape]`."""
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, values, name)
        return cu_seqlens.to(values.device)
    if values.ndim != 2:
        raise ValueError(f"{name} must be [{shape}], or [N] with cu_seqlens; got {list(values.shape)}")
    return None


def sum_segments(values: Tensor, lengths: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums over consecutive segments of the given lengths, in float64 like `sum_sequences`."""
    wide = values.double() if weights is None else values.double() * weights
    return torch.segment_reduce(wide, "sum", lengths=lengths, initial=0.0, unsafe=True).to(values.dtype)
