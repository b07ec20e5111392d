"""Gradient imbalance in DPO: detached coefficients on the two responses.

In probability space the rejected response's gradient is `πθ(y_w)/πθ(y_l)` times the chosen one's. Here the ratio of
the coefficients makes up for that, from whole sequences' probabilities or from their means per token.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spo_kernels.arguments import check_choice, check_in, check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.terms import clipped_ratio, log_ratios, logistic, per_token, scale_gradient

_RATIOS = ("policy_ratio", "ratio_space")


def _log_ratio(pairs: PairLogps, ratio: str, normalization: str, needed_by: str) -> Tensor:
    """Logarithm of `πθ(y_w)/πθ(y_l)` ("policy_ratio"), or of the same over the reference's ("ratio_space")."""
    logps = (pairs.chosen, pairs.rejected) if ratio == "policy_ratio" else log_ratios(pairs, needed_by)
    chosen, rejected = per_token(pairs, *logps) if normalization == "mean" else logps
    return chosen - rejected


@dataclass(frozen=True)
class BalancedDPO:
    """DPO whose gradients are scaled by detached `c_w` and `c_l`: `g_w = -βs c_w`, `g_l = βs c_l`.

    Inference, not the paper's: the reweighting of Balanced-DPO (arXiv 2502.20847) was not seen. What it says to
    remedy, unequal gradients in probability space, asks for `c_w / c_l = sg[π_w / π_l]`.

    Attributes:
        beta: β > 0.
        coefficients: "policy_ratio" or "ratio_space" (see the module), or "input": `pair_inputs["chosen_coefficient"]`
            and `pair_inputs["rejected_coefficient"]`.
        scaled: Which response gets the built-in coefficient, the other has 1: "chosen" `c_w = ratio`, or "rejected"
            `c_l = 1 / ratio`.
        normalization: Ratio of "mean" probabilities per token or of whole sequences ("sum").
        limit: C >= 1, an upper bound of the built-in coefficient.
        placement: "gradient": the loss is DPO's, its gradients are scaled; "margin": `-log σ(β (c_w r_w - c_l r_l))`.
    """

    coupling: ClassVar[Coupling] = "pair"
    beta: float = 0.1
    coefficients: str = "policy_ratio"
    scaled: str = "chosen"
    normalization: str = "mean"
    limit: float = 2.0
    placement: str = "gradient"

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_choice("coefficients", self.coefficients, (*_RATIOS, "input"))
        check_choice("scaled", self.scaled, ("chosen", "rejected"))
        check_choice("normalization", self.normalization, ("mean", "sum"))
        check_in("limit", self.limit, "[1, inf)")
        check_choice("placement", self.placement, ("gradient", "margin"))

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = log_ratios(pairs, "BalancedDPO")
        scale_chosen, scale_rejected = self._scales(pairs)
        if self.placement == "gradient":
            margins = scale_gradient(chosen, scale_chosen) - scale_gradient(rejected, scale_rejected)
        else:
            margins = scale_chosen * chosen - scale_rejected * rejected
        return logistic(self.beta * margins)

    def _scales(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        if self.coefficients == "input":
            names = ("chosen_coefficient", "rejected_coefficient")
            chosen, rejected = (pairs.input(name, "BalancedDPO") for name in names)
            return chosen, rejected
        log_ratio = _log_ratio(pairs, self.coefficients, self.normalization, "BalancedDPO")
        one = torch.ones_like(log_ratio)
        if self.scaled == "chosen":
            return clipped_ratio(log_ratio, self.limit), one
        return one, clipped_ratio(-log_ratio, self.limit)


@dataclass(frozen=True)
class AdaDPO:
    """`-log σ(β_w r_w - β r_l)`, `β_w = β k sg[min(ratio, C)]` (AdaDPO, arXiv 2605.28440).

    Reconstruction from a digest, not verified against the paper; where k stands is this library's derivation. The
    ratio is `πθ(y_w)/πθ(y_l)` or the same over the reference's, of "mean" probabilities per token as in the digest's
    "Stable AdaDPO".

    Attributes:
        beta: β > 0; 0.005 to 0.1 in the digest.
        ratio: "policy_ratio" or "ratio_space".
        normalization: "mean" or "sum".
        limit: C >= 1; 2 in the digest.
        target: k > 0, the wanted ratio of gradients in probability space, chosen to rejected; 1 in the digest.
    """

    coupling: ClassVar[Coupling] = "pair"
    beta: float = 0.1
    ratio: str = "policy_ratio"
    normalization: str = "mean"
    limit: float = 2.0
    target: float = 1.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_choice("ratio", self.ratio, _RATIOS)
        check_choice("normalization", self.normalization, ("mean", "sum"))
        check_in("limit", self.limit, "[1, inf)")
        check_positive("target", self.target)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = log_ratios(pairs, "AdaDPO")
        log_ratio = _log_ratio(pairs, self.ratio, self.normalization, "AdaDPO")
        scale = self.target * clipped_ratio(log_ratio, self.limit)
        return logistic(self.beta * (scale * chosen - rejected))
