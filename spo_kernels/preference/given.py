"""What a caller says of a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spo_kernels.engine.checks import check_token_weights
from spo_kernels.head import LMHead


@dataclass(frozen=True)
class Given:
    """Hidden states and head of one model, or its log-probabilities; and what its tokens weigh."""

    hidden: Tensor | None
    head: Tensor | LMHead | None
    token_weights: Tensor | None = None
    logps: Tensor | None = None  # [2B] sums, or of tokens in labels' shape

    def constant_weights(self, name: str, labels: Tensor) -> Tensor | None:
        """`token_weights`, checked; errors call them `name`."""
        if self.token_weights is None:
            return None
        check_token_weights(name, self.token_weights, labels)
        return self.token_weights.detach()
