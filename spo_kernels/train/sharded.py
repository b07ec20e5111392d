"""A model of which every process holds a part: put in parts by FSDP2, whole again where it is saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from spo_kernels.head import inner_model


def shard(module: nn.Module, plugin: FullyShardedDataParallelPlugin, methods: tuple[str, ...] = ()) -> None:
    """`fully_shard` of a model's decoder layers and of the module around it, in place.

    `methods` of the module run its model, as its forward does.
    """
    settings: dict[str, Any] = {
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "offload_policy": plugin.cpu_offload,
    }
    layers = inner_model(getattr(module, "model", module))._no_split_modules or ()
    for part in [part for part in module.modules() if type(part).__name__ in layers]:
        fully_shard(part, reshard_after_forward=plugin.reshard_after_forward, **settings)
    # what is kept for the backward is of no use to a module without one
    trained = any(p.requires_grad for p in module.parameters())
    fully_shard(module, reshard_after_forward=None if trained else True, **settings)
    for method in methods:
        register_fsdp_forward_method(module, method)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are in parts."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(value: Any) -> Any:
    """The whole of a tensor in parts, for which all processes must call this; else the value."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def collected(tensors: Mapping[Any, Any], keep: bool) -> dict[Any, Any]:
    """`whole` of each, one after the other; of those in parts a copy on the CPU. Nothing where not `keep`."""
    found = {}
    for name, value in tensors.items():
        gathered = whole(value)
        if keep:
            found[name] = gathered if gathered is value else gathered.cpu()
    return found


def part_of(value: Any, parameter: Tensor) -> Any:
    """What a process holds of a value that is as large as the parameter, if that is in parts; else the value."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    # no process has to send what all have read
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def model_weights(model: nn.Module, keep: bool) -> dict[str, Tensor] | None:
    """All that a model in parts is saved with, each tensor once; None of a model that is whole."""
    if not is_sharded(model):
        return None
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return collected({**dict(model.named_parameters()), **buffers}, keep)


def optimizer_state(optimizer: Any, keep: bool) -> dict[str, Any]:
    """Its `state_dict()`, whole."""
    state = optimizer.state_dict()
    parts = {key: collected(values, keep) for key, values in state["state"].items()}
    return {**state, "state": parts}


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """`load_state_dict` of what `optimizer_state` has given."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {
        key: {name: part_of(value, parameters[key]) for name, value in values.items()}
        for key, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})
