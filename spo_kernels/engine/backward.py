"""Gradients by recomputing logits, vocabulary slice by slice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo_kernels.backends.contract import Tile, TokenGrads
from spo_kernels.backends.products import headroom
from spo_kernels.engine.gradients import HeadGradient
from spo_kernels.engine.plane import Plane, TileBuffers, relative
from spo_kernels.engine.workspace import TileShape, spans

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
    buffers = TileBuffers(hidden, min(n, shape.rows), shape.columns, products)
    unit = None
    if buffers.narrow is not None and buffers.narrow.dtype == torch.float16:
        unit = headroom(list(grads.upstream().values()), head.transform.scale)
        grads = grads if unit is None else grads.scale_upstream(1.0 / unit)
    allocate = hidden.new_empty if slices is None else hidden.new_zeros
    hidden_sum = None if hidden_out is None else allocate((n, hidden.shape[1]), dtype=plane.wide)
    weight_sum = head.collect(head_out, products, plane.wide, shape.columns)
    at_hand: slice | Tensor | None = None  # whose states were gathered last
    states, listed = hidden[:0], None
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
            # one tile of rows has the same for every slice
            if not (isinstance(part, slice) and part == at_hand):
                del states  # before others are gathered
                at_hand, (states, listed) = part, tokens.operand(hidden, part, products)
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
