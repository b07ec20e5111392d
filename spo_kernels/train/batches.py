"""Which records make up an optimizer step, and how they become tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from spo_kernels.data import Example

IGNORE_INDEX = -100


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def step_indices(step: int, n: int, per_step: int, seed: int) -> list[int]:
    """Records of a step: a slice of the endless stream of per-epoch permutations.

    A pure function of the step, so the data position of a resumed run is its step number; a step
    may span two epochs, so no batch is ever short.
    """
    positions = range(step * per_step, (step + 1) * per_step)
    return [int(_permutation(seed, p // n, n)[p % n]) for p in positions]


def micro_batches(indices: Sequence[int], rank: int, world_size: int, batch_size: int) -> list[list[int]]:
    """This process's share of a step, in forwards of `batch_size`."""
    mine = list(indices[rank::world_size])
    return [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]


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
