"""Direct Preference Optimization (Rafailov et al., arXiv 2305.18290)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spo_kernels.arguments import check_flag, check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.terms import logistic, margin


@dataclass(frozen=True)
class DPO:
    """`-log σ(β ((log πθ(y_w) - log πref(y_w)) - (log πθ(y_l) - log πref(y_l))))`, eq. 7 of the paper.

    Attributes:
        beta: β > 0, strength of the pull to the reference (per nat).
        reference_free: Leave the reference out, as if it were uniform.
    """

    coupling: ClassVar[Coupling] = "margin"
    beta: float = 0.1
    reference_free: bool = False

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_flag("reference_free", self.reference_free)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        return logistic(self.beta * margin(pairs, "DPO", self.reference_free))
