"""α-DPO (Wu et al., arXiv 2410.10148): SimPO whose target margin follows the reference's, pair by pair.

The paper and its code differ in where β stands and in the statistics of the Z-score; both are here.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from spo_kernels.arguments import check_in, check_not_negative, check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.state import RunningState, Stateful, batch_moments, moving_moments
from spo_kernels.losses.terms import log_ratios, logistic, per_token, z_scores


@dataclass(frozen=True)
class AlphaDPO:
    """`-log σ(β p_w / n_w - β p_l / n_l - sg[γ + α M*])`, `M = βΔ`, `M*` its Z-score in the batch: eq. 12 of the paper.

    A batch of one pair has `M* = 0`.

    Attributes:
        beta: β > 0. (β, γ, α) of the paper's table 4: Mistral (2.5, 0.15, 0.05), Llama-3 (2.5, 0.6, 0.2), Llama-3 v0.2
            (10, 0.4, 0.2), Gemma-2 (10, 0.4, 0.05), which are the defaults.
        gamma: γ >= 0; the paper's search had 0.1, 0.3 and 0.5.
        alpha: α >= 0; the paper's search had 0.01 to 0.2.
    """

    coupling: ClassVar[Coupling] = "batch"
    beta: float = 10.0
    gamma: float = 0.4
    alpha: float = 0.05

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_not_negative("gamma", self.gamma)
        check_not_negative("alpha", self.alpha)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        ratio_chosen, ratio_rejected = log_ratios(pairs, "AlphaDPO")
        margins = self.beta * (ratio_chosen - ratio_rejected)
        target = self.gamma + self.alpha * z_scores(margins, *batch_moments(margins))
        chosen, rejected = per_token(pairs, pairs.chosen, pairs.rejected)
        return logistic(self.beta * (chosen - rejected) - target)


@dataclass(frozen=True)
class AlphaDPOCode(Stateful):
    """The form of the authors' code: with log-probabilities per token, `gap = r_w / n_w - r_l / n_l` and running
    statistics, `x = (p_w / n_w - p_l / n_l) - sg[γ + α (gap - mean) / std]`, `-(1 - ε) log σ(βx) - ε log σ(-βx)`.

    The statistics start at 0 and are updated before use, `mean ← 0.9 mean + 0.1 mean(gap)` over all processes, std
    likewise, without bias correction: the first Z-scores are large, as in that code. With `std = 0` they are 0 here.

    Agrees with junkangwu/alpha-DPO fab32091 (scripts/dpo_trainer.py:86-110). Its configurations put the paper's γ and α
    of table 4 here as they are, so the margin that they train with is `β (γ + α M*)`, β times the paper's: numbers do
    not carry over between `AlphaDPO` and this.

    Attributes:
        beta: β > 0. (β, gamma_beta_ratio, α) of its training_configs: Mistral (2.5, 0.15, 0.05), Llama-3 (2.5, 0.6,
            0.2), which are the defaults, Llama-3 v0.2 (10, 0.4, 0.2), Gemma-2 (10, 0.4, 0.05). The class there starts
            from (2, 0.25, 0), which is SimPO.
        gamma_beta_ratio: The target margin >= 0, per nat of the mean log-probability.
        alpha: α >= 0, likewise.
        label_smoothing: 0 <= ε < 0.5.
        state: The running mean and standard deviation; changed by training, saved by `state_dict`.
    """

    coupling: ClassVar[Coupling] = "batch"
    beta: float = 2.5
    gamma_beta_ratio: float = 0.6
    alpha: float = 0.2
    label_smoothing: float = 0.0
    state: RunningState = field(
        default_factory=lambda: RunningState(mean=0.0, std=0.0), init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_not_negative("gamma_beta_ratio", self.gamma_beta_ratio)
        check_not_negative("alpha", self.alpha)
        check_in("label_smoothing", self.label_smoothing, "[0, 0.5)")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = per_token(pairs, pairs.chosen, pairs.rejected)
        ratio_chosen, ratio_rejected = per_token(pairs, *log_ratios(pairs, "AlphaDPOCode"))
        gap = ratio_chosen - ratio_rejected
        scores = z_scores(gap, *moving_moments(self.state, gap, 0.9))
        logits = chosen - rejected - (self.gamma_beta_ratio + self.alpha * scores)
        return logistic(self.beta * logits, self.label_smoothing)
