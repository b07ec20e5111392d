"""Cut cross-entropy in the place of TRL's fused head."""

from __future__ import annotations

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
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor | None, ...]:
        """Log-probabilities by the implementation that runs on a CPU.

        It has no other outputs: zeros, which cost nothing, stand for entropy, mean logit and top-1.
        """
        if bias is not None or temperature != 1.0 or logit_scale != 1.0 or final_logit_softcapping is not None:
            raise ValueError("expected a plain head")
        logp = -linear_cross_entropy(hidden, weight, targets, reduction="none", impl="torch_compile")
        zero = torch.zeros_like(logp)
        return logp, zero, None, zero, zero.bool()
