"""KTO's estimate of the KL divergence: prompts with responses to other prompts, see `losses/kto.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from torch import Tensor

from spo_kernels.data import Example
from spo_kernels.train.batches import collate
from spo_kernels.train.errors import TrainError
from spo_kernels.train.policy import Policy

# the name of KTO's input
MISMATCHED = "mismatched_ratio"


class MismatchedExamples(Sequence[Example]):
    """For each pair its prompt with a response to the next record's prompt that is another one.

    Chosen and rejected responses take turns, record by record: the authors' batches hold both kinds. A response is cut
    where it would make the longest sequence of the data longer.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        self._longest = max(example.longest for example in examples)

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Example]: ...
    def __getitem__(self, i: int | slice) -> Example | Sequence[Example]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        prompt, k = self._examples[i].prompt, i % 2
        for step in range(1, len(self)):
            other = self._examples[(i + step) % len(self)]
            if not np.array_equal(other.prompt, prompt):
                left = self._longest - len(prompt)
                spans = tuple((start, min(end, left)) for start, end in other.spans(k) if start < left)
                return Example(prompt, (other.responses[k][:left],), scored=(spans,))
        raise TrainError("--loss-arg kl=mismatched needs records of two different prompts at least")


@dataclass(frozen=True)
class MismatchedPairs:
    """Mismatched records, and their reference log-probs [n] where they are precomputed."""

    examples: MismatchedExamples
    ref_logps: Tensor | None = None

    def ratios(self, policy: Policy, indices: Sequence[int], accelerator: Any) -> Tensor:
        """`log πθ(y'|x) - log πref(y'|x)`, [B], of some records."""
        input_ids, labels = collate((self.examples[i] for i in indices), accelerator.device)
        given = None if self.ref_logps is None else self.ref_logps[list(indices)].to(accelerator.device)
        with accelerator.autocast():
            return policy.log_ratios(input_ids, labels, given)
