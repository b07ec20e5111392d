"""Records of a forward as tensors."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from spo_kernels.data import Example

IGNORE_INDEX = -100


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
