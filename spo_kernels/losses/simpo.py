"""Length-normalised rewards: TRL's `sigmoid_norm`, SimPO and AlphaPO."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spo_kernels.arguments import check_in, check_not_negative, check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.terms import clamped_expm1, log_ratios, logistic, per_token

_LEAST_ALPHA = 1e-6


@dataclass(frozen=True)
class SigmoidNorm:
    """`-log σ(β (r_w / n_w - r_l / n_l))`, TRL's `sigmoid_norm`; not RSO's, which divides by the reference.

    Attributes:
        beta: β > 0, per nat of a token's mean log-ratio.
    """

    coupling: ClassVar[Coupling] = "pair"
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = per_token(pairs, *log_ratios(pairs, "SigmoidNorm"))
        return logistic(self.beta * (chosen - rejected))


@dataclass(frozen=True)
class SimPO:
    """`-log σ(β (p_w / n_w - p_l / n_l) - γ)` (Meng et al., arXiv 2405.14734), without a reference.

    Attributes:
        beta: β > 0; 2 to 2.5 in the paper.
        gamma: γ >= 0, the target margin of the logit (TRL's `simpo_gamma`); about β/2 in the paper.
        label_smoothing: 0 <= ε < 0.5, as in `CDPO`.
    """

    coupling: ClassVar[Coupling] = "pair"
    beta: float = 2.0
    gamma: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_not_negative("gamma", self.gamma)
        check_in("label_smoothing", self.label_smoothing, "[0, 0.5)")

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """`β p_w / n_w` and `β p_l / n_l`, which are logged."""
        chosen, rejected = per_token(pairs, pairs.chosen, pairs.rejected)
        return self.beta * chosen, self.beta * rejected

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = self.rewards(pairs)
        return logistic(chosen - rejected - self.gamma, self.label_smoothing)


@dataclass(frozen=True)
class AlphaPO:
    """SimPO with the reward `(1 - p̄^-α) / α`, `p̄ = exp(log πθ(y|x) / n)` (arXiv 2501.03884); no reference.

    Agrees with TRL f2cd5771 (trl/experimental/cpo/cpo_trainer.py:695-724) but for a cap: `p̄^-α` is taken as at most
    e^80, so a response whose mean log-probability is below -80/α gets no gradient.

    Attributes:
        beta, gamma: As in `SimPO`; 2.5 and 0.1, the paper's.
        alpha: α > 0, or below 0, `1e-6 <= |α| <= 10`; 0.25 in the paper; near 0 the reward is log p̄, which is SimPO's.
    """

    coupling: ClassVar[Coupling] = "pair"
    beta: float = 2.5
    gamma: float = 0.1
    alpha: float = 0.25

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_not_negative("gamma", self.gamma)
        check_in("alpha", self.alpha, "[-10, 10]")
        if abs(self.alpha) < _LEAST_ALPHA:
            raise ValueError(
                f"alpha must not be nearer to 0 than {_LEAST_ALPHA:g}, where AlphaPO is SimPO to rounding: use SimPO; "
                f"got {self.alpha}"
            )

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """β times each response's reward, which are logged."""
        chosen, rejected = map(self._reward, per_token(pairs, pairs.chosen, pairs.rejected))
        return self.beta * chosen, self.beta * rejected

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = self.rewards(pairs)
        return logistic(chosen - rejected - self.gamma)

    def _reward(self, mean_logp: Tensor) -> Tensor:
        # 1 - exp loses the margin for a small alpha: in float32 8 % of the loss at 1e-6
        return -clamped_expm1(-self.alpha * mean_logp) / self.alpha
