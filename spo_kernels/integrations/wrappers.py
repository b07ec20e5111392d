"""What DDP and FSDP do to the forward of a module that they wrap, where a loss must know it."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_TOGETHER = torch.distributed.is_available()


class Sealed:
    """An argument that FSDP's mixed precision does not find, and so does not cast: it opens containers and dataclasses.

    A sum of log-probabilities of -300 in bfloat16 is off by up to 1.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


def sealed(arguments: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The arguments, those with these names sealed."""
    return arguments | {name: Sealed(arguments[name]) for name in names if arguments.get(name) is not None}


def opened(argument: Any) -> Any:
    """What was sealed, or the argument itself."""
    return argument.value if isinstance(argument, Sealed) else argument


def is_fsdp2(module: nn.Module) -> bool:
    """Whether `fully_shard` was called with the module."""
    if not _TOGETHER:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def inside_ddp() -> bool:
    """Whether the forward of some DistributedDataParallel is running."""
    return nn.parallel.DistributedDataParallel._active_ddp_module is not None


def ddp_around(module: nn.Module) -> nn.Module | None:
    """The DistributedDataParallel that wraps the module; it leaves no note there, so all objects are looked at (50 ms).

    None for one process, whose gradients nobody has to average.
    """
    if not (_TOGETHER and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return None
    kind = nn.parallel.DistributedDataParallel
    return next((o for o in gc.get_objects() if type(o) is kind and o.module is module), None)


def is_gathered_for_forward(module: nn.Module) -> bool:
    """Whether hooks of the module itself, FSDP2's or ZeRO-3's, gather its weight and free it when its forward ends."""
    return is_fsdp2(module) or hasattr(module.weight, "ds_id")


def is_one_group(module: nn.Module) -> bool:
    """Whether `fully_shard` was called with the module and with none of its parts."""
    return is_fsdp2(module) and not any(is_fsdp2(part) for part in module.modules() if part is not module)
