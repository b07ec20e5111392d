"""How the records of an optimizer step are put in forwards, and become tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spo_kernels.data import Example
from spo_kernels.integrations.token_batches import TokenBudget

IGNORE_INDEX = -100


def micro_batches(indices: Sequence[int], rank: int, world_size: int, batch_size: int) -> list[list[int]]:
    """This process's share of a step, in forwards of `batch_size`."""
    mine = list(indices[rank::world_size])
    return [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]


@dataclass(frozen=True)
class Forwards:
    """Forwards of `batch_size` records, or of as many as a budget of tokens holds."""

    batch_size: int
    budget: TokenBudget | None = None

    def of(
        self, examples: Sequence[Example], indices: Sequence[int], rank: int = 0, world_size: int = 1
    ) -> list[list[int]]:
        """A process's share of some records."""
        if self.budget is None:
            return micro_batches(indices, rank, world_size, self.batch_size)
        share = self.budget.share([examples[i].lengths for i in indices], rank, world_size)
        return [[indices[i] for i in forward] for forward in share]


def collate(examples: Iterable[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """(input_ids, labels), each [R * B, T]: all first responses, then all second ones, padded right.

    With right padding and causal attention no real position sees padding, so there is no attention
    mask: at 32k tokens an explicit one costs a gigabyte a row and the fast attention kernels.
    """
    examples = list(examples)
    rows = [(e, k) for k in range(len(examples[0].responses)) for e in examples]
    length = max(len(e.prompt) + len(e.responses[k]) for e, k in rows)
    input_ids = np.zeros((len(rows), length), dtype=np.int64)
    labels = np.full((len(rows), length), IGNORE_INDEX, dtype=np.int64)
    for i, (example, k) in enumerate(rows):
        n, response = len(example.prompt), example.responses[k]
        input_ids[i, :n], input_ids[i, n : n + len(response)] = example.prompt, response
        for start, end in example.spans(k):
            labels[i, n + start : n + end] = response[start:end]
    return torch.from_numpy(input_ids).to(device), torch.from_numpy(labels).to(device)
