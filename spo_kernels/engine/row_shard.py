"""Rows of a head of which every process of a group has some: what holds whether or not they have the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from spo_kernels.engine.collectives import gather

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class RowShard:
    """Consecutive classes of a vocabulary that a group of processes shares, in the order of its ranks."""

    name: ClassVar[str]  # of the field of `LMHead`

    group: ProcessGroup
    rows: tuple[int, ...]  # how many classes each process has
    rank: int

    @property
    def vocab(self) -> int:
        """V, classes of all processes."""
        return sum(self.rows)


def tell_shapes(name: str, of: str, group: ProcessGroup, weight: Tensor, more: Tensor) -> list[list[int]]:
    """Rows and `more` numbers (`[k]`, on the weight's device) of every process, by its rank; all call this together.

    `name` is the weight's, `of` the group's, for messages.

    Raises:
        ValueError: On all of them, where widths differ.
    """
    mine = torch.cat([torch.tensor(weight.shape, device=more.device), more])
    found: list[list[int]] = torch.stack(gather(mine, group)).tolist()
    for rank, (_, width, *_) in enumerate(found):
        if width != found[0][1]:
            raise ValueError(f"{name}: H is {found[0][1]} on process 0 of its {of}, {width} on {rank}")
    return [[rows, *others] for rows, _, *others in found]
