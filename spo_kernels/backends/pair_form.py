"""What the pair-loss kernels compute, and the tensors that they fill."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairForm:
    """Which of the formulas: `penalty` "none", "nll" or "hinge"; `value` (v) "reference" or "input"."""

    beta: float
    use_reference: bool = True
    penalty: str = "none"
    weight: float = 0.0
    epsilon: float = 0.0
    value: str = "reference"
    mean: bool = True


def pair_outputs(logp: Tensor, cu_seqlens: Tensor | None) -> tuple[int, Tensor, Tensor]:
    """The number of pairs B, `summary [7, B]` and coefficients in the shape of `logp`, both to be filled."""
    pairs = (logp.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1) // 2
    # packed tokens that no sequence holds stay 0
    coefficients = torch.empty_like(logp) if cu_seqlens is None else torch.zeros_like(logp)
    return pairs, logp.new_empty((7, pairs)), coefficients
