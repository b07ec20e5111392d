"""A head whose rows lie on processes that have tokens of their own: slices are brought in one after the other.

While one is multiplied the next is on its way, and the last one's gradient on its way back to the process that has its
rows: no process holds the head or its gradient. Slices are cut by what all processes know alike (rows, bytes, dtypes),
never by how many tokens one has, so that all take part in the same collectives; one without tokens adds zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spo_kernels.backends.products import Products
from spo_kernels.engine.collectives import check_same
from spo_kernels.engine.gradients import HeadGradient, SliceGradient
from spo_kernels.engine.row_shard import RowShard, tell_shapes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class _Slice:
    """Rows that one process has."""

    owner: int
    part: slice  # of its rows
    classes: slice


class RowStream(RowShard):
    """Consecutive classes of a vocabulary whose rows the processes lend each other."""

    name = "shard_group"
    # labels are counted from the first of all classes: this process sees every row
    first = 0

    @classmethod
    def agree(cls, name: str, group: ProcessGroup, weight: Tensor, bias: Tensor | None) -> RowStream:
        """What the processes hold; all call this together. `name` is the weight's, for messages.

        Raises:
            ValueError: On all of them, where there is no row, another width, or a bias on some of them.
        """
        found = tell_shapes(name, cls.name, group, weight, torch.tensor([bias is not None], device=weight.device))
        if len({has_bias for _, has_bias in found}) > 1:
            raise ValueError(f"{name}: some processes of its {cls.name} have a bias, others none")
        rows = tuple(count for count, _ in found)
        if not any(rows):
            raise ValueError(f"{name} must not be empty on all processes of its {cls.name}")
        return cls(group, rows, torch.distributed.get_rank(group))

    def check_call(self, options: object, tensors: Sequence[Tensor | None]) -> None:
        """Raise ValueError on all processes unless they walk the same slices as often; all call this together."""
        grad = torch.is_grad_enabled()
        kinds = [None if value is None else (value.dtype, grad and value.requires_grad) for value in tensors]
        assert tensors[0] is not None
        check_same(
            self.group,
            f"head's {self.name}",
            {"options, dtypes and what needs a gradient": (options, kinds)},
            tensors[0].device,
        )

    def join_(self, stats: object) -> None:
        """Nothing: every process multiplies with all rows."""

    def sum_(self, values: Tensor) -> Tensor:
        """`values`, for the same reason."""
        return values

    def of_first(self, values: Tensor) -> Tensor:
        """`values`: each process draws for its own tokens."""
        return values

    def over_rows(self, values: Tensor) -> Tensor:
        """A sum over this process's rows, which becomes that over all."""
        torch.distributed.all_reduce(values, group=self.group)
        return values

    def slices(self, step: int) -> list[_Slice]:
        """All classes in order, at most `step` of one process at a time."""
        found, first = [], 0
        for owner, rows in enumerate(self.rows):
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                found.append(_Slice(owner, slice(start, stop), slice(first + start, first + stop)))
            first += rows
        return found

    def tokens_of_slices(self, labels: Tensor, step: int) -> tuple[Tensor, ...]:
        """The tokens (`[n]` labels are theirs) of each slice's classes; waits for the device once."""
        ascending, order = labels.sort()
        starts = torch.tensor([piece.classes.start for piece in self.slices(step)], device=labels.device)
        bounds = [*torch.searchsorted(ascending, starts).tolist(), len(labels)]
        return order.split([stop - start for start, stop in pairwise(bounds)])

    def bring(self, step: int, *values: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """Classes, and those rows of `values` (of which this process gives its own), the next ones on their way.

        There is room for two slices: what was given out is written over when the one after the next is asked for.
        """
        plan = self.slices(step)
        rooms = [[value.new_empty((step, *value.shape[1:])) for value in values] for _ in range(2)]

        def send(number: int) -> tuple[list[Tensor], list[Any]]:
            here = plan[number]
            rows = [room[: here.part.stop - here.part.start] for room in rooms[number % 2]]
            if here.owner == self.rank:
                # a broadcast counts as a write to its operand, which would make a saved weight unusable
                for room, value in zip(rows, values, strict=True):
                    room.copy_(value[here.part])
            source = torch.distributed.get_global_rank(self.group, here.owner)
            return rows, [torch.distributed.broadcast(r, source, group=self.group, async_op=True) for r in rows]

        coming = send(0)
        for number, here in enumerate(plan):
            rows, works = coming
            for work in works:
                work.wait()
            if number + 1 < len(plan):
                coming = send(number + 1)
            yield here.classes, rows


class StreamedGradient(SliceGradient):
    """One slice after the other is summed over processes; its mean goes to the process that has its rows.

    As FSDP's gradients: each process's loss counts as one of as many. Sums move in the accumulator's dtype.
    """

    def __init__(self, gradient: HeadGradient, products: Products, wide: torch.dtype, stream: RowStream, step: int):
        """`gradient` is of this process's rows; slices are those of `stream.slices(step)`, in order."""
        super().__init__(gradient, products, wide)
        self._own, self._stream = gradient, stream
        self._coming = iter(stream.slices(step))
        self._rooms = [gradient.room(step, wide) for _ in range(2)]
        self._away: list[tuple[_Slice, HeadGradient, list[Any]]] = []

    def begin(self, part: slice, operand: Tensor, terms: int | None = None, *, fresh: bool = True) -> None:
        """The next slice, whose classes are `part`."""
        while len(self._away) >= len(self._rooms):
            self._land()
        self._here = next(self._coming)
        self._rooms.reverse()
        rows = slice(0, part.stop - part.start)
        self._gradient = self._rooms[0].rows(rows)
        super().begin(rows, operand, terms, fresh=fresh)

    def finish(self, unit: Tensor | None = None) -> None:
        """Send the slice, multiplied by `unit`, on its way."""
        super().finish(unit)
        owner = torch.distributed.get_global_rank(self._stream.group, self._here.owner)
        works = [
            torch.distributed.reduce(value, owner, group=self._stream.group, async_op=True)
            for value in (self._gradient.weight, self._gradient.bias)
            if value is not None
        ]
        self._away.append((self._here, self._gradient, works))

    def close(self) -> None:
        """Wait for what is on its way."""
        while self._away:
            self._land()

    def _land(self) -> None:
        here, total, works = self._away.pop(0)
        for work in works:
            work.wait()
        if here.owner == self._stream.rank:
            total.scale_(1.0 / len(self._stream.rows))
            self._own.rows(here.part).copy_(total)
