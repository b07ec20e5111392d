"""Log-probs of single response tokens of a whole data set, as one flat vector, and those of a batch from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spo_kernels.data import Example
from spo_kernels.train.batches import IGNORE_INDEX


@dataclass(frozen=True)
class TokenPlaces:
    """Where the tokens that count lie in the vector: record by record, in it response by response."""

    starts: np.ndarray  # [n, responses]
    lengths: np.ndarray  # [n, responses]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> TokenPlaces:
        """Of all records."""
        lengths = np.array([[e.response_length(k) for k in range(len(e.responses))] for e in examples], dtype=np.int64)
        ends = lengths.cumsum().reshape(lengths.shape)
        return cls(ends - lengths, lengths)

    @property
    def total(self) -> int:
        """Tokens of all records."""
        return int(self.lengths.sum())

    def select(self, indices: Sequence[int]) -> Tensor:
        """Places of some records' tokens, in the order in which `collate` has them."""
        starts, lengths = self.starts[indices].T.flatten(), self.lengths[indices].T.flatten()
        return torch.from_numpy(np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]))


@dataclass(frozen=True)
class TokenLogps:
    """Log-probs of the tokens of a data set."""

    places: TokenPlaces
    values: Tensor  # [total], on the CPU

    def batch(self, indices: Sequence[int], labels: Tensor) -> Tensor:
        """Those of some records, in the shape of the labels that `collate` makes of them; 0 where no token counts."""
        out = torch.zeros(labels.shape, device=labels.device)
        out[labels != IGNORE_INDEX] = self.values[self.places.select(indices)].to(labels.device)
        return out
