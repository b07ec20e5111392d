"""What processes that compute one result together must come with alike, compared before anything depends on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from spo_kernels.engine.checks import capturing, is_traced
from spo_kernels.engine.collectives import check_same
from spo_kernels.head import LMHead


def check_alike(function: str, labels: Tensor, head: Tensor | LMHead, **arguments: object) -> None:
    """A head with a vocab_group or a sequence_group: the function, and the kind of each argument.

    Of tensors that is dtype and whether a gradient is wanted. With other ones a process would exchange other numbers
    than the rest, or wait for them.

    Raises:
        ValueError: On all processes, where one comes with something else.
    """
    if not isinstance(head, LMHead) or is_traced(labels) or capturing(labels):
        return
    facts = {"the function": function, **{name: _kind(value) for name, value in {"head": head, **arguments}.items()}}
    for name in ("vocab_group", "sequence_group"):
        group = getattr(head, name)
        if group is not None:
            check_same(group, f"head's {name}", facts, labels.device)


def _kind(value: object) -> object:
    """What must be alike of a value; its `repr` is the same in every process."""
    if isinstance(value, Tensor):
        grad = torch.is_grad_enabled() and value.requires_grad
        return f"{value.dtype}, {'with' if grad else 'without'} gradient"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return sorted((str(key), _kind(entry)) for key, entry in value.items())
    if isinstance(value, Sequence):
        return [_kind(entry) for entry in value]
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if is_dataclass(value) and not isinstance(value, type):
        return name, {field.name: _kind(getattr(value, field.name)) for field in fields(value)}
    return name
