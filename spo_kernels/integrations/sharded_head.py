"""`shard_head`: the head's rows on the processes of a mesh, as parameters that FSDP leaves alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spo_kernels.head import check_linear, inner_model
from spo_kernels.head.gathered import ShardedHead

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard_head(model: nn.Module, mesh: DeviceMesh, *, param_dtype: torch.dtype | None = None) -> set[nn.Parameter]:
    """Split the rows of a model's head over a mesh, so that losses bring them in slices and no process holds them all.

    Equivalent, in what is trained, to leaving the head to FSDP2, which gathers it whole on each process::

        ignored = shard_head(model, mesh)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        module = FusedPreferenceModel(model, "dpo")
        fully_shard(module, mesh=mesh, ignored_params=ignored)

    Weight and bias become DTensors, `Shard(0)` on the mesh, under their names: `torch.nn.utils.clip_grad_norm_`,
    optimizers and torch.distributed.checkpoint treat them as FSDP2's own. Gradients are the mean over processes, and
    reduced in each backward, also where FSDP2 is told to wait (`set_requires_gradient_sync`). Called before an
    optimizer is made, with the same weights on all processes.

    A tied head is left as it is, for FSDP2 to gather: the embedding needs all rows.

    Args:
        model: A transformers causal language model, maybe inside PEFT, whose adapters leave the head alone.
        mesh: Of one dimension: the data-parallel processes.
        param_dtype: What rows are cast to where they are multiplied, as `MixedPrecisionPolicy.param_dtype`; None: as
            they are.

    Returns:
        The parameters for `ignored_params`: none where the head is tied.

    Raises:
        TypeError, ValueError: The model has no linear head, or one that is adapted, quantised or split already; or the
            mesh is no mesh of one dimension.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, the processes that share the head, got {mesh.ndim}")
    inner: Any = inner_model(model)
    kind = type(inner).__name__
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None:
        raise TypeError(f"model must be a transformers causal language model with a head, got {kind}")
    if hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):
        raise ValueError(f"{kind}: the head carries an adapter: leave it out of the adapter's targets")
    check_linear(kind, head)
    if hasattr(head.weight, "full_tensor") or hasattr(head.weight, "ds_id"):
        raise ValueError(f"{kind}: the head is split already: call shard_head before fully_shard")
    if getattr(inner.get_input_embeddings(), "weight", None) is head.weight:
        return set()
    sharded = ShardedHead(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    sharded.weight = _split(head.weight, mesh)
    if head.bias is not None:
        sharded.bias = _split(head.bias, mesh)
    sharded.param_dtype = param_dtype
    inner.set_output_embeddings(sharded.train(head.training))
    return set(sharded.parameters())


def _split(parameter: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    """This process's rows, in memory of their own."""
    from torch.distributed.tensor import Shard, distribute_tensor

    # no process has to send what all have
    rows: Any = distribute_tensor(parameter.detach().to(mesh.device_type), mesh, [Shard(0)], src_data_rank=None)
    rows = rows.clone()
    return nn.Parameter(rows, parameter.requires_grad)
