"""Which rows of the whole vocabulary can be kept until their coefficients are known, and how many bytes that takes.

Three products need a tile of the whole vocabulary for some tokens at once, and maybe accumulators of the head's
gradient. `default_bytes` is the rule for calls that give no `workspace_bytes`; docs/cost.md states it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from spo_kernels.backends.contract import MASS_BLOCK, Backend
from spo_kernels.backends.products import accumulator_dtype
from spo_kernels.engine.head_slices import HeadSlices
from spo_kernels.engine.workspace import block_columns, row_stride, whole_blocks

# CPU, where a slice's weight, products or gradient are cast, in bytes on top of the tile's. Narrower ones cost more of
# the products' packing (1024: up to 5 % more time), and more moments at which threads wait for each other: beside a
# busy process on two cores 1024 slowed a trained head 1.89 times, 2048 1.75 times (bfloat16, Intel with AVX-512)
_COLUMNS = {"cpu": 2048}
# Rows of a tile, at which going through the weight and its gradient again for every tile is cheap. GPU, by calculation:
# an accumulator's 8 bytes an element take as long as 2048 rows' product at 330 operations a byte.
_WANTED_ROWS = {"cpu": 1024, "cuda": 2048}
# With fewer it costs more than the product that is saved. CPU, measured at V = 32768, H = 1024: 450 rows lose 9 %, 1024
# win 18 %. H100, measured: 1024 rows lose 19 % (V = 256000, H = 2304), 2048 win 17 % (V = 152064, H = 3584).
_LEAST_ROWS = {"cpu": 768, "cuda": 2048}

_LEAST_ON_CPU = 256 << 20
_MOST_ON_GPU = 3 << 30


def default_bytes(head: int, gradient: int, memory: int | None) -> int:
    """The workspace of three products with one accumulator at most, where the call gives none.

    CPU (`memory` None): three times what the head and its gradient take, but 256 MiB where that is less. GPU: 3 GiB,
    but a 16th of its memory where that is less; of all of it, since a path that followed what is free would not repeat.
    """
    return max(_LEAST_ON_CPU, 3 * (head + gradient)) if memory is None else min(_MOST_ON_GPU, memory // 16)


@cache
def memory_of(device: torch.device) -> int | None:
    """All bytes of a GPU; None for a CPU."""
    return None if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory


@dataclass(frozen=True)
class KeptShape:
    """A tile over the whole vocabulary, and the bytes of all that is beside inputs, gradients and per-token values."""

    rows: int
    columns: int  # of the vocabulary, that are in work together
    bytes: int
    sum_apart: bool  # the head's gradient is summed in an accumulator of its own


@dataclass(frozen=True)
class KeptSpace:
    """What kept rows cost, and what they may."""

    allowed: int  # bytes, with one accumulator at most
    given: bool  # by the call; else each further accumulator comes on top
    direct: bool  # the weight's gradient has the accumulator's dtype, so sums can be kept in it
    vocab: int
    widest: Callable[[int], int]  # most columns in work together, by rows
    wanted_rows: int
    least_rows: int
    row_bytes: int  # of a token: its tile over the whole vocabulary, its hidden state and gradient
    column_bytes: int  # of a column in work: its weight row cast
    cast_bytes: int  # of a column in work: its gradient before the cast, unless that is summed apart or rounded at once
    cell_bytes: int  # of a column in work and one token, beside what is kept of it
    accumulator_bytes: int  # of one accumulator of the weight's gradient
    rounds: Callable[[int], bool]  # whether a product of that many tokens gives the gradient in its own dtype
    together: bool = False  # one tile has all tokens: it waits for the backward, which adds to the head's gradient

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        head: HeadSlices,
        backend: Backend,
        workspace_bytes: int | None,
        *,
        adds_to_grad: bool = False,
        temporaries: float | None = None,
        memory: int | None = None,
    ) -> KeptSpace:
        """For this head and these hidden states; `temporaries` as in `plan_tiles`, `memory` of a GPU not here."""
        wide, products, device = accumulator_dtype(hidden.dtype), backend.products, hidden.device
        narrow, kept = products.operand_dtype(hidden).itemsize, products.tile_dtype(hidden)
        vocab, width, trained, stored = head.widest, head.width, head.trained_width, head.weight_bytes
        given, stride = workspace_bytes is not None, row_stride(vocab, device.type)
        if workspace_bytes is None:
            sizes = vocab * width * stored, vocab * trained * stored
            workspace_bytes = default_bytes(*sizes, memory_of(device) if memory is None else memory)
        cell = backend.cell_bytes(hidden, temporaries) - kept.itemsize
        columns = partial(block_columns, device.type, vocab, exponentials=True) if kept != wide else lambda rows: vocab
        copied = head.copied_bytes(narrow)
        # Products are the faster the wider they are, where that takes no more memory: with all of V at once a trained
        # head takes 0.83 to 0.89 of the time in torch's products, 0.91 to 0.92 in the library's own (float32, three
        # shapes, Intel with AVX-512); as long in torch's on AMD Zen 3
        cast = copied > 0 or kept != wide or stored != wide.itemsize
        most = _COLUMNS.get(device.type, vocab) if cast else vocab
        return cls(
            allowed=workspace_bytes,
            given=given,
            direct=stored == wide.itemsize,
            vocab=vocab,
            widest=lambda rows: whole_blocks(min(columns(rows), most), vocab),
            wanted_rows=_WANTED_ROWS.get(device.type, _WANTED_ROWS["cuda"]),
            least_rows=_LEAST_ROWS.get(device.type, _LEAST_ROWS["cuda"]),
            row_bytes=stride * kept.itemsize
            + (stride - vocab) * cell
            + width * (wide.itemsize + narrow)
            + products.row_bytes,
            column_bytes=width * copied,
            cast_bytes=trained * wide.itemsize,
            cell_bytes=cell,
            accumulator_bytes=vocab * trained * wide.itemsize,
            rounds=(lambda rows: False) if adds_to_grad else partial(products.can_round, hidden),
            together=adds_to_grad,
        )

    def budget(self, accumulators: int) -> int:
        """The bytes that a way with that many accumulators may take."""
        return self.allowed + (0 if self.given else max(0, accumulators - 1) * self.accumulator_bytes)

    def rows(self, accumulators: int) -> int:
        """Most tokens whose tiles fit beside that many `[V, H]` accumulators, with few columns in work."""
        left = self.budget(accumulators) - accumulators * self.accumulator_bytes - self._narrowest * self.column_bytes
        return max(0, left) // (self.row_bytes + self._narrowest * self.cell_bytes)

    def shape(self, rows: int, accumulators: int, *, sum_apart: bool) -> KeptShape | None:
        """That many rows, with the most columns in work that fit; None where too few do."""
        fixed = accumulators * self.accumulator_bytes + rows * self.row_bytes
        casts = not (self.direct or sum_apart or self.rounds(rows))
        column = self.column_bytes + rows * self.cell_bytes + (self.cast_bytes if casts else 0)
        left = self.budget(accumulators) - fixed
        widest = self.widest(rows)
        columns = whole_blocks(min(widest, max(left, 0) // column) if column else widest, self.vocab)
        if left < 0 or columns < self._narrowest:
            return None
        return KeptShape(rows, columns, fixed + columns * column, sum_apart)

    @property
    def _narrowest(self) -> int:
        return min(self.widest(self.wanted_rows), MASS_BLOCK)


# tokens in groups of at most so many, each of which keeps its rows together; a group is one or more indivisible parts
Groups = Callable[[int], Sequence[range]]


def plan_groups(
    space: KeptSpace, tokens: int, largest: int, groups: Groups, least_rows: int
) -> tuple[Sequence[range], KeptShape] | None:
    """The groups of tokens, and their tile, that take the fewest bytes; None where nothing fits.

    All together, or in groups of the wanted size, or of what fits where that is less, as even as can be. `largest` is
    that of the largest part; groups have `least_rows` tokens or more in the mean, unless there is one, which with
    `space.together` is the only way.
    """
    found: list[tuple[Sequence[range], KeptShape]] = []
    shape = space.shape(tokens, 0, sum_apart=False)
    if shape is not None:
        found.append((groups(tokens), shape))
    apart = not space.direct
    rows = min(max(space.wanted_rows, largest), space.rows(int(apart)))
    count = min(len(groups(rows)), tokens // least_rows) if rows >= largest else 0
    if count > 1 and not space.together:
        sizes = range(max(largest, -(-tokens // count)), tokens)
        even = sizes[bisect_left(sizes, True, key=lambda size: len(groups(size)) <= count)]
        shape = space.shape(even, int(apart), sum_apart=apart)
        if shape is not None:
            found.append((groups(even), shape))
    return min(found, key=lambda way: way[1].bytes, default=None)
