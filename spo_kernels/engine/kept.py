"""Gradients of a pair loss in three products: tiles are kept until their coefficients are known.

Tiles here are rows of the whole vocabulary, `[n, V]`; see `preference/plan.py` for which tokens share one. They keep
`exp(logit - m) d logit / d product`, with the maximum `m` so far and 0 at the label, in the dtype that the next
products take: a logit rounded to bfloat16 would cost whole percents of a probability. What is missing of a token's
gradient then is a factor for each slice, `-c exp(m - last m) / Σ`, and `c (1 - p) d logit / d product` at its label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo_kernels.backends.contract import Backend, Tile, TokenStats, add_at_labels_
from spo_kernels.backends.products import Products, accumulator_dtype
from spo_kernels.engine.gradients import HeadGradient, SliceGradient
from spo_kernels.engine.head_slices import HeadSlices
from spo_kernels.engine.kept_space import KeptShape
from spo_kernels.engine.logit_sums import LogitSums
from spo_kernels.engine.memory import in_huge_pages
from spo_kernels.engine.plane import label_slope, relative
from spo_kernels.engine.token_rows import TokenRows
from spo_kernels.engine.workspace import row_stride, spans, tile_of

# statistics of a tile's tokens to the coefficients that scale the gradients of their log-probabilities
Coefficients = Callable[[TokenStats], Tensor]


@dataclass(frozen=True)
class HeadLater:
    """The head's gradient, of a tile that is ready for it."""

    kept: Tensor
    tokens: TokenRows
    hidden: Tensor
    products: Products
    slices: Sequence[slice]

    def __call__(self, head_out: HeadGradient, factor: Tensor | None) -> None:
        """Write it, multiplied, to `head_out`."""
        products, wide = self.products, accumulator_dtype(self.hidden.dtype)
        states = self.tokens.take(self.hidden, 0, self.tokens.count, products.operand_dtype(self.hidden))
        if factor is not None and head_out.adds and head_out.weight is not None and head_out.weight.dtype == wide:
            states = states * factor  # what lies in the gradient already is not to be multiplied
        weight_sum = SliceGradient(head_out, products, wide)
        for columns in self.slices:
            weight_sum.begin(columns, states, self.tokens.count)
            weight_sum.add(self.kept if len(self.slices) == 1 else self.kept[:, columns], states)
            weight_sum.finish(factor)


class KeptTiles:
    """Takes tokens through all three products with one tile, slice by slice of the vocabulary."""

    def __init__(
        self,
        hidden: Tensor,
        head: HeadSlices,
        backend: Backend,
        shape: KeptShape,
        *,
        moments: bool,
        mean_logits: bool = False,
    ) -> None:
        """One tile of that shape."""
        rows, columns = shape.rows, shape.columns
        self._hidden, self._head, self._backend, self._moments = hidden, head, backend, moments
        self._wide = accumulator_dtype(hidden.dtype)
        self._slices = list(spans(head.vocab, columns))
        self.left: HeadLater | None = None  # by the last run
        # of the last run's tokens
        self.logit_sums = LogitSums(head, hidden.new_empty(0, dtype=self._wide), rows) if mean_logits else None
        kept = backend.products.tile_dtype(hidden)
        cells, part = (rows * row_stride(n, hidden.device.type) for n in (head.vocab, columns))
        self._kept = in_huge_pages(hidden.new_empty(cells, dtype=kept))
        # a slice of products before it is rounded
        self._products = None if kept == self._wide else hidden.new_empty(part, dtype=self._wide)

    def run(
        self,
        tokens: TokenRows,
        coefficients: Coefficients,
        head_out: HeadGradient | None,
        hidden_out: Tensor | None,
        *,
        accumulate: bool,
    ) -> TokenStats:
        """Statistics of the tokens, and `Σ coefficient * d logp` into `head_out` and `hidden_out`.

        `head_out.weight` may be in the weight's own dtype where nothing is accumulated. None leaves it to
        `left`.
        """
        n, products, head = tokens.count, self._backend.products, self._head
        states = tokens.take(self._hidden, 0, n, products.operand_dtype(self._hidden))
        kept = tile_of(self._kept, n, head.vocab)
        stats, maxima = self._keep(tokens, states, kept)
        head.join_(stats)
        upstream = coefficients(stats)
        share = (upstream / stats.sum).neg_()
        at_label = upstream * label_slope(stats, head.transform)
        total = None if hidden_out is None else states.new_empty(states.shape, dtype=self._wide)
        weight_sum = None if head_out is None else SliceGradient(head_out, products, self._wide)
        single = len(self._slices) == 1
        factors = [share] if head.whole and single else share * (torch.stack(maxima) - stats.max).exp()
        # a CPU still has a slice in its cache; a GPU has less to launch where all slices are made ready together
        together = head.whole and (single or not kept.is_cpu)
        if together:
            for columns, factor in zip(self._slices, factors, strict=True):
                self._backend.scale_rows(kept[:, columns], factor)
            # every label lies in the tile, on an entry that is 0
            kept[torch.arange(n, device=kept.device), tokens.labels] = at_label.to(kept.dtype)
        for columns, factor in zip(self._slices, factors, strict=True):
            part = kept if single else kept[:, columns]
            if not together:
                self._backend.scale_rows(part, factor)
                add_at_labels_(part, tokens.labels - columns.start, at_label)
            if total is not None:
                weight = head.rows(columns, states.dtype)
                products.matmul(part, weight, out=total, accumulate=columns.start > 0)
            if weight_sum is not None:
                weight_sum.begin(columns, states, n, fresh=not accumulate)
                weight_sum.add(part, states)
                weight_sum.finish()
        if head_out is None:
            self.left = HeadLater(kept, tokens, self._hidden, products, self._slices)
        del states  # its bytes are those of the rounded copy that `put` makes
        if hidden_out is not None and total is not None:
            tokens.put(hidden_out, 0, n, head.sum_(total))
        return stats

    def _keep(self, tokens: TokenRows, states: Tensor, kept: Tensor) -> tuple[TokenStats, list[Tensor]]:
        """Fills the tile; statistics of the tokens, and the maxima that the slices are relative to."""
        stats = TokenStats.start(states.shape[0], states.new_empty(0, dtype=self._wide), self._moments)
        maxima, rescale, head = [], torch.empty_like(stats.max), self._head
        every = slice(0, states.shape[0])
        if self.logit_sums is not None:
            self.logit_sums.begin(every, states)
        for columns in self._slices:
            part = found = kept[:, columns] if len(self._slices) > 1 else kept
            if self._products is not None:
                found = tile_of(self._products, *part.shape)
            self._backend.products.matmul(states, head.rows(columns, states.dtype).t(), out=found)
            labels = relative(tokens.labels, columns)
            tile = Tile(found, labels, head.transform, head.bias_rows(columns, self._wide), part)
            if self.logit_sums is not None:
                self.logit_sums.add(every, tile)
            self._backend.tile_stats(tile, stats, rescale=rescale)
            maxima.append(stats.max if self._head.whole and len(self._slices) == 1 else stats.max.clone())
        return stats, maxima
