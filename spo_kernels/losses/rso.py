"""The losses of statistical rejection sampling (RSO, Liu et al., arXiv 2309.06657)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spo_kernels.arguments import check_choice, check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.terms import logistic, margin


@dataclass(frozen=True)
class RSO:
    """Eq. 8 to 10 of the paper: "sigmoid_norm" `-log σ(γΔ)`, "hinge" `max(0, 1 - γ (p_w - p_l))`, "hinge_norm"
    `max(0, 1 - γΔ)`.

    "norm" means divided by the reference: TRL's `sigmoid_norm` is another loss, see `SigmoidNorm`.

    Attributes:
        gamma: γ > 0, apart from the β of the sampling; 0.05 in the paper.
        form: Which of the three. "hinge" needs no reference.
    """

    coupling: ClassVar[Coupling] = "margin"
    gamma: float = 0.05
    form: str = "sigmoid_norm"

    def __post_init__(self) -> None:
        check_positive("gamma", self.gamma)
        check_choice("form", self.form, ("sigmoid_norm", "hinge", "hinge_norm"))

    @property
    def beta(self) -> float:
        """γ, which scales the logged rewards."""
        return self.gamma

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        logits = self.gamma * margin(pairs, "RSO", reference_free=self.form == "hinge")
        return logistic(logits) if self.form == "sigmoid_norm" else (1.0 - logits).clamp_min(0.0)
