"""DPO with chosen and rejected treated differently inside the sigmoid."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spo_kernels.arguments import check_choice, check_in, check_not_negative, check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
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
class BDPO:
    """`-log σ(β r_w - β log(λ e^{r_l} + 1 - λ))`: Bounded-DPO (arXiv 2506.12725), whose rejected response is that of a
    mixture of policy and reference.

    Agrees with the author's code (bonin147/BDPO b311aa6d, trl/trainer/dpo_trainer.py:71-103 and 981-985): sums over
    tokens, the mixture is not detached.

    Attributes:
        beta: β > 0; 0.1 in that code.
        mixture: 0 < λ <= 1, the policy's share; 0.5 in that code, 1 is DPO.
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
    """BPO (arXiv 2506.03557) of `m = β min(r_w, -α r_l)`: "logistic" `-log σ(m)`, or "hinge" `max(0, 1 - m)`. The
    gradient flows to the smaller branch only.

    Agrees with the authors' code (sunlin-ai/BPO d882c0f0, train_dpo.py:85 and 288-296), whose released run trains the
    hinge.

    Attributes:
        beta: β > 0; 0.1 in that code.
        alpha: 0 < α <= 1; 0.3 in that code.
        form: Which of the two.
    """

    coupling: ClassVar[Coupling] = "pair"
    beta: float = 0.1
    alpha: float = 0.3
    form: str = "logistic"

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_in("alpha", self.alpha, "(0, 1]")
        check_choice("form", self.form, ("logistic", "hinge"))

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = log_ratios(pairs, "BPO")
        logits = self.beta * torch.minimum(chosen, -self.alpha * rejected)
        return logistic(logits) if self.form == "logistic" else (1.0 - logits).clamp_min(0.0)


@dataclass(frozen=True)
class DPOP:
    """`-log σ(β (Δ - λ max(0, -r_w)))` (DPO-Positive, arXiv 2402.13228), the penalty inside β.

    Agrees with three other projects' code (LuJunru/SamPO 25e9631f, dpo_trainer.py:891-897; bonin147/BDPO b311aa6d;
    sunlin-ai/BPO d882c0f0) and with abacusai/smaug issue #2; the paper's own equation was not read.

    Attributes:
        beta: β > 0.
        penalty: λ >= 0, on a chosen response below its reference; 50 in two of these. An author calls the result
            insensitive from 5 to 500.
    """

    coupling: ClassVar[Coupling] = "pair"
    beta: float = 0.1
    penalty: float = 50.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_not_negative("penalty", self.penalty)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = log_ratios(pairs, "DPOP")
        return logistic(self.beta * (chosen - rejected - self.penalty * (-chosen).clamp_min(0.0)))
