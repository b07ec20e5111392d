"""What the pair-loss kernels compute, and the tensors that they fill."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairForm:
    """`-log σ(beta * margin) + weight * penalty`, per pair; the formulas stand in `triton/pair_loss.py`.

    The margin is the policy's difference of sequence log-probs, chosen minus rejected. NLL is the chosen sequence's.
    """

    beta: float
    use_reference: bool = True  # subtract the reference's difference from the margin
    penalty: str = "none"  # "none", "nll": NLL, or "hinge": max(0, NLL - v - epsilon)
    weight: float = 0.0
    epsilon: float = 0.0
    value: str = "reference"  # v of the hinge: the "reference"'s NLL, or an "input" for each pair
    mean: bool = True  # NLL per token, not per sequence


def pair_outputs(logp: Tensor, cu_seqlens: Tensor | None) -> tuple[int, Tensor, Tensor]:
    """The number of pairs B, `summary [7, B]` and coefficients in the shape of `logp`, both to be filled."""
    pairs = (logp.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1) // 2
    # packed tokens that no sequence holds stay 0
    coefficients = torch.empty_like(logp) if cu_seqlens is None else torch.zeros_like(logp)
    return pairs, logp.new_empty((7, pairs)), coefficients
