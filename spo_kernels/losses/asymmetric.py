"""DPO with chosen and rejected treated differently inside the sigmoid."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spo_kernels.losses.pairs import Coupling, PairLogps, check_in, check_not_negative, check_positive
from spo_kernels.losses.terms import log_ratios, logistic


@dataclass(frozen=True)
class FlexDPO:
    """`-log σ(β⁺ r_w - β⁻ r_l)`: Flex-DPO of 3D-Properties (arXiv 2406.07327, appendix B.2).

    Attributes:
        beta_chosen: β⁺ > 0.
        beta_rejected: β⁻ > 0; the paper lowers it down to 0.01.
    """

    coupling: ClassVar[Coupling] = "pair"
    beta_chosen: float = 0.1
    beta_rejected: float = 0.08

    def __post_init__(self) -> None:
        check_positive("beta_chosen", self.beta_chosen)
        check_positive("beta_rejected", self.beta_rejected)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = log_ratios(pairs, "FlexDPO")
        return logistic(self.beta_chosen * chosen - self.beta_rejected * rejected)


@dataclass(frozen=True)
class DPOShift:
    """`-log σ(β r_w - λβ r_l)` (DPO-Shift, arXiv 2502.07599). From third-party code, not checked against the paper.

    Attributes:
        beta: β > 0.
        shift: 0 < λ <= 1; 0.5 in that code.
    """

    coupling: ClassVar[Coupling] = "pair"
    beta: float = 0.1
    shift: float = 0.5

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_in("shift", self.shift, "(0, 1]")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = log_ratios(pairs, "DPOShift")
        return logistic(self.beta * (chosen - self.shift * rejected))


@dataclass(frozen=True)
class BDPO:
    """`-log σ(β r_w - β log(λ e^{r_l} + 1 - λ))`: Bounded-DPO (arXiv 2506.12725), whose rejected response is that of a
    mixture of policy and reference.

    Reconstruction from the author's blog and three implementations that agree; the paper's body was not read.

    Attributes:
        beta: β > 0; the authors' value is not known.
        mixture: 0 < λ <= 1, the policy's share; 0.5 was the blog's best, 1 is DPO.
    """

    coupling: ClassVar[Coupling] = "pair"
    beta: float = 0.1
    mixture: float = 0.5

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_in("mixture", self.mixture, "(0, 1]")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = log_ratios(pairs, "BDPO")
        if self.mixture < 1:
            floor = torch.full_like(rejected, math.log1p(-self.mixture))
            rejected = torch.logaddexp(rejected + math.log(self.mixture), floor)
        return logistic(self.beta * (chosen - rejected))


@dataclass(frozen=True)
class BPO:
    """`-log σ(β min(r_w, -α r_l))` (arXiv 2506.03557): the gradient flows to the smaller branch only.

    From third-party code; a review page confirms the minimum.

    Attributes:
        beta: β > 0.
        alpha: 0 < α <= 1; 0.3 in that code.
    """

    coupling: ClassVar[Coupling] = "pair"
    beta: float = 0.1
    alpha: float = 0.3

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_in("alpha", self.alpha, "(0, 1]")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = log_ratios(pairs, "BPO")
        return logistic(self.beta * torch.minimum(chosen, -self.alpha * rejected))


@dataclass(frozen=True)
class DPOP:
    """`-log σ(β (Δ - λ max(0, -r_w)))` (DPO-Positive, arXiv 2402.13228). From third-party code, not checked against the
    paper.

    Attributes:
        beta: β > 0.
        penalty: λ >= 0, on a chosen response below its reference; 5 in that code.
    """

    coupling: ClassVar[Coupling] = "pair"
    beta: float = 0.1
    penalty: float = 5.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_not_negative("penalty", self.penalty)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = log_ratios(pairs, "DPOP")
        return logistic(self.beta * (chosen - rejected - self.penalty * (-chosen).clamp_min(0.0)))
