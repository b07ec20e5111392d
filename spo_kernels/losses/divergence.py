"""Other divergences than the reverse KL: f-DPO's scores (arXiv 2309.16240) as TRL has them, and χPO."""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spo_kernels.arguments import check_choice, check_in, check_not_negative, check_positive
from spo_kernels.losses.composite import Composite, check_objective
from spo_kernels.losses.dpo import DPO
from spo_kernels.losses.ipo import IPO
from spo_kernels.losses.pairs import Coupling, Objective, PairLogps, coupling_of
from spo_kernels.losses.simpo import SigmoidNorm
from spo_kernels.losses.terms import clamped_expm1, log_ratios, logistic

_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass(frozen=True)
class FDivergence(Composite):
    """The base with a score `s(r)` of each response in place of its log-ratio r.

    "reverse_kl": `r`; "forward_kl": `1 - e^{-r}`; "js_divergence": `log 2 + log σ(r)`; "alpha_divergence":
    `(e^{(a-1) r} - 1) / (a - 1)`, which is r at a = 1. Exponents are taken as at most 80: beyond, a response gets no
    gradient.

    The base has to see the two responses through the difference of their scores only: elsewhere the partition function
    does not cancel. Those with coupling "margin" do, and TRL takes `IPO` and `SigmoidNorm` too.

    Attributes:
        base: Such an objective; a ValueError for others.
        divergence: Which score.
        coefficient: a of "alpha_divergence", in [-10, 10]; TRL's 0.5.
    """

    base: Objective = field(default_factory=DPO)
    divergence: str = "forward_kl"
    coefficient: float = 0.5

    def __post_init__(self) -> None:
        check_objective("base", self.base)
        if coupling_of(self.base) != "margin" and not isinstance(self.base, (IPO, SigmoidNorm)):
            raise ValueError(
                "base must depend on the difference of two scores only: an objective with coupling 'margin', IPO or "
                f"SigmoidNorm; got {self.base!r}"
            )
        check_choice("divergence", self.divergence, _DIVERGENCES)
        check_in("coefficient", self.coefficient, "[-10, 10]")

    def parts(self) -> tuple[Objective, ...]:
        """The base."""
        return (self.base,)

    @property
    def coupling(self) -> Coupling:
        """Scores bend the two log-ratios apart."""
        base = coupling_of(self.base)
        return "pair" if base == "margin" and self.divergence != "reverse_kl" else base

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = map(self._score, log_ratios(pairs, "FDivergence"))
        none = torch.zeros_like(chosen)
        return self.base(replace(pairs, chosen=chosen, rejected=rejected, ref_chosen=none, ref_rejected=none))

    def _score(self, ratio: Tensor) -> Tensor:
        power = self.coefficient - 1.0
        if self.divergence == "forward_kl":
            return -clamped_expm1(-ratio)
        if self.divergence == "js_divergence":
            return math.log(2.0) + F.logsigmoid(ratio)
        if self.divergence == "alpha_divergence" and abs(power) >= 1e-6:
            return clamped_expm1(power * ratio) / power
        return ratio


@dataclass(frozen=True)
class ChiPO:
    """χPO (Huang et al., arXiv 2407.13399), whose divergence is χ² plus KL: `-log σ(clip(β (φ(r_w) - φ(r_l)), ±2 R))`.

    Algorithm 1 has `φ(r) = e^r + r` and clips the whole logit to twice the bound R of the rewards; beyond it a pair
    gets no gradient. The paper's practical link is `φ(r) = e^{clip(αr, -88, 20)} + γr`, here with α = γ = 1 unless
    given: the limit 20 is the paper's. No gradient flows through the exponential where it is clipped.

    Agrees with digests and with code that cites the paper; the paper itself was not read.

    Attributes:
        beta: β > 0; 0.05 and 0.005 in the paper's experiments.
        reward_bound: R > 0; inf leaves the logit as it is. The default 10 is this library's: the paper's R belongs to
            the rewards, and at a logit of 20 a pair's gradient is 2e-9 of its largest.
        alpha: α > 0, of the exponent.
        gamma: γ >= 0, of the KL's term.
        limit: 0 < limit <= 80, where the exponent is clipped; 20 in the paper.
    """

    coupling: ClassVar[Coupling] = "pair"
    beta: float = 0.05
    reward_bound: float = 10.0
    alpha: float = 1.0
    gamma: float = 1.0
    limit: float = 20.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_in("reward_bound", self.reward_bound, "(0, inf]")
        check_positive("alpha", self.alpha)
        check_not_negative("gamma", self.gamma)
        check_in("limit", self.limit, "(0, 80]")

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        return logistic(self.logits(pairs))

    def logits(self, pairs: PairLogps) -> Tensor:
        """What the logistic loss is of, `[B]`, between -2R and 2R."""
        chosen, rejected = log_ratios(pairs, "ChiPO")
        # the small part last: e^r may be 1e8 times r
        powers = self._power(chosen) - self._power(rejected)
        logits = self.beta * (powers + self.gamma * (chosen - rejected))
        return logits.clamp(-2.0 * self.reward_bound, 2.0 * self.reward_bound)

    def _power(self, ratio: Tensor) -> Tensor:
        return (self.alpha * ratio).clamp(-88.0, self.limit).exp()
