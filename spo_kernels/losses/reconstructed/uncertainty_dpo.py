"""Uncertainty-Penalized DPO (arXiv 2410.20187): DPO that trusts a pair less where its reward is uncertain."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spo_kernels.arguments import check_choice, check_not_negative, check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.terms import logistic, margin


@dataclass(frozen=True)
class UncertaintyDPO:
    """Uncertainty-Penalized DPO (arXiv 2410.20187). Reconstruction, not verified against the paper, whose formulas were
    not seen; derived from its pessimism and from what is said of it.

    "additive": `-log σ(βΔ + λ (u_w - u_l))`, u = `pair_inputs["chosen_uncertainty"]` and `["rejected_uncertainty"]`;
    an uncertain chosen response lowers the gradient (u >= 0). "multiplicative": `-log σ(e^{-λu} βΔ)`, u =
    `pair_inputs["uncertainty"]` of the pair.

    Attributes:
        beta: β > 0.
        penalty: Which of the two.
        scale: λ >= 0 per unit of u (1/τ of the multiplicative form). The default 1.0 is this library's.
    """

    coupling: ClassVar[Coupling] = "margin"
    beta: float = 0.1
    penalty: str = "additive"
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_choice("penalty", self.penalty, ("additive", "multiplicative"))
        check_not_negative("scale", self.scale)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        logits = self.beta * margin(pairs, "UncertaintyDPO")
        if self.penalty == "multiplicative":
            return logistic(torch.exp(-self.scale * pairs.input("uncertainty", "UncertaintyDPO")) * logits)
        chosen, rejected = (pairs.input(f"{side}_uncertainty", "UncertaintyDPO") for side in ("chosen", "rejected"))
        return logistic(logits + self.scale * (chosen - rejected))
