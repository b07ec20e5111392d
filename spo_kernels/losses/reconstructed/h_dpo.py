"""H-DPO (arXiv 2411.07595): DPO with control of the policy's entropy."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spo_kernels.arguments import check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.terms import logistic


@dataclass(frozen=True)
class HDPO:
    """`-log σ(αβ (p_w - p_l) - β (q_w - q_l))`.

    Reconstruction from third-party code and a derivation: the reverse KL with its entropy scaled by α; the paper's
    body was not read.

    Attributes:
        beta: β > 0.
        alpha: α > 0; below 1 sharper than DPO, above 1 more diverse.
    """

    coupling: ClassVar[Coupling] = "margin"
    beta: float = 0.1
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_positive("alpha", self.alpha)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        ref_chosen, ref_rejected = pairs.reference("HDPO")
        # αp - q of each response: they nearly cancel where α is near 1
        chosen, rejected = self.alpha * pairs.chosen - ref_chosen, self.alpha * pairs.rejected - ref_rejected
        return logistic(self.beta * (chosen - rejected))
