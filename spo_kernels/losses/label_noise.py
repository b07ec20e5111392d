"""DPO under labels that are wrong with probability ε: cDPO, robust DPO, EXO."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spo_kernels.arguments import check_in, check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.terms import logistic, margin


@dataclass(frozen=True)
class CDPO:
    """`-(1 - ε) log σ(βΔ) - ε log σ(-βΔ)`: conservative DPO, as TRL's label smoothing.

    Attributes:
        beta: β > 0.
        label_smoothing: 0 <= ε < 0.5. The default 0.1 is this library's.
    """

    coupling: ClassVar[Coupling] = "margin"
    beta: float = 0.1
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_in("label_smoothing", self.label_smoothing, "[0, 0.5)")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        return logistic(self.beta * margin(pairs, "CDPO"), self.label_smoothing)


@dataclass(frozen=True)
class Robust:
    """`(-(1 - ε) log σ(βΔ) + ε log σ(-βΔ)) / (1 - 2ε)`: unbiased under flipped labels; TRL's `robust`.

    Attributes:
        beta: β > 0.
        label_smoothing: 0 <= ε < 0.5, the share of flipped labels; TRL's paper index has 0.1.
    """

    coupling: ClassVar[Coupling] = "margin"
    beta: float = 0.1
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_in("label_smoothing", self.label_smoothing, "[0, 0.5)")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        logits, flipped = self.beta * margin(pairs, "Robust"), self.label_smoothing
        return (-(1 - flipped) * F.logsigmoid(logits) + flipped * F.logsigmoid(-logits)) / (1 - 2 * flipped)


@dataclass(frozen=True)
class EXO:
    """`q (log q - log(1 - ε)) + q' (log q' - log ε)`, `q = σ(βΔ)`, `q' = σ(-βΔ)`: reverse KL to smoothed labels; TRL's
    `exo_pair` (arXiv 2402.00856, eq. 16).

    Attributes:
        beta: β > 0.
        label_smoothing: 0 < ε < 0.5; TRL's paper index has 1e-3.
    """

    coupling: ClassVar[Coupling] = "margin"
    beta: float = 0.1
    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_in("label_smoothing", self.label_smoothing, "(0, 0.5)")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        logits, epsilon = self.beta * margin(pairs, "EXO"), self.label_smoothing
        chosen = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-epsilon))
        rejected = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(epsilon))
        return chosen + rejected
