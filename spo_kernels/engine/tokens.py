"""Which labels count, where their tokens lie in hidden, and where results go back: derived here, once a call."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from spo_kernels.backends.products import Products
from spo_kernels.engine.checks import (
    can_look,
    capturing,
    check_cu_seqlens,
    check_int,
    check_label_range,
    check_labels,
    is_traced,
)
from spo_kernels.engine.collectives import check_same, largest, summed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class LabelLayout:
    """Labels as the caller gave them, checked: padded `[..., T]`, or packed `[N]` with the bounds of sequences.

    With a group, the other tokens of each sequence lie on its other processes; see `LMHead.sequence_group`.
    """

    labels: Tensor
    ignore_index: int | None  # None: every label counts
    shift: bool  # position t of hidden predicts label t + 1 of its sequence
    cu_seqlens: Tensor | None = None  # [S + 1], taken to labels' device
    group: ProcessGroup | None = None
    bounds: list[int] | None = field(init=False, default=None)  # cu_seqlens, where the host has them

    def __post_init__(self) -> None:
        check_labels(self.labels, self.shift)
        if self.ignore_index is not None:
            check_int("ignore_index", self.ignore_index)
        given = self.cu_seqlens
        if given is not None:
            check_cu_seqlens(given, self.labels)
            if can_look(given):
                object.__setattr__(self, "bounds", given.tolist())
            if given.device != self.labels.device:
                # the copy need not wait for what the device does: the values are read before this returns
                object.__setattr__(self, "cu_seqlens", given.to(self.labels.device, non_blocking=True))
        if self.group is not None:
            self._check_group(self.group)

    def _check_group(self, group: ProcessGroup) -> None:
        if is_traced(self.labels) or capturing(self.labels):
            raise RuntimeError("head has a sequence_group, which is not traced or recorded in a CUDA graph")
        if self.shift:
            raise ValueError(
                "shift: head has a sequence_group, and the label after a process's last token lies on another: shift "
                "labels before sequences are split, and pass shift=False"
            )
        check_same(group, "head's sequence_group", {"the number of sequences": self.sequences}, self.labels.device)

    def check_sequences(self, shape: str) -> None:
        """Raise ValueError unless labels are sequences: `[shape]` padded, or packed."""
        if self.cu_seqlens is None and self.labels.ndim != 2:
            raise ValueError(f"labels must be [{shape}], or [N] with cu_seqlens; got {list(self.labels.shape)}")

    @property
    def sequences(self) -> int:
        """How many sequences there are."""
        return self.labels.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    def check_pairs(self) -> int:
        """The number of pairs B of B chosen sequences and then B rejected ones.

        Raises:
            ValueError: There is an odd number of sequences, or labels are no sequences.
        """
        self.check_sequences("2B, T")
        if self.sequences % 2:
            name = "labels" if self.cu_seqlens is None else "cu_seqlens"
            raise ValueError(
                f"{name} must hold an even number of sequences, B chosen ones, then B rejected ones; "
                f"got {self.sequences}"
            )
        return self.sequences // 2

    def counted(self) -> Tensor:
        """`[labels' shape]` bool: labels that have a log-probability. With `shift` a sequence's first has none."""
        if self.ignore_index is None:
            counted = torch.ones_like(self.labels, dtype=torch.bool)
        else:
            counted = self.labels != self.ignore_index
        if self.shift and self.cu_seqlens is None:
            counted[..., :1] = False
        elif self.shift and self.cu_seqlens is not None:
            # a start equal to N belongs to an empty last sequence and lands in the spare place
            first = counted.new_zeros(counted.numel() + 1)
            first[self.cu_seqlens[:-1].long()] = True
            counted &= ~first[:-1]
        return counted

    def count(self, counted: Tensor) -> Tensor:
        """How many of each sequence's labels here are `counted`: `[S]` int64."""
        if self.cu_seqlens is None:
            return counted.sum(-1)
        ends = torch.nn.functional.pad(counted.cumsum(0), (1, 0))
        return ends[self.cu_seqlens.long()].diff()

    def widths(self) -> list[int] | None:
        """All labels of each sequence, whether they count or not; None where the host does not have the bounds."""
        if self.bounds is not None:
            return [stop - start for start, stop in pairwise(self.bounds)]
        if self.cu_seqlens is not None:
            return None
        *rows, width = self.labels.shape or (1,)
        return [width] * prod(rows)

    def known_counts(self) -> list[int] | None:
        """`count`, where it does not depend on labels and the host has the bounds: nothing is waited for."""
        lengths = None if self.ignore_index is not None else self.widths()
        if lengths is None or not self.shift:
            return lengths
        return [max(length - 1, 0) for length in lengths]

    def sum(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sums of `values` (or of `values * weights`), shaped like labels, over each sequence: `[S]`."""
        if self.group is None:
            return self.sum_here(values, weights)
        # rounded once, as the sum of one process is
        return self.joined(self.sum_here(values.double(), weights)).to(values.dtype)

    def sum_here(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """The same over this process's tokens."""
        return sum_sequences(values, self.cu_seqlens, weights)

    def joined(self, values: Tensor) -> Tensor:
        """What each process has of a sum, as the sum, differentiable."""
        return values if self.group is None else summed(values, self.group)

    def largest(self, values: Tensor) -> Tensor:
        """The largest that any process has, element by element."""
        return values if self.group is None else largest(values, self.group)


def sum_sequences(values: Tensor, cu_seqlens: Tensor | None, weights: Tensor | None = None) -> Tensor:
    """Sums (with `weights`, of `values * weights`) over the last dimension, or over the segments of `cu_seqlens`.

    Summed in float64: in float32, 512 log-probabilities in a row lose up to 0.004 nat. Deterministic.
    """
    if cu_seqlens is not None:
        return sum_segments(values, cu_seqlens.diff().long(), weights)
    if weights is not None:
        return (values.double() * weights).sum(-1).to(values.dtype)
    return values.sum(-1, dtype=torch.float64).to(values.dtype)


def sum_segments(values: Tensor, lengths: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums over consecutive segments of the given lengths, in float64 like `sum_sequences`."""
    wide = values.double() if weights is None else values.double() * weights
    return torch.segment_reduce(wide, "sum", lengths=lengths, initial=0.0, unsafe=True).to(values.dtype)


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


@dataclass(frozen=True)
class TokenRows:
    """The tokens that count: `rows` index hidden (None: all of it, in order), `labels` are their targets.

    With `mask`, tokens where it is False are among them: they read and write zeros.
    """

    rows: Tensor | None
    labels: Tensor  # [n]
    mask: Tensor | None = None  # [n], bool
    places: Tensor | None = None  # flat places in labels, where values come from and results go; None: as labels lie

    @classmethod
    def of(cls, tokens: Tokens, shift: bool, first: int = 0) -> TokenRows:
        """The tokens that predict the labels that count; classes are counted from `first`."""
        # tiles take a contiguous vector, and flatten() leaves a strided one as it is
        flat, count = tokens.labels.flatten().contiguous(), int(tokens.total)
        flat = flat - first if first else flat
        if not tokens.listed:
            # a permutation, so that each row is written once: the labels that wrap around do not count
            rows = torch.arange(count, device=flat.device).roll(1) if shift else None
            mask = tokens.counted.flatten()
            return cls(rows, flat.masked_fill(~mask, 0), mask)
        if count == flat.numel():
            return cls(None, flat)
        places = tokens.positions[:count]
        return cls(places - 1 if shift else places, flat[places], places=places)

    @property
    def count(self) -> int:
        """How many there are."""
        return self.labels.numel()

    @property
    def fills(self) -> bool:
        """Whether together they write every row of hidden."""
        return self.rows is None or self.mask is not None

    def part(self, start: int, stop: int) -> TokenRows:
        """The tokens start..stop, listed."""
        rows = torch.arange(start, stop, device=self.labels.device) if self.rows is None else self.rows[start:stop]
        return TokenRows(rows, self.labels[start:stop], None if self.mask is None else self.mask[start:stop])

    def take(self, hidden: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Hidden states of tokens start..stop in the dtype of the products."""
        if self.rows is None:
            chosen = hidden if stop - start == len(hidden) else hidden[start:stop]
        else:
            chosen = hidden[self.rows if stop - start == self.count else self.rows[start:stop]]
        return self._masked(chosen, start, stop).to(dtype)

    def operand(self, hidden: Tensor, part: slice | Tensor, products: Products) -> tuple[Tensor, Tensor | None]:
        """Hidden states of some tokens as products take them: copied, or `hidden` and the list of its rows."""
        dtype = products.operand_dtype(hidden)
        if isinstance(part, slice):
            return self.take(hidden, part.start, part.stop, dtype), None
        rows = part if self.rows is None else self.rows[part]
        return (hidden, rows) if products.reads_row_lists(hidden) else (hidden[rows].to(dtype), None)

    def put(self, out: Tensor, start: int, stop: int, values: Tensor) -> None:
        """Write per-token rows to where `take` reads them."""
        values = self._masked(values, start, stop)
        if self.rows is None:
            out[start:stop] = values
        else:
            out[self.rows[start:stop]] = values.to(out.dtype)

    def gather(self, values: Tensor) -> Tensor:
        """Per-label values of the tokens, `[n]`."""
        flat = values.reshape(-1)
        if self.mask is not None:
            return self.masked(flat)
        # an expanded gradient, as sum() sends it, has stride 0
        return flat.contiguous() if self.places is None else flat[self.places]

    def spread(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Per-token values back at their labels' places, zero elsewhere."""
        if self.mask is not None:
            return self.masked(values).view(shape)
        if self.places is None:
            return values.view(shape)
        out = values.new_zeros(shape)
        out.view(-1)[self.places] = values
        return out

    def masked(self, values: Tensor) -> Tensor:
        """Per-token values `[n]`, 0 where a token does not count."""
        return values if self.mask is None else values.masked_fill(~self.mask, 0)

    def _masked(self, values: Tensor, start: int, stop: int) -> Tensor:
        return values if self.mask is None else values.masked_fill(~self.mask[start:stop, None], 0.0)
