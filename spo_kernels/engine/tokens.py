"""Which labels count, derived once a call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spo_kernels.engine.checks import capturing, check_label_range, is_traced
from spo_kernels.engine.label_layout import LabelLayout


class Tokens(NamedTuple):
    """The labels that count, as ops take them: tensors whose shapes do not depend on how many there are.

    Where `listed` (0-d bool, on the CPU) is False, a CUDA graph is being recorded and how many count is not known:
    then every label is processed, and `counted` masks those that do not count.
    """

    labels: Tensor  # as given, classes in [0, V) where they count
    counted: Tensor  # labels' shape, bool
    positions: Tensor  # [labels.numel()] int64: flat places of those that count, then zeros
    total: Tensor  # how many: 0-d int64 on the CPU, so that a backward need not wait for the device to learn it again
    listed: Tensor

    @classmethod
    def all_of(cls, layout: LabelLayout, vocab: int) -> Tokens:
        """Those of every label that counts; see `find`."""
        known = layout.known_counts()
        return cls.find(layout, layout.counted(), vocab, None if known is None else sum(known))

    @classmethod
    def find(cls, layout: LabelLayout, counted: Tensor, vocab: int, count: int | None = None) -> Tokens:
        """The tokens of labels that are `counted`; `count` is their number, where the host knows it already.

        Raises:
            IndexError: A label is neither `ignore_index` nor in [0, vocab); on a GPU a device-side assertion.
        """
        labels = layout.labels
        find = find_tokens_op if is_traced(labels) else find_tokens
        return cls(labels, counted, *find(labels, counted, vocab, layout.ignore_index, count))


def find_tokens(
    labels: Tensor, counted: Tensor, vocab: int, ignore_index: int | None, count: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`Tokens.positions`, `.total` and `.listed`. Waits for a device once, where `count` is not given."""
    flat = counted.flatten()
    every = count == flat.numel()
    check_label_range(labels, vocab, None if every else ignore_index)
    if every:
        return torch.arange(flat.numel(), device=flat.device), _host(flat.numel()), _host(True)
    if count is None and capturing(counted):
        return torch.zeros_like(flat, dtype=torch.int64), _host(flat.numel()), _host(False)
    if count is None or not counted.is_cuda:
        found = flat.nonzero()[:, 0]
        count = found.numel()
        positions = found if count == flat.numel() else torch.cat([found, found.new_zeros(flat.numel() - count)])
        return positions, _host(count), _host(True)
    # places by a running count: nonzero would wait again
    spare = flat.numel()
    target = torch.where(flat, flat.cumsum(0) - 1, spare)
    positions = target.new_zeros(spare + 1).scatter_(0, target, torch.arange(spare, device=flat.device))
    return positions[:spare], _host(count), _host(True)


def _host(value: int) -> Tensor:
    """A number as an op returns it; torch.tensor would take 4 us for it."""
    return torch.scalar_tensor(value, dtype=torch.bool if isinstance(value, bool) else torch.int64)


# torch.compile(mode="reduce-overhead") records partitions of a graph without such an op: one that takes or gives a
# tensor on the CPU, whose value a replay would not see anew, or waits for the device
UNGRAPHED = torch.Tag.cudagraph_unsafe
_library = torch.library.Library("spo_kernels", "DEF")
_library.define(
    "find_tokens(Tensor labels, Tensor counted, SymInt vocab, int? ignore_index, int? count)"
    " -> (Tensor positions, Tensor total, Tensor listed)",
    tags=UNGRAPHED,
)
_library.impl("find_tokens", find_tokens, "CompositeExplicitAutograd")
find_tokens_op = torch.ops.spo_kernels.find_tokens.default


@torch.library.register_fake("spo_kernels::find_tokens", lib=_library)
def _find_tokens_fake(labels: Tensor, counted: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(labels.numel(), dtype=torch.int64, device=labels.device),
        torch.empty((), dtype=torch.int64, device="cpu"),
        torch.empty((), dtype=torch.bool, device="cpu"),
    )
