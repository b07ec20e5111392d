"""Random tokens of each response of a batch of pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spo_kernels.engine.label_layout import LabelLayout


@dataclass(frozen=True)
class PairTokens:
    """The n tokens of B pairs that count, sequence by sequence."""

    counted: Tensor  # labels' shape, bool: which labels count
    owners: Tensor  # [n], the sequence of each token that does
    lengths: Tensor  # [2B]

    @classmethod
    def of(cls, layout: LabelLayout, counted: Tensor | None = None, count: int | None = None) -> PairTokens:
        """Of labels; `counted` as `LabelLayout.counted` gives them, and how many they are, where that is at hand.

        Raises:
            ValueError: There is an odd number of sequences.
        """
        layout.check_pairs()
        counted = layout.counted() if counted is None else counted
        lengths = layout.count(counted)
        owners = torch.arange(layout.sequences, device=counted.device).repeat_interleave(lengths, output_size=count)
        return cls(counted, owners, lengths)

    @property
    def shorter(self) -> Tensor:
        """`[2B]` the length of each sequence's pair's shorter response."""
        return self.lengths.view(2, -1).amin(0).repeat(2)

    def random_subset(self, sizes: Tensor, generator: torch.Generator | None) -> Tensor:
        """`[n]` bool: a uniform subset of `sizes[s]` tokens of each sequence s, drawn on the CPU."""
        # sorted by sequence and, inside one, by a random key: the first of each are its subset
        keys = torch.rand(self.owners.numel(), dtype=torch.float64, generator=generator)
        # not to wait for what the device does is safe: the values are read before this returns
        order = (self.owners + keys.to(self.owners.device, non_blocking=True)).argsort()
        owners = self.owners[order]
        starts = self.lengths.cumsum(0) - self.lengths
        rank = torch.arange(owners.numel(), device=owners.device) - starts[owners]
        return torch.empty_like(owners, dtype=torch.bool).scatter_(0, order, rank < sizes[owners])

    def pilot_subsets(self, r1: float, r2: float, generator: torch.Generator | None = None) -> Tensor:
        """See `spo_kernels.extras.token_weights.pilot_subsets`."""
        chosen, rejected = self.shorter.double().chunk(2)
        sizes = torch.cat([r1 * chosen, r2 * rejected]).floor().long().clamp_min(1)
        return self.spread(self.random_subset(sizes, generator))

    def spread(self, values: Tensor) -> Tensor:
        """Values of the tokens that count at their labels' places, 0 elsewhere."""
        weights = torch.zeros(self.counted.shape, device=self.counted.device)
        return weights.masked_scatter_(self.counted, values.float())
