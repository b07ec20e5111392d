"""The tokens of a batch of pairs in the order of three products: sequence by sequence, chosen first."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from spo_kernels.engine.label_layout import sum_segments, sum_sequences
from spo_kernels.engine.token_rows import TokenRows
from spo_kernels.preference.batch import PairBatch


@dataclass(frozen=True)
class PairOrder:
    """Tokens of 2B sequences, and those of consecutive pairs among them."""

    tokens: TokenRows
    counts: list[int]  # [2B], tokens of each sequence
    lengths: Tensor  # [2B], the same on the device; with those that are masked
    bounds: list[int] = field(init=False)  # [2B + 1], where each begins

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds", [0, *accumulate(self.counts)])

    @classmethod
    def of(cls, batch: PairBatch, first: int) -> PairOrder:
        """Of a batch whose lengths the host knows; classes are counted from `first`."""
        assert batch.host_lengths is not None
        tokens = TokenRows.of(batch.tokens, batch.layout.shift, first)
        lengths, bounds = batch.lengths, batch.layout.cu_seqlens
        if tokens.mask is not None and bounds is not None:
            lengths = bounds.diff().long()
        return cls(tokens, batch.host_lengths, lengths)

    @property
    def pairs(self) -> int:
        """B."""
        return len(self.counts) // 2

    def parts(self, pairs: range) -> list[slice]:
        """The tokens of the chosen and of the rejected responses of consecutive pairs."""
        return [slice(self.bounds[first + pairs.start], self.bounds[first + pairs.stop]) for first in (0, self.pairs)]

    def select(self, pairs: range) -> TokenRows:
        """The tokens of consecutive pairs, chosen first."""
        if len(pairs) == self.pairs:
            return self.tokens
        halves = [self.tokens.part(part.start, part.stop) for part in self.parts(pairs)]
        rows, labels = (torch.cat([getattr(half, name) for half in halves]) for name in ("rows", "labels"))
        masks = [half.mask for half in halves if half.mask is not None]
        return TokenRows(rows, labels, torch.cat(masks) if masks else None)

    def values_of(self, values: Tensor | None, pairs: range) -> Tensor | None:
        """Per-token values of consecutive pairs, chosen first."""
        if values is None or len(pairs) == self.pairs:
            return values
        return torch.cat([values[part] for part in self.parts(pairs)])

    def lengths_of(self, pairs: range) -> Tensor:
        """Tokens of each sequence of consecutive pairs, chosen first."""
        if len(pairs) == self.pairs:
            return self.lengths
        return self.lengths.view(2, -1)[:, pairs.start : pairs.stop].flatten()

    def equal_length(self, pairs: range) -> int | None:
        """The length of all sequences of consecutive pairs, where they have the same; ragged ones cost more steps."""
        counts = [self.counts[first + pair] for first in (0, self.pairs) for pair in pairs]
        return counts[0] if counts and counts[0] and min(counts) == max(counts) else None

    def sum(self, pairs: range, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sums over each sequence of consecutive pairs, of `values` or of `values * weights`."""
        equal = self.equal_length(pairs)
        if equal is None:
            return sum_segments(values, self.lengths_of(pairs), weights)
        return sum_sequences(values.view(-1, equal), None, None if weights is None else weights.view(-1, equal))

    def repeat(self, pairs: range, slopes: Tensor) -> Tensor:
        """One value of each sequence of consecutive pairs, as one of each of its tokens."""
        equal = self.equal_length(pairs)
        if equal is not None:
            return slopes[:, None].expand(-1, equal).reshape(-1)
        tokens = sum(part.stop - part.start for part in self.parts(pairs))
        return slopes.repeat_interleave(self.lengths_of(pairs), output_size=tokens)
