"""Running statistics of objectives: explicit, saved and restored, changed by training only.

An objective that holds some keeps them in a `RunningState` and has `state_dict()` and `load_state_dict()`, as a
module has; objectives made of others pass these on.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_sharing: ContextVar[tuple["ProcessGroup", ...]] = ContextVar("_sharing", default=())


@contextmanager
def same_pairs(*groups: "ProcessGroup") -> Iterator[None]:
    """Inside, processes of these groups have the same pairs: what is found over all processes counts them once."""
    token = _sharing.set(groups)
    try:
        yield
    finally:
        _sharing.reset(token)


class RunningState:
    """Named numbers, 0-d tensors, that last from batch to batch."""

    def __init__(self, **start: float) -> None:
        self._values = {name: torch.tensor(value, dtype=torch.float64) for name, value in start.items()}

    def get(self, name: str, like: Tensor) -> Tensor:
        """A value in the dtype and on the device of `like`."""
        return self._values[name].to(like)

    def update(self, **values: Tensor) -> None:
        """Replace values; does nothing where gradients are disabled, so that evaluation changes nothing."""
        if torch.is_grad_enabled():
            self._values.update({name: value.detach() for name, value in values.items()})

    def state_dict(self) -> dict[str, Tensor]:
        """The values, copied to the CPU."""
        return {name: value.cpu().clone() for name, value in self._values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over values from `state_dict()`.

        Raises:
            ValueError: Other names than this state has.
        """
        if state.keys() != self._values.keys():
            raise ValueError(f"state has {sorted(state)}, expected {sorted(self._values)}")
        self._values = {name: value.detach().clone() for name, value in state.items()}


class Stateful:
    """An objective's part that saves and restores its `state`."""

    state: RunningState

    def state_dict(self) -> dict[str, Tensor]:
        """The running statistics, 0-d CPU tensors by name."""
        return self.state.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore them; ValueError for other names."""
        self.state.load_state_dict(state)


def has_state(objective: Any) -> bool:
    """Whether the objective has running statistics."""
    return bool(objective.state_dict()) if hasattr(objective, "state_dict") else False


def batch_moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n - 1 in its divisor, 0 for fewer than two) of all processes' values, detached.

    Processes are asked where gradients are enabled only: evaluation batches need not be as many on each.
    """
    values = values.detach()
    count = _total(torch.full_like(values.sum(), values.numel()))
    mean = _total(values.sum()) / count.clamp_min(1)
    deviations = _total((values - mean).square().sum())
    return mean, (deviations / (count - 1).clamp_min(1)).sqrt()


def moving_moments(state: RunningState, values: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """The state's "mean" and "std" after `x ← decay x + (1 - decay) x_batch` with `batch_moments(values)`."""
    for name, moment in zip(("mean", "std"), batch_moments(values), strict=True):
        state.update(**{name: decay * state.get(name, values) + (1.0 - decay) * moment})
    return state.get("mean", values), state.get("std", values)


def gathered(values: Tensor) -> tuple[Tensor, int]:
    """All processes' `values` `[n]`, detached, in the order of ranks, and where this process's start.

    Processes are asked where gradients are enabled only, as in `batch_moments`; n may differ between them.
    """
    values = values.detach()
    if not _together():
        return values, 0
    distributed = torch.distributed
    first = _first(values.device)
    mine = values if distributed.get_rank() == first else values[:0]
    sizes = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, torch.full_like(sizes[0], mine.numel()))
    counts = [int(size) for size in sizes]
    padded = torch.nn.functional.pad(mine, (0, max(counts) - mine.numel()))
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded)
    every = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return every, sum(counts[:first])


def _together() -> bool:
    """Whether other processes take part in this batch."""
    distributed = torch.distributed
    return torch.is_grad_enabled() and distributed.is_available() and distributed.is_initialized()


def _total(value: Tensor) -> Tensor:
    """Sum over processes that train together."""
    if _together():
        value = value.clone() if _first(value.device) == torch.distributed.get_rank() else torch.zeros_like(value)
        torch.distributed.all_reduce(value)
    return value


def _first(device: torch.device) -> int:
    """The first of the processes that have the same pairs as this one, by its rank among all."""
    distributed, groups = torch.distributed, _sharing.get()
    if not groups:
        return distributed.get_rank()
    rank = torch.tensor(distributed.get_rank(), device=device)
    for group in groups:
        distributed.all_reduce(rank, distributed.ReduceOp.MIN, group=group)
    return int(rank)
