"""Softmax statistics of every token, tile by tile; with a frozen head also the gradient of their log-probabilities."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from spo_kernels.backends.contract import Tile, TokenStats
from spo_kernels.engine.head_slices import HeadSlices
from spo_kernels.engine.logit_sums import LogitSums
from spo_kernels.engine.plane import Plane, TileBuffers, label_slope, relative
from spo_kernels.engine.sparse_blocks import BlockChooser
from spo_kernels.engine.workspace import TileShape, spans


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
    buffers = TileBuffers(hidden, min(n, shape.rows), shape.columns, None if logp_grad is None else backend.products)
    stats = TokenStats.start(n, buffers.wide, moments)
    gradient = None if logp_grad is None else _LogpGrad(plane, shape, logp_grad)
    for classes, head in plane.head.pieces(shape.columns):
        here, last = replace(plane, head=head), classes.stop == plane.head.stop
        if gradient is not None:
            gradient.meet(classes, head)
        for row in spans(n, shape.rows):
            states = tokens.take(hidden, row.start, row.stop, backend.products.operand_dtype(hidden))
            part, labels = stats.rows(row.start, row.stop), relative(tokens.labels[row], classes)
            if logit_sums is not None and classes.start == 0:
                logit_sums.begin(row, states)
            for column in spans(head.vocab, shape.columns):
                tile, weight = here.tile(states, labels, column, buffers)
                if logit_sums is not None:
                    logit_sums.add(row, tile)
                if gradient is not None:
                    gradient.add(row, tile, weight, part, begun=classes.start + column.start > 0)
                else:
                    masses = None if chooser is None else chooser.masses(len(labels), column.start, column.stop)
                    backend.tile_stats(tile, part, block_lse=masses)
            if not last:
                continue
            shrink = plane.head.join_(part)
            if gradient is not None:
                gradient.finish(row, part, shrink)
            if chooser is not None:
                chooser.choose(row.start, row.stop, part, labels)
    return stats


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
        self._rescale = self._sums.new_empty(min(n, shape.rows))
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

    def add(self, row: slice, tile: Tile, weight: Tensor, stats: TokenStats, *, begun: bool) -> None:
        """Merge a tile into the statistics, and into `A` of a row of tiles where that has `begun`."""
        backend, total = self._plane.backend, self._total(row)
        rescale = self._rescale[: len(total)]
        backend.tile_stats(tile, stats, rescale=rescale)
        if begun:
            backend.scale_rows(total, rescale)
        backend.products.matmul(tile.written, weight, out=total, accumulate=begun)

    def _total(self, row: slice) -> Tensor:
        """Where `A` of a row of tiles is summed."""
        return self._sums[row] if self._streams else self._sums[: row.stop - row.start]

    def finish(self, row: slice, stats: TokenStats, shrink: Tensor | None) -> None:
        """Turn `A` into `u`; label rows are gathered in pieces no larger than a weight slice.

        `shrink` is what `A` of this process's rows is multiplied by, where others have more.
        """
        plane, total, tokens = self._plane, self._total(row), self._plane.tokens
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
