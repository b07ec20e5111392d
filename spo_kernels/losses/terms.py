"""What objectives are made of. With p, q the log-probabilities of a response under policy and reference and n its
tokens: log-ratios r = p - q, the margin Δ = r_w - r_l, means over tokens, and the logistic loss.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from spo_kernels.losses.pairs import Coupling, PairLogps

NORMALIZATIONS = ("sum", "mean", "tokens")

# e^80 = 5.5e34: still finite in float32 after a product with a few hundred
MAX_EXPONENT = 80.0


def log_ratios(pairs: PairLogps, needed_by: str) -> tuple[Tensor, Tensor]:
    """`r_w, r_l`; a ValueError that names `needed_by` without a reference."""
    ref_chosen, ref_rejected = pairs.reference(needed_by)
    return pairs.chosen - ref_chosen, pairs.rejected - ref_rejected


def margin(pairs: PairLogps, needed_by: str, reference_free: bool = False) -> Tensor:
    """Δ, or `p_w - p_l`."""
    if reference_free:
        return pairs.chosen - pairs.rejected
    chosen, rejected = log_ratios(pairs, needed_by)
    return chosen - rejected


def per_token(pairs: PairLogps, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """`chosen / n_w, rejected / n_l`; divided by 1 where a response is empty."""
    return chosen / pairs.chosen_lengths.clamp_min(1), rejected / pairs.rejected_lengths.clamp_min(1)


def logistic(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """`-(1 - ε) log σ(logits) - ε log σ(-logits)`."""
    loss = -F.logsigmoid(logits)
    # log σ(x) - log σ(-x) = x
    return loss if label_smoothing == 0.0 else loss + label_smoothing * logits


def nll(pairs: PairLogps, normalization: str, chosen: Tensor | None = None) -> Tensor:
    """`-log πθ(y_w|x)` `[B]`, or of other log-probabilities `chosen`: their "sum", their "mean" over the response's
    tokens, or for each pair the same mean over all chosen "tokens" of the batch, which is TRL's `sft`.
    """
    logps, lengths = pairs.chosen if chosen is None else chosen, pairs.chosen_lengths
    if normalization == "sum":
        return -logps
    if normalization == "mean":
        return -logps / lengths.clamp_min(1)
    return (-logps.sum() / lengths.sum().clamp_min(1)).expand(logps.shape)


def coupling_with_nll(base: Coupling, normalization: str) -> Coupling:
    """What `base + nll(normalization)` depends on: a mean over the batch's tokens couples its pairs."""
    if normalization == "tokens" or base == "batch":
        return "batch"
    return "sequence" if base == "sequence" else "pair"


def clamped_expm1(exponent: Tensor) -> Tensor:
    """`exp(min(exponent, 80)) - 1`, exact near 0; its gradient is 0 above 80."""
    return exponent.clamp_max(MAX_EXPONENT).expm1()


def scale_gradient(value: Tensor, factor: Tensor) -> Tensor:
    """`value`, with its gradient multiplied by `factor`, which carries none itself."""
    constant = value.detach()
    return constant + factor * (value - constant)


def clipped_ratio(log_ratio: Tensor, limit: float) -> Tensor:
    """`sg[min(exp(log_ratio), limit)]`."""
    return log_ratio.detach().clamp_max(math.log(limit)).exp()


def z_scores(values: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """`(values - mean) / std`, detached; 0 where there is no spread."""
    spread = torch.where(std > 0, std, torch.inf)
    return (values.detach() - mean) / spread
