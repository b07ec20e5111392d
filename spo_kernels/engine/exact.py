"""Walks tiles of the (token, vocabulary) plane, forward and backward, with one tile of workspace.

Tokens here are those that count: `rows[i]` is the row of `hidden` that predicts `labels[i]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spo_kernels.backends.contract import Backend, LogitTransform, Tile, TokenGrads, TokenStats
from spo_kernels.backends.products import Products, accumulator_dtype, headroom
from spo_kernels.engine.gradients import HeadGradient
from spo_kernels.engine.head_slices import HeadSlices
from spo_kernels.engine.logit_sums import LogitSums
from spo_kernels.engine.sparse_blocks import BlockChooser
from spo_kernels.engine.tokens import TokenRows
from spo_kernels.engine.workspace import TileShape, spans


@dataclass(frozen=True)
class Plane:
    """What is walked: every token that counts with every column of the head, and who computes."""

    hidden: Tensor  # [rows, H]
    head: HeadSlices
    tokens: TokenRows
    backend: Backend

    @property
    def wide(self) -> torch.dtype:
        """The dtype of products, statistics and sums."""
        return accumulator_dtype(self.hidden.dtype)


class TileBuffers:
    """One tile of products and, where the next product takes narrower operands, one of those; used over and over."""

    def __init__(self, hidden: Tensor, cells: int, products: Products | None) -> None:
        """Without `products`, tiles enter no other product."""
        self.wide = hidden.new_empty(cells, dtype=accumulator_dtype(hidden.dtype))
        self.narrow: Tensor | None = None
        if products is not None and products.tile_dtype(hidden) != self.wide.dtype:
            self.narrow = hidden.new_empty(cells, dtype=products.tile_dtype(hidden))

    def tile(self, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
        """The products' tile, and what a tile pass is to write instead of it."""
        cells = rows * columns
        out = None if self.narrow is None else self.narrow[:cells].view(rows, columns)
        return self.wide[:cells].view(rows, columns), out


def forward(
    plane: Plane,
    shape: TileShape,
    *,
    moments: bool,
    logp_grad: Tensor | None,
    chooser: BlockChooser | None = None,
    logit_sums: LogitSums | None = None,
) -> TokenStats:
    """Softmax statistics of every token: one product; with `logp_grad`, two.

    `chooser` is shown the masses of vocabulary blocks, not together with `logp_grad`; `logit_sums` the tiles.

    `logp_grad` (hidden's shape) receives `u = d logp / d hidden`, from the running sum
    `A = Σ_{v≠label} exp(logit_v - max) logit'_v W_v` that is rescaled whenever the maximum moves:
    `u = logit'_label (1 - p_label) W_label - A / Σ exp`.
    """
    hidden, tokens, backend = plane.hidden, plane.tokens, plane.backend
    n = tokens.count
    cells = min(n, shape.rows) * shape.columns
    buffers = TileBuffers(hidden, cells, None if logp_grad is None else backend.products)
    stats = TokenStats.start(n, buffers.wide, moments)
    gradient = None if logp_grad is None else _LogpGrad(plane, shape, logp_grad)
    for classes, head in plane.head.pieces(shape.columns):
        here = replace(plane, head=head)
        if gradient is not None:
            gradient.meet(classes, head)
        for row in spans(n, shape.rows):
            states = tokens.take(hidden, row.start, row.stop, backend.products.operand_dtype(hidden))
            part, labels = stats.rows(row.start, row.stop), relative(tokens.labels[row], classes)

            def see(tile: Tile, row: slice = row) -> None:
                if logit_sums is not None:
                    logit_sums.add(row, tile)

            if logit_sums is not None and classes.start == 0:
                logit_sums.begin(row, states)
            if gradient is None:
                _statistics(here, states, labels, part, buffers, shape, chooser, see)
            else:
                total, begun = gradient.total(row), classes.start > 0
                _weighted_rows(here, states, labels, part, total, buffers, shape, see, begun=begun)
            if classes.stop < plane.head.stop:
                continue
            shrink = plane.head.join_(part)
            if gradient is not None:
                gradient.finish(row, part, shrink)
            if chooser is not None:
                chooser.choose(row.start, row.stop, part, labels)
    return stats


def _statistics(
    plane: Plane,
    states: Tensor,
    labels: Tensor,
    stats: TokenStats,
    buffers: TileBuffers,
    shape: TileShape,
    chooser: BlockChooser | None,
    see: Callable[[Tile], None],
) -> None:
    """Merge all columns into the statistics of a row of tiles."""
    head, backend = plane.head, plane.backend
    for column in spans(head.vocab, shape.columns):
        products, _ = buffers.tile(len(labels), column.stop - column.start)
        backend.products.matmul(states, head.rows(column, states.dtype).t(), out=products)
        tile = Tile(products, relative(labels, column), head.transform, head.bias_rows(column, plane.wide))
        see(tile)
        masses = None if chooser is None else chooser.masses(len(labels), column.start, column.stop)
        backend.tile_stats(tile, stats, block_lse=masses)


def _weighted_rows(
    plane: Plane,
    states: Tensor,
    labels: Tensor,
    stats: TokenStats,
    total: Tensor,
    buffers: TileBuffers,
    shape: TileShape,
    see: Callable[[Tile], None],
    *,
    begun: bool,
) -> None:
    """The same, and the sum `A` of `forward` for a row of tiles: added to `total` where that has `begun`."""
    head, backend = plane.head, plane.backend
    rescale = states.new_empty(len(labels), dtype=plane.wide)
    for column in spans(head.vocab, shape.columns):
        weight = head.rows(column, states.dtype)
        products, out = buffers.tile(len(labels), column.stop - column.start)
        backend.products.matmul(states, weight.t(), out=products)
        tile = Tile(products, relative(labels, column), head.transform, head.bias_rows(column, plane.wide), out)
        see(tile)
        backend.tile_stats(tile, stats, rescale=rescale)
        if begun:
            backend.scale_rows(total, rescale)
        backend.products.matmul(tile.written, weight, out=total, accumulate=begun)
        begun = True


class _LogpGrad:
    """`logp_grad` while it is made, see `forward`: from `A` of a row of tiles at a time.

    Where the head is streamed, a slice meets all tokens before the next comes: `A` of all of them is kept, and the rows
    `W_label` wait in `logp_grad` itself.
    """

    def __init__(self, plane: Plane, shape: TileShape, out: Tensor) -> None:
        self._plane, self._out, self._step, self._streams = plane, out, shape.columns, plane.head.streams
        n, width = plane.tokens.count, plane.hidden.shape[1]
        kept = n if self._streams else min(n, shape.rows)
        self._sums = plane.hidden.new_empty((kept, width), dtype=plane.wide)
        if self._streams:
            self._of_pieces = plane.head.tokens_of_pieces(plane.tokens.labels, shape.columns)

    def meet(self, classes: slice, head: HeadSlices) -> None:
        """The next of the head's pieces, with its classes."""
        if not self._streams:
            return
        tokens = self._plane.tokens
        for some in next(self._of_pieces).split(self._step):
            rows = head.label_rows(relative(tokens.labels[some], classes), self._out.dtype)
            self._out[some if tokens.rows is None else tokens.rows[some]] = rows

    def total(self, row: slice) -> Tensor:
        """Where `A` of a row of tiles is summed."""
        return self._sums[row] if self._streams else self._sums[: row.stop - row.start]

    def finish(self, row: slice, stats: TokenStats, shrink: Tensor | None) -> None:
        """Turn `A` into `u`; label rows are gathered in pieces no larger than a weight slice.

        `shrink` is what `A` of this process's rows is multiplied by, where others have more.
        """
        plane, total, tokens = self._plane, self.total(row), self._plane.tokens
        if shrink is not None:
            plane.backend.scale_rows(total, shrink)
        total.div_(stats.sum[:, None]).neg_()
        coefficient = label_slope(stats, plane.head.transform)
        for piece in spans(len(total), self._step):
            start, stop = row.start + piece.start, row.start + piece.stop
            if self._streams:
                rows = tokens.take(self._out, start, stop, plane.wide)
            else:
                rows = plane.head.label_rows(tokens.labels[start:stop], plane.wide)
            total[piece].addcmul_(coefficient[piece, None], rows)
        tokens.put(self._out, row.start, row.stop, plane.head.sum_(total))


def relative(labels: Tensor, columns: slice) -> Tensor:
    """Labels counted from the first of some columns."""
    return labels - columns.start if columns.start else labels


def label_slope(stats: TokenStats, transform: LogitTransform) -> Tensor:
    """d logp / d product at each token's label, `(1 - p) d logit / d product`."""
    # not by way of the log-sum-exp, whose rounding a confident token's 1 - p would feel
    rest = torch.expm1(stats.label_logit - stats.max - stats.sum.log()).mul_(-transform.scale)
    return rest if transform.softcap is None else rest * (1.0 - (stats.label_logit / transform.softcap).square())


# tokens of a tile, as consecutive ones or listed, and what their upstream gradients are multiplied by
Part = tuple[slice | Tensor, Tensor | None]


@dataclass(frozen=True)
class VocabularySlice:
    """A slice of the vocabulary, and the tokens that it is multiplied with, tile by tile; no token twice."""

    columns: slice
    parts: Sequence[Part]

    @property
    def single_tile(self) -> int | None:
        """How many tokens there are, if one tile holds them."""
        if len(self.parts) != 1:
            return None
        part = self.parts[0][0]
        return part.stop - part.start if isinstance(part, slice) else part.numel()


def every_slice(tokens: int, vocab: int, shape: TileShape) -> Iterator[VocabularySlice]:
    """All tokens with all columns of so many."""
    rows: list[Part] = [(part, None) for part in spans(tokens, shape.rows)]
    for columns in spans(vocab, shape.columns):
        yield VocabularySlice(columns, rows)


def backward(
    plane: Plane,
    grads: TokenGrads,
    shape: TileShape,
    hidden_out: Tensor | None,
    head_out: HeadGradient,
    slices: Iterable[VocabularySlice] | None = None,
) -> None:
    """Gradients by recomputing logits, vocabulary slice by slice: one product, and one per matrix gradient.

    A slice of the weight's gradient is finished before the next begins, so no `[V, H]` accumulator exists;
    hidden's gradient is accumulated over slices in the accumulator dtype. `slices` (default: `every_slice`) covers
    the vocabulary in order with tiles no larger than `shape`; those of a head that is streamed are its pieces.
    """
    hidden, head, tokens, products = plane.hidden, plane.head, plane.tokens, plane.backend.products
    n, narrow = tokens.count, products.operand_dtype(hidden)
    buffers = TileBuffers(hidden, min(n, shape.rows) * shape.columns, products)
    unit = None
    if buffers.narrow is not None and buffers.narrow.dtype == torch.float16:
        unit = headroom(list(grads.upstream().values()), head.transform.scale)
        grads = grads if unit is None else grads.scale_upstream(1.0 / unit)
    allocate = hidden.new_empty if slices is None else hidden.new_zeros
    hidden_sum = None if hidden_out is None else allocate((n, hidden.shape[1]), dtype=plane.wide)
    weight_sum = head.collect(head_out, products, plane.wide, shape.columns)
    walk = (
        (classes.start, rows, piece)
        for classes, rows in head.pieces(shape.columns)
        for piece in (every_slice(n, rows.vocab, shape) if slices is None else slices)
    )
    for start, rows, piece in walk:
        weight, bias = rows.rows(piece.columns, narrow), rows.bias_rows(piece.columns, plane.wide)
        columns = slice(start + piece.columns.start, start + piece.columns.stop)
        weight_sum.begin(columns, weight, piece.single_tile)
        for part, factors in piece.parts:
            states, listed = tokens.operand(hidden, part, products)
            labels = relative(tokens.labels[part], columns)
            found, out = buffers.tile(len(labels), columns.stop - columns.start)
            products.matmul(states, weight.t(), out=found, a_rows=listed)
            tile = Tile(found, labels, head.transform, bias, out)
            upstream = grads.map(lambda values, part=part: values[part])  # type: ignore[misc]
            plane.backend.tile_grad(tile, upstream if factors is None else upstream.scale_upstream(factors))
            weight_sum.add(tile.written, states, listed)
            if hidden_sum is None:
                continue
            if isinstance(part, slice):
                products.matmul(tile.written, weight, out=hidden_sum[part], accumulate=columns.start > 0)
            else:
                products.matmul(tile.written, weight, out=hidden_sum, accumulate=True, out_rows=part)
        weight_sum.finish(unit)
    weight_sum.close()
    if hidden_out is not None and hidden_sum is not None:
        hidden_sum = head.sum_(hidden_sum)
        tokens.put(hidden_out, 0, n, hidden_sum if unit is None else hidden_sum.mul_(unit))
