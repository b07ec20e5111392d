"""DiscoPOP (arXiv 2406.08414): the loss that a language model found."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spo_kernels.arguments import check_in, check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.terms import logistic, margin


@dataclass(frozen=True)
class DiscoPOP:
    """`(1 - k) (-log σ(βΔ)) + k e^{-βΔ}`, `k = σ(βΔ / τ)`, TRL's `discopop` (eq. 5).

    Attributes:
        beta: β > 0; TRL's paper index has 0.05.
        tau: 0 < τ <= 1; 0.05 in the paper. Above 1 the exponential would outgrow k for negative margins.
    """

    coupling: ClassVar[Coupling] = "margin"
    beta: float = 0.1
    tau: float = 0.05

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_in("tau", self.tau, "(0, 1]")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        logits = self.beta * margin(pairs, "DiscoPOP")
        # k e^{-x} as one exponential: apart, they are 0 and inf for a large negative x
        exponential = torch.exp(F.logsigmoid(logits / self.tau) - logits)
        return torch.sigmoid(-logits / self.tau) * logistic(logits) + exponential
