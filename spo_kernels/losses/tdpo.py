"""Token-level DPO (TDPO): DPO's margin less the difference of the responses' sequential KL divergences."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spo_kernels.arguments import check_choice, check_not_negative, check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.terms import logistic, margin


@dataclass(frozen=True)
class TDPO:
    """`-log σ(β (Δ - α (k_l - sg[k_w])))` (TDPO2) or `-log σ(β (Δ - (k_l - k_w)))` (TDPO1).

    `k = Σ_t KL(πref(·|y_<t) ‖ πθ(·|y_<t))` over a response; sg stops the gradient. From the authors' code
    (Vance0124/Token-level-Direct-Preference-Optimization).

    `fused_spo_loss` finds k from both models' hidden states, so it must be given `ref_hidden` and `ref_head`, not
    `ref_logps`; see `linear_kl` for the cost.

    Attributes:
        beta: β > 0.
        alpha: α >= 0, TDPO2 only; 0.5 is the authors' default.
        variant: "tdpo1" or "tdpo2".
    """

    coupling: ClassVar[Coupling] = "margin"
    token_outputs: ClassVar[tuple[str, ...]] = ("kl",)
    beta: float = 0.1
    alpha: float = 0.5
    variant: str = "tdpo2"

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_not_negative("alpha", self.alpha)
        check_choice("variant", self.variant, ("tdpo1", "tdpo2"))

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = (pairs.input(f"{side}_kl", "TDPO") for side in ("chosen", "rejected"))
        gap = rejected - chosen if self.variant == "tdpo1" else self.alpha * (rejected - chosen.detach())
        return logistic(self.beta * (margin(pairs, "TDPO") - gap))
