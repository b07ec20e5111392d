"""Gradients of a pair loss in three products: tiles are kept until their coefficients are known.

Tiles here are rows of the whole vocabulary, `[n, V]`; see `preference/plan.py` for which tokens share one. They keep
`exp(logit - m) d logit / d product`, with the maximum `m` so far and 0 at the label, in the dtype that the next
products take: a logit rounded to bfloat16 would cost whole percents of a probability. What is missing of a token's
gradient then is a factor for each slice, `-c exp(m - last m) / Σ`, and `c (1 - p) d logit / d product` at its label.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spo_kernels.backends.contract import Backend, Tile, TokenStats, add_at_labels_
from spo_kernels.backends.products import accumulator_dtype
from spo_kernels.engine.exact import Head, TokenRows, label_slope
from spo_kernels.engine.memory import in_huge_pages

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
    """Takes tokens through all three products with one tile, slice by slice of the vocabulary."""

    def __init__(self, hidden: Tensor, head: Head, backend: Backend, rows: int, columns: int, *, moments: bool) -> None:
        """A tile of `rows` tokens, of which `columns` are in work together."""
        self._hidden, self._head, self._backend, self._moments = hidden, head, backend, moments
        self._columns = columns
        self.rows = rows
        self._wide = accumulator_dtype(hidden.dtype)
        self._vocab = head.weight.shape[0]
        kept = backend.products.tile_dtype(hidden)
        self._kept = in_huge_pages(hidden.new_empty(rows * self._vocab, dtype=kept))
        # a slice of products before it is rounded
        self._products = None if kept == self._wide else hidden.new_empty(rows * columns, dtype=self._wide)
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
        tile = self._kept[: n * self._vocab].view(n, self._vocab)
        stats, maxima = self._keep(tokens, states, tile)
        upstream = coefficients(stats)
        share = upstream / stats.sum
        at_label = upstream * label_slope(stats, self._head.transform)
        total = None if hidden_out is None else states.new_empty(states.shape, dtype=self._wide)
        for piece, maximum in zip(self._slices(), maxima, strict=True):
            part = tile[:, piece]
            self._backend.scale_rows(part, -share * (maximum - stats.max).exp())
            add_at_labels_(part, tokens.labels - piece.start, at_label)
            if total is not None:
                products.matmul(part, self._weight(piece, states), out=total, accumulate=piece.start > 0)
            self._add(part, states, piece, sums, accumulate)
        if hidden_out is not None and total is not None:
            tokens.put(hidden_out, 0, n, total)
        return stats

    def _keep(self, tokens: TokenRows, states: Tensor, tile: Tensor) -> tuple[TokenStats, list[Tensor]]:
        """Fills the tile; statistics of the tokens, and the maxima that the slices are relative to."""
        stats = TokenStats.start(states.shape[0], states.new_empty(0, dtype=self._wide), self._moments)
        maxima, rescale = [], torch.empty_like(stats.max)
        for piece in self._slices():
            part = found = tile[:, piece]
            if self._products is not None:
                found = self._products[: part.numel()].view(part.shape)
            self._backend.products.matmul(states, self._weight(piece, states).t(), out=found)
            bias = self._head.bias_slice(piece.start, piece.stop, self._wide)
            labels = tokens.labels - piece.start
            given = Tile(found, labels, self._head.transform, bias, part)
            self._backend.tile_stats(given, stats, rescale=rescale)
            maxima.append(stats.max.clone())
        return stats, maxima

    def _add(self, operand: Tensor, states: Tensor, piece: slice, sums: GradientSums, accumulate: bool) -> None:
        """A slice of the weight's and the bias's gradient."""
        products = self._backend.products
        rounds = not accumulate and products.can_round(states, states.shape[0])
        written = (self._wide, states.dtype) if rounds else (self._wide,)
        if sums.weight is not None and sums.weight.dtype in written:
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

    def _slices(self) -> list[slice]:
        step = self._columns
        return [slice(start, min(start + step, self._vocab)) for start in range(0, self._vocab, step)]

    def _weight(self, piece: slice, states: Tensor) -> Tensor:
        return self._head.weight[piece].to(states.dtype)
