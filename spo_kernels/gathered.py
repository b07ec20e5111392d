"""Parameters of which every process holds a part, whole."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@overload
def gathered(value: None) -> None: ...
@overload
def gathered(value: Tensor) -> Tensor: ...
def gathered(value: Any) -> Any:
    """A DTensor's `full_tensor()`, whose gradient is the mean over its mesh, in its own placement; else the value.

    The mean is what FSDP makes of the gradients of processes that have tokens of their own, and of equal gradients
    (processes that share the tokens) it is each of them.
    """
    if not hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import Partial

    mesh = value.device_mesh
    # a sum and a division, since gloo has no mean
    return _Divided.apply(value.full_tensor(grad_placements=[Partial()] * mesh.ndim), mesh.size())


class _Divided(torch.autograd.Function):
    """The value itself; its gradient is divided."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, by: int) -> Tensor:
        ctx.by = by
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.by, None
