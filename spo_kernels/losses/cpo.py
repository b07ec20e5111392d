"""Contrastive Preference Optimization (Xu et al., arXiv 2401.08417) and ORPO: a contrast plus SFT, no reference."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spo_kernels.arguments import check_choice, check_in, check_not_negative, check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.terms import NORMALIZATIONS, coupling_with_nll, logistic, nll, per_token


@dataclass(frozen=True)
class CPO:
    """A contrast of `p_w` and `p_l`, plus `α NLL_w`; TRL's `CPOTrainer`.

    "sigmoid": `-(1 - ε) log σ(β (p_w - p_l)) - ε log σ(-β (p_w - p_l))`; "hinge": `max(0, 1 - β (p_w - p_l))`;
    "ipo": `(p_w / n_w - p_l / n_l - 1 / (2β))²`.

    Attributes:
        beta: β > 0.
        alpha: α >= 0, weight of the NLL.
        form: Which contrast.
        label_smoothing: 0 <= ε < 0.5, of "sigmoid".
        normalization: Of the NLL: "mean" over the response's tokens, over all chosen "tokens" of the batch (TRL's), or
            "sum".
    """

    beta: float = 0.1
    alpha: float = 1.0
    form: str = "sigmoid"
    label_smoothing: float = 0.0
    normalization: str = "mean"

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_not_negative("alpha", self.alpha)
        check_choice("form", self.form, ("sigmoid", "hinge", "ipo"))
        check_in("label_smoothing", self.label_smoothing, "[0, 0.5)")
        check_choice("normalization", self.normalization, NORMALIZATIONS)

    @property
    def coupling(self) -> Coupling:
        """The pair, or with an NLL over "tokens" the batch."""
        return coupling_with_nll("pair", self.normalization)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """β times what is compared, which is logged."""
        chosen, rejected = self._compared(pairs)
        return self.beta * chosen, self.beta * rejected

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        return self._contrast(pairs) + self.alpha * nll(pairs, self.normalization)

    def _compared(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        both = pairs.chosen, pairs.rejected
        return per_token(pairs, *both) if self.form == "ipo" else both

    def _contrast(self, pairs: PairLogps) -> Tensor:
        chosen, rejected = self._compared(pairs)
        if self.form == "ipo":
            return (chosen - rejected - 0.5 / self.beta).square()
        logits = self.beta * (chosen - rejected)
        return logistic(logits, self.label_smoothing) if self.form == "sigmoid" else (1.0 - logits).clamp_min(0.0)


@dataclass(frozen=True)
class ORPO:
    """`NLL_w - β log σ(log odds_w - log odds_l)`, `odds = p̄ / (1 - p̄)`, `p̄ = exp(log πθ(y|x) / n)` (Hong et al., arXiv
    2403.07691); no reference. The NLL is the mean over the response's tokens.

    `log p̄` is taken as at most -1e-6 in the odds, which are infinite at 0: a more certain response, or an empty one,
    gets no gradient through them.

    Attributes:
        beta: β > 0, the paper's λ.
    """

    coupling: ClassVar[Coupling] = "pair"
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """`β p_w / n_w` and `β p_l / n_l`, which are logged."""
        chosen, rejected = per_token(pairs, pairs.chosen, pairs.rejected)
        return self.beta * chosen, self.beta * rejected

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = per_token(pairs, pairs.chosen, pairs.rejected)
        return self.beta * logistic(_log_odds(chosen) - _log_odds(rejected)) + nll(pairs, "mean")


def _log_odds(mean_logp: Tensor) -> Tensor:
    mean_logp = mean_logp.clamp_max(-1e-6)
    return mean_logp - torch.log(-torch.expm1(mean_logp))
