"""The part of the vocabulary whose rows this process holds, and how results of the parts become those of the whole.

Hidden states and labels are the same on all processes of a group. For each row of tiles they exchange five numbers a
token at most, all to all, and merge them in the order of ranks: the same bits everywhere. What they have summed for
hidden's gradient, `[N, H]` in the accumulator's dtype, is added up. Nothing that is as large as the head moves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spo_kernels.backends.contract import TokenStats
from spo_kernels.engine.collectives import gather
from spo_kernels.engine.row_shard import RowShard, tell_shapes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_MIX = 0x9E3779B97F4A7C15 - 2**64


class VocabShard(RowShard):
    """Consecutive classes of a vocabulary whose rows processes with the same tokens share."""

    name = "vocab_group"

    @classmethod
    def agree(cls, name: str, group: ProcessGroup, weight: Tensor, labels: Tensor) -> VocabShard:
        """What the processes hold; all call this together. `name` is the weight's, for messages.

        Raises:
            ValueError: On all of them, where one has no rows, another width, or other labels.
        """
        count = torch.tensor([labels.numel()], device=labels.device)
        mine = torch.cat([count, _checksum(labels.flatten())[None]])
        found = tell_shapes(name, cls.name, group, weight, mine)
        for rank, (rows, *others) in enumerate(found):
            if rows == 0:
                raise ValueError(f"{name}: process {rank} of its vocab_group has no rows")
            if others != found[0][1:]:
                raise ValueError(
                    f"labels must be the same on all processes of {name}'s vocab_group, as hidden is; process {rank} "
                    "has others than process 0"
                )
        return cls(group, tuple(rows for rows, *_ in found), torch.distributed.get_rank(group))

    @property
    def first(self) -> int:
        """The class that labels are counted from: that of this process's first row."""
        return sum(self.rows[: self.rank])

    def same_as(self, other: RowShard | None) -> bool:
        """Whether two heads are split alike."""
        if other is None:
            return False
        ranks = [torch.distributed.get_process_group_ranks(shard.group) for shard in (self, other)]
        return self.rows == other.rows and ranks[0] == ranks[1]

    def join_(self, stats: TokenStats) -> Tensor:
        """Statistics of these classes become those of all.

        Returns:
            `exp(old maximum - new maximum)` (`[R]`): by what sums that are relative to the old one shrink.
        """
        before = stats.max.clone()
        present = {name: value for name, value in vars(stats).items() if value is not None}
        parts = gather(torch.stack(list(present.values())), self.group)
        first, *others = (replace(stats, **dict(zip(present, part, strict=True))) for part in parts)
        for other in others:
            first.merge_(other)
        for name, value in present.items():
            value.copy_(getattr(first, name))
        return (before - stats.base).exp_()

    def sum_(self, values: Tensor) -> Tensor:
        """`values`, which become the sum over all processes."""
        torch.distributed.all_reduce(values, group=self.group)
        return values

    def over_rows(self, values: Tensor) -> Tensor:
        """A sum over this process's rows: it stays one, since what is made of it goes through `sum_`."""
        return values

    def of_first(self, values: Tensor) -> Tensor:
        """What the first process has, of one shape everywhere: for choices that are drawn."""
        return gather(values, self.group)[0]


def _checksum(labels: Tensor) -> Tensor:
    """Of labels `[n]` and their places, 0-d int64."""
    mixed = (labels + 1) * torch.arange(1, labels.numel() + 1, device=labels.device) * _MIX
    return (mixed ^ (mixed >> 29)).sum()
