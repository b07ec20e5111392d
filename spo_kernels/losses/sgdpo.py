"""SGDPO, Self-Guided DPO (arXiv 2505.12435): each response against a random part of the other one."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spo_kernels.arguments import check_in, check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.terms import log_ratios, logistic


@dataclass(frozen=True)
class SGDPO:
    """`½ ℓ(β (r_w - ρ_l)) + ½ ℓ(β (ρ_w - r_l))`, `ℓ(m) = -(1 - ε) log σ(m) - ε log σ(-m)`.

    The pilots ρ are constants: the log-ratio `log πθ - log πref` summed over random tokens S of a response, one S for
    policy and reference, drawn anew for every batch; `|S_w| = max(⌊r1 min(n_w, n_l)⌋, 1)`, `|S_l|` with r2 likewise.
    `fused_spo_loss` draws the tokens, with torch's CPU generator, and finds the pilots where the reference is evaluated
    in the same call. Elsewhere they are `pair_inputs["chosen_pilot"]` and `["rejected_pilot"]`:
    `spo_kernels.extras.token_weights.pilot_subsets` draws the tokens and `pilots` sums them. With r1 = r2 = 1 and
    n_w = n_l the value is DPO's and the gradient half of DPO's.

    Agrees with the authors' code (WNQzhu/SGDPO, code/scripts/pdpo_trainer_v4.py, get_pilot_logps and pdpo_loss, of 21
    August 2025). The paper's printed equation was not read.

    Attributes:
        beta: β > 0; 0.1 in that code.
        r1, r2: 0 < r <= 1, the shares of the chosen and of the rejected response for whoever draws the tokens; 0.6 and
            0.9 in that code, 0.7 and 0.9 in its released Llama-3-8B run.
        label_smoothing: 0 <= ε < 0.5.
    """

    coupling: ClassVar[Coupling] = "sequence"
    beta: float = 0.1
    r1: float = 0.6
    r2: float = 0.9
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_in("r1", self.r1, "(0, 1]")
        check_in("r2", self.r2, "(0, 1]")
        check_in("label_smoothing", self.label_smoothing, "[0, 0.5)")

    @property
    def token_subsets(self) -> tuple[float, float]:
        """`(r1, r2)`: what share of the shorter length is drawn from the chosen and from the rejected response."""
        return self.r1, self.r2

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = log_ratios(pairs, "SGDPO")
        chosen_pilot, rejected_pilot = (pairs.input(f"{side}_pilot", "SGDPO") for side in ("chosen", "rejected"))
        guided_chosen = logistic(self.beta * (chosen - rejected_pilot), self.label_smoothing)
        guided_rejected = logistic(self.beta * (chosen_pilot - rejected), self.label_smoothing)
        return 0.5 * (guided_chosen + guided_rejected)
