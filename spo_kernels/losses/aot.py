"""Alignment via Optimal Transport (arXiv 2406.05882): DPO on sorted quantities of the batch."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spo_kernels.arguments import check_in, check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.terms import log_ratios, logistic


@dataclass(frozen=True)
class AOT:
    """Logistic loss of `β (sort(p_w - p_l) - sort(q_w - q_l))`, TRL's `aot`; loss i is that of rank i, not of pair i.

    Attributes:
        beta: β > 0; TRL's paper index has 0.01.
        label_smoothing: 0 <= ε < 0.5, as in `CDPO`.
    """

    coupling: ClassVar[Coupling] = "batch"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_in("label_smoothing", self.label_smoothing, "[0, 0.5)")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`, by rank."""
        ref_chosen, ref_rejected = pairs.reference("AOT")
        policy, reference = pairs.chosen - pairs.rejected, ref_chosen - ref_rejected
        return logistic(self.beta * (policy.sort().values - reference.sort().values), self.label_smoothing)


@dataclass(frozen=True)
class AOTUnpaired:
    """Logistic loss of `β (sort(r_w) - sort(r_l))`, TRL's `aot_unpaired`; by rank, as `AOT`.

    Attributes:
        beta: β > 0.
        label_smoothing: 0 <= ε < 0.5, as in `CDPO`.
    """

    coupling: ClassVar[Coupling] = "batch"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_in("label_smoothing", self.label_smoothing, "[0, 0.5)")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`, by rank."""
        chosen, rejected = log_ratios(pairs, "AOTUnpaired")
        return logistic(self.beta * (chosen.sort().values - rejected.sort().values), self.label_smoothing)
