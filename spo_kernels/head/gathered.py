"""Parameters of which every process holds a part: whole, or as many rows as tensor parallelism gives this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def gathered(value: None) -> None: ...
@overload
def gathered(value: Tensor) -> Tensor: ...
def gathered(value: Any) -> Any:
    """A DTensor's `full_tensor()`, whose gradient is the mean over its mesh, in its own placement; else the value.

    The mean is what FSDP makes of the gradients of processes that have tokens of their own, and of equal gradients
    (processes that share the tokens) it is each of them.
    """
    return _rows(value, None)


@overload
def kept_rows(value: None, dimension: str) -> tuple[None, None]: ...
@overload
def kept_rows(value: Tensor, dimension: str) -> tuple[Tensor, ProcessGroup | None]: ...
def kept_rows(value: Any, dimension: str) -> tuple[Any, ProcessGroup | None]:
    """The same, but where the mesh has a dimension of that name over which the rows are split, they stay split.

    Returns:
        This process's rows, and the group that shares them; the mean is over the others. Or everything, and None.
    """
    mesh = getattr(value, "device_mesh", None)
    names = (mesh.mesh_dim_names if mesh is not None else None) or ()
    if dimension not in names or not value.placements[names.index(dimension)].is_shard(0):
        return gathered(value), None
    return _rows(value, names.index(dimension)), value.device_mesh.get_group(dimension)


def _rows(value: Any, kept: int | None) -> Any:
    """A DTensor gathered over all dimensions of its mesh but one."""
    if not hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import Partial, Placement, Replicate, Shard

    mesh = value.device_mesh

    def placements(others: Placement) -> list[Placement]:
        return [Shard(0) if place == kept else others for place in range(mesh.ndim)]

    # a division and a sum, since gloo has no mean; of parts, since the whole's quotient would be a second whole
    part = _Divided.apply(value, mesh.size() // (1 if kept is None else mesh.size(kept)))
    return part.redistribute(placements=placements(Replicate())).to_local(grad_placements=placements(Partial()))


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


class ShardedHead(nn.Linear):
    """A linear layer of which every process of a mesh has some rows, as DTensors: see `shard_head`."""

    param_dtype: torch.dtype | None = None

    def rows(self) -> tuple[Tensor, Tensor | None, ProcessGroup]:
        """This process's rows of weight and bias, and the group that has the others."""
        weight: Any = self.weight
        bias: Any = self.bias
        own = None if bias is None else self._cast(bias.to_local())
        return self._cast(weight.to_local()), own, weight.device_mesh.get_group()

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`, from weights that all processes gather together; of no position, nothing is gathered."""
        if input.numel() == 0:
            return input.new_empty((*input.shape[:-1], self.out_features))
        bias = None if self.bias is None else self._cast(gathered(self.bias))
        return nn.functional.linear(input, self._cast(gathered(self.weight)), bias)

    def _cast(self, value: Tensor) -> Tensor:
        return value if self.param_dtype is None else value.to(self.param_dtype)
