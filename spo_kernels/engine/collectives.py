"""What processes of a group tell each other: numbers that must agree, and sums that autograd sees."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def gather(values: Tensor, group: ProcessGroup) -> list[Tensor]:
    """`values`, of one shape everywhere, of every process of the group in the order of its ranks."""
    distributed = torch.distributed
    found = [torch.empty_like(values) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(found, values.contiguous(), group=group)
    return found


def check_same(group: ProcessGroup, name: str, what: str, value: object, device: torch.device) -> None:
    """All processes of the group (whose argument is `name`) must come with the same value; all of them learn it.

    Without this a process with another number of tiles would wait for the others forever. Waits for the device.

    Raises:
        ValueError: One does not.
    """
    mine = torch.tensor([zlib.crc32(repr(value).encode())], device=device)
    theirs = [int(found) for found in gather(mine, group)]
    other = next((rank for rank, found in enumerate(theirs) if found != theirs[0]), None)
    if other is not None:
        raise ValueError(f"{what} must be the same on all processes of {name}; here {value!r}, {other} differs from 0")


def summed(values: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over a group whose processes make the same loss of it: each one's addend has the sum's gradient."""
    total: Tensor = _Summed.apply(values, group)
    return total


def largest(values: Tensor, group: ProcessGroup) -> Tensor:
    """The largest over the group, element by element."""
    found = values.detach().clone()
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group)
    return found


class _Summed(torch.autograd.Function):
    """A sum over processes; its gradient goes to each of them as it is."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup) -> Tensor:
        total = values.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
