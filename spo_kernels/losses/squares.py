"""Squared errors of each response's log-ratio: SPPO, and Cal-DPO which adds them to DPO."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spo_kernels.arguments import check_choice, check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.terms import log_ratios, logistic


@dataclass(frozen=True)
class SPPO:
    """`½ (r_w - (P_w - ½) / β)² + ½ (r_l - (P_l - ½) / β)²` (Self-Play Preference Optimization, arXiv 2405.00675).

    Agrees with the authors' code (uclaml/SPPO 5e61c4e9, sppo/trainer.py:860-879), where P is the mean probability of
    winning against 5 candidates for the prompt, the response itself among them (scripts/compute_prob.py).

    Attributes:
        beta: β > 0; 0.001 in that code.
        probabilities: P, the probability that the response wins. "hard": 1 and 0; "input":
            `pair_inputs["chosen_probability"]` and `pair_inputs["rejected_probability"]`.
    """

    coupling: ClassVar[Coupling] = "sequence"
    beta: float = 0.001
    probabilities: str = "hard"

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_choice("probabilities", self.probabilities, ("hard", "input"))

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        wins: tuple[Tensor | float, Tensor | float] = (1.0, 0.0)
        if self.probabilities == "input":
            wins = (pairs.input("chosen_probability", "SPPO"), pairs.input("rejected_probability", "SPPO"))
        ratios = log_ratios(pairs, "SPPO")
        errors = [ratio - (win - 0.5) / self.beta for ratio, win in zip(ratios, wins, strict=True)]
        return 0.5 * (errors[0].square() + errors[1].square())


@dataclass(frozen=True)
class SPPOHard:
    """`(r_w - 1 / (2β))² + (r_l + 1 / (2β))²`, TRL's `sppo_hard`: twice the "hard" `SPPO`.

    Attributes:
        beta: β > 0; TRL's paper index has 0.001.
    """

    coupling: ClassVar[Coupling] = "sequence"
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = log_ratios(pairs, "SPPOHard")
        return (chosen - 0.5 / self.beta).square() + (rejected + 0.5 / self.beta).square()


@dataclass(frozen=True)
class CalDPO:
    """`-log σ(Δ) + ½ (r_w - 1 / (2β))² + ½ (r_l + 1 / (2β))²`, with no β in the first term (Cal-DPO).

    Agrees with the authors' code (tengxiao1/Cal-DPO 7d16b466, scripts/dpo_trainer.py:1204-1216) and eq. 10 of the
    paper; the appendix's other form is a misprint (issue #1 there).

    Attributes:
        beta: β > 0; 0.001 to 0.002 in the paper.
    """

    coupling: ClassVar[Coupling] = "pair"
    beta: float = 0.001

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = log_ratios(pairs, "CalDPO")
        calibration = (chosen - 0.5 / self.beta).square() + (rejected + 0.5 / self.beta).square()
        return logistic(chosen - rejected) + 0.5 * calibration
