"""Gradients of a pair loss in three products: logits tiles are kept until their coefficients are known.

Tiles here are rows of the whole vocabulary, `[n, V]`; see `paths.py` for which tokens share one.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from spo_kernels._backend import Backend
from spo_kernels._driver import Head, TileBuffers, TokenRows
from spo_kernels._memory import in_huge_pages
from spo_kernels._products import accumulator_dtype
from spo_kernels.tiles.spec import TokenGrads, TokenStats

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
    """Takes tokens through all three products with one tile of logits."""

    def __init__(self, hidden: Tensor, head: Head, backend: Backend, rows: int, columns: int, *, moments: bool) -> None:
        """A tile of `rows` tokens; the weight is cast, and its gradient finished, `columns` rows at a time."""
        self._hidden, self._head, self._backend, self._moments = hidden, head, backend, moments
        self._columns = columns
        self.rows = rows
        self._wide = accumulator_dtype(hidden.dtype)
        self._vocab = head.weight.shape[0]
        self._buffers = TileBuffers(hidden, rows * self._vocab, backend.products)
        for buffer in (self._buffers.wide, self._buffers.narrow):
            if buffer is not None:
                in_huge_pages(buffer)
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
        n, products = tokens.labels.numel(), self._backend.products
        states = tokens.take(self._hidden, 0, n, products.operand_dtype(self._hidden))
        tile, out = self._buffers.tile(n, self._vocab)
        for piece in self._slices():
            products.matmul(states, self._weight(piece, states).t(), out=tile[:, piece])
        stats = TokenStats.start(n, tile, self._moments)
        bias = self._head.bias_slice(0, self._vocab, self._wide)
        tiles, transform = self._backend.tiles, self._head.transform
        tiles.tile_stats(tile, bias, tokens.labels, transform, stats, None)
        grads = TokenGrads(lse_value=stats.lse, logp=coefficients(stats))
        tiles.tile_grad(tile, bias, tokens.labels, transform, grads, out)
        self._multiply(tile if out is None else out, states, tokens, sums, hidden_out, accumulate)
        return stats

    def _multiply(
        self,
        tile: Tensor,
        states: Tensor,
        tokens: TokenRows,
        sums: GradientSums,
        hidden_out: Tensor | None,
        accumulate: bool,
    ) -> None:
        products = self._backend.products
        total = None if hidden_out is None else states.new_empty(states.shape, dtype=self._wide)
        for piece in self._slices():
            if total is not None:
                products.matmul(tile[:, piece], self._weight(piece, states), out=total, accumulate=piece.start > 0)
            if sums.weight is None:
                continue
            if sums.weight.dtype == self._wide:
                products.matmul(tile[:, piece].t(), states, out=sums.weight[piece], accumulate=accumulate)
            else:
                if self._finished is None:
                    self._finished = states.new_empty((self._columns, states.shape[1]), dtype=self._wide)
                finished = self._finished[: piece.stop - piece.start]
                products.matmul(tile[:, piece].t(), states, out=finished)
                sums.weight[piece] = finished
        if sums.bias is not None:
            column_sums = tile.sum(0, dtype=self._wide)
            sums.bias.add_(column_sums) if accumulate else sums.bias.copy_(column_sums)
        if hidden_out is not None and total is not None:
            tokens.put(hidden_out, 0, total.shape[0], total)

    def _slices(self) -> list[slice]:
        step = self._columns
        return [slice(start, min(start + step, self._vocab)) for start in range(0, self._vocab, step)]

    def _weight(self, piece: slice, states: Tensor) -> Tensor:
        return self._head.weight[piece].to(states.dtype)
