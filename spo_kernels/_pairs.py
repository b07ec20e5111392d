"""Gradients of a pair loss in three products: logits tiles are kept until their coefficients are known.

Tiles here are rows of the whole vocabulary, `[n, V]`; see `paths.py` for which tokens share one.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from spo_kernels._backend import Backend
from spo_kernels._driver import Head, TokenRows, operand_buffer
from spo_kernels._memory import in_huge_pages
from spo_kernels._products import accumulator_dtype
from spo_kernels.tiles.spec import LogitTransform, TokenGrads, TokenStats

# statistics of a tile's tokens to the coefficients that scale the gradients of their log-probabilities
Coefficients = Callable[[TokenStats], Tensor]


@dataclass(frozen=True)
class GradientSums:
    """Where gradients are accumulated; None where they are not wanted. `weight` and `bias` are `[V, H]` and `[V]`."""

    weight: Tensor | None
    bias: Tensor | None

    def zero_(self) -> None:
        """Set to zero."""
        for value in (self.weight, self.bias):
            if value is not None:
                value.zero_()

    def scale_(self, factor: Tensor) -> None:
        """Multiply by a 0-d tensor."""
        for value in (self.weight, self.bias):
            if value is not None:
                value.mul_(factor)

    def add_(self, other: "GradientSums", factor: Tensor) -> None:
        """Add `factor * other`; `other` is spent."""
        other.scale_(factor)
        for value, more in ((self.weight, other.weight), (self.bias, other.bias)):
            if value is not None and more is not None:
                value.add_(more)


class KeptTiles:
    """Takes tokens through all three products with one tile of logits, slice by slice of the vocabulary."""

    def __init__(self, hidden: Tensor, head: Head, backend: Backend, rows: int, columns: int, *, moments: bool) -> None:
        """A tile of `rows` tokens, of which `columns` are in work together."""
        self._hidden, self._head, self._backend, self._moments = hidden, head, backend, moments
        self._columns = columns
        self.rows = rows
        self._wide = accumulator_dtype(hidden.dtype)
        self._vocab = head.weight.shape[0]
        self._tile = in_huge_pages(hidden.new_empty(rows * self._vocab, dtype=self._wide))
        # a slice of the gradient by logits as the next products take it, where that is not the tile's own
        self._narrow = operand_buffer(hidden, rows * columns, backend.products)
        # a slice of the weight's gradient before it is cast
        self._finished: Tensor | None = None

    def run(
        self,
        tokens: TokenRows,
        coefficients: Coefficients,
        sums: GradientSums,
        hidden_out: Tensor | None,
        *,
        accumulate: bool,
    ) -> TokenStats:
        """Statistics of the tokens, and `Σ coefficient * d logp` into `sums` and `hidden_out`.

        `sums.weight` may be in the weight's own dtype where nothing is accumulated.
        """
        n, products, tiles = tokens.labels.numel(), self._backend.products, self._backend.tiles
        states = tokens.take(self._hidden, 0, n, products.operand_dtype(self._hidden))
        tile = self._tile[: n * self._vocab].view(n, self._vocab)
        stats = TokenStats.start(n, tile, self._moments)
        for piece in self._slices():
            part = tile[:, piece]
            products.matmul(states, self._weight(piece, states).t(), out=part)
            tiles.tile_stats(part, *self._logits_of(piece, tokens), stats, None)
        grads = TokenGrads(lse_value=stats.lse, logp=coefficients(stats))
        total = None if hidden_out is None else states.new_empty(states.shape, dtype=self._wide)
        for piece in self._slices():
            part = operand = tile[:, piece]
            if self._narrow is not None:
                operand = self._narrow[: part.numel()].view(part.shape)
            tiles.tile_grad(part, *self._logits_of(piece, tokens), grads, operand)
            if total is not None:
                products.matmul(operand, self._weight(piece, states), out=total, accumulate=piece.start > 0)
            self._add(operand, states, piece, sums, accumulate)
        if hidden_out is not None and total is not None:
            tokens.put(hidden_out, 0, n, total)
        return stats

    def _add(self, operand: Tensor, states: Tensor, piece: slice, sums: GradientSums, accumulate: bool) -> None:
        """A slice of the weight's and the bias's gradient."""
        products = self._backend.products
        if sums.weight is not None and sums.weight.dtype == self._wide:
            products.matmul(operand.t(), states, out=sums.weight[piece], accumulate=accumulate)
        elif sums.weight is not None:
            if self._finished is None:
                self._finished = states.new_empty((self._columns, states.shape[1]), dtype=self._wide)
            finished = self._finished[: piece.stop - piece.start]
            products.matmul(operand.t(), states, out=finished)
            sums.weight[piece] = finished
        if sums.bias is not None:
            column_sums = operand.sum(0, dtype=self._wide)
            sums.bias[piece] = sums.bias[piece] + column_sums if accumulate else column_sums

    def _logits_of(self, piece: slice, tokens: TokenRows) -> tuple[Tensor | None, Tensor, LogitTransform]:
        """What makes logits of a slice's products, and the labels relative to it."""
        bias = self._head.bias_slice(piece.start, piece.stop, self._wide)
        return bias, tokens.labels - piece.start, self._head.transform

    def _slices(self) -> list[slice]:
        step = self._columns
        return [slice(start, min(start + step, self._vocab)) for start in range(0, self._vocab, step)]

    def _weight(self, piece: slice, states: Tensor) -> Tensor:
        return self._head.weight[piece].to(states.dtype)
