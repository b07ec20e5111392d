"""Cut cross-entropy in the place of TRL's fused head."""

from __future__ import annotations

from typing import Any

import torch
from cut_cross_entropy import linear_cross_entropy
from torch import Tensor


class CCEHead:
    """Called as TRL's autograd function is."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor | None, ...]:
        """Log-probabilities by the implementation that runs on a CPU, for a head without scale and softcap.

        It has no other outputs: zeros, which cost nothing, stand for entropy, mean logit and top-1.
        """
        if bias is not None or temperature != 1.0:
            raise ValueError(f"expected a plain head, got bias = {bias}, temperature = {temperature}")
        logp = -linear_cross_entropy(hidden, weight, targets, reduction="none", impl="torch_compile")
        zero = torch.zeros_like(logp)
        return logp, zero, None, zero, zero.bool()
