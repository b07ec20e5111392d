"""What processes of a group tell each other: numbers that must agree, and sums that autograd sees."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FACTS = 32  # more than any call compares


def gather(values: Tensor, group: ProcessGroup) -> list[Tensor]:
    """`values`, of one shape everywhere, of every process of the group in the order of its ranks."""
    distributed = torch.distributed
    found = [torch.empty_like(values) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(found, values.contiguous(), group=group)
    return found


def check_same(group: ProcessGroup, name: str, facts: Mapping[str, object], device: torch.device) -> None:
    """All processes of the group (whose argument is `name`) must come with the same facts; all of them learn it.

    Without this a process with another number of tiles would wait for the others forever. Waits for the device.

    Raises:
        ValueError: One does not; the message names the first fact that differs.
    """
    if len(set(_gathered([facts], group, device))) == 1:
        return
    # of one size, so that processes which compare other facts find that too
    padded = [*facts.items(), *[None] * (_FACTS - len(facts))]
    first, *others = _gathered(padded, group, device)
    for rank, theirs in enumerate(others, 1):
        for (what, value), here, there in zip(facts.items(), first, theirs, strict=False):
            if here != there:
                raise ValueError(
                    f"{what} must be the same on all processes of {name}; here {value!r}, {rank} differs from 0"
                )


def check_close(group: ProcessGroup, name: str, tensors: Mapping[str, Tensor | None], device: torch.device) -> None:
    """Tensors must have the same shape and numbers on all processes of the group (whose argument is `name`).

    To five digits: what each has computed by itself may be rounded otherwise. Waits for the device.

    Raises:
        ValueError: On all processes, where they do not; the message names the first that differs.
    """
    shapes = {what: None if values is None else list(values.shape) for what, values in tensors.items()}
    check_same(group, name, {f"the shape of {what}": shape for what, shape in shapes.items()}, device)
    given = {what: values.detach().double().flatten() for what, values in tensors.items() if values is not None}
    if not given:
        return
    first, *others = gather(torch.cat(list(given.values())), group)
    sizes = [values.numel() for values in given.values()]
    for rank, theirs in enumerate(others, 1):
        same = torch.isclose(theirs, first, rtol=1e-5, atol=1e-6, equal_nan=True)
        for what, alike in zip(given, same.split(sizes), strict=True):
            if not bool(alike.all()):
                raise ValueError(f"{what} must be the same on all processes of {name}; {rank} differs from 0")


def _gathered(values: Sequence[object], group: ProcessGroup, device: torch.device) -> list[tuple[int, ...]]:
    """Checksums of what each process comes with."""
    mine = torch.tensor([zlib.crc32(repr(value).encode()) for value in values], device=device)
    return [tuple(theirs.tolist()) for theirs in gather(mine, group)]


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
