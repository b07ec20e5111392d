"""Noise Contrastive Alignment (arXiv 2402.05369)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spo_kernels.arguments import check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.terms import log_ratios, logistic


@dataclass(frozen=True)
class NCA:
    """`-log σ(β r_w) - ½ log σ(-β r_w) - ½ log σ(-β r_l)`, TRL's `nca_pair`.

    Attributes:
        beta: β > 0; TRL's paper index has 0.01.
    """

    coupling: ClassVar[Coupling] = "sequence"
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = log_ratios(pairs, "NCA")
        chosen, rejected = self.beta * chosen, self.beta * rejected
        return logistic(chosen) + 0.5 * logistic(-chosen) + 0.5 * logistic(-rejected)
