"""Anchored Preference Optimization (arXiv 2408.06266), eq. 7 and 8; not the accelerated APO of arXiv 2410.06293."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spo_kernels.arguments import check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.terms import log_ratios


@dataclass(frozen=True)
class APOZero:
    """`1 - σ(β r_w) + σ(β r_l)`, TRL's `apo_zero`: for chosen responses better than the policy's own.

    Attributes:
        beta: β > 0.
    """

    coupling: ClassVar[Coupling] = "sequence"
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = log_ratios(pairs, "APOZero")
        return torch.sigmoid(-self.beta * chosen) + torch.sigmoid(self.beta * rejected)


@dataclass(frozen=True)
class APODown:
    """`σ(β r_w) + 1 - σ(βΔ)`, TRL's `apo_down`: for chosen responses worse than the policy's own.

    Attributes:
        beta: β > 0.
    """

    coupling: ClassVar[Coupling] = "pair"
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = log_ratios(pairs, "APODown")
        return torch.sigmoid(self.beta * chosen) + torch.sigmoid(-self.beta * (chosen - rejected))
