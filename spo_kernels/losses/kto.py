"""Kahneman-Tversky Optimization (Ethayarajh et al., arXiv 2402.01306) on pairs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spo_kernels.arguments import check_choice, check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.state import batch_moments
from spo_kernels.losses.terms import log_ratios


@dataclass(frozen=True)
class KTO:
    """`λ_D (1 - σ(β (r_w - z))) + λ_U (1 - σ(β (z - r_l)))`: the chosen response desirable, the rejected one not.

    The terms agree with the authors' code (ContextualAI/HALOs 48319886, train/trainers.py:851-917). Its z, an estimate
    of KL(πθ ‖ πref), is the mean log-ratio of *mismatched* pairs `(x_i, y_{i+1})`, a prompt with the next one's
    response (dataloader.py:547-556), over all processes, at least 0 and detached. `kl="mismatched"` is that z. The
    default differs: "matched" takes the log-ratios that the call has, of responses with their own prompts, an
    approximation that is too large once the policy has learned the chosen ones.

    Attributes:
        beta: β > 0; 0.1 in the authors' code.
        desirable_weight, undesirable_weight: λ_D, λ_U > 0; 1 in the authors' code.
        kl: Where z >= 0, detached, comes from. "matched": the mean of r_w and r_l of all processes' pairs, at least 0;
            "mismatched": the mean over all processes' pairs of `pair_inputs["mismatched_ratio"]`, the log-ratio
            `log πθ(y_{i+1}|x_i) - log πref(y_{i+1}|x_i)`, at least 0; "input": `pair_inputs["kl"]`, z itself for each
            pair, at least 0; "zero".
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    kl: str = "matched"

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_positive("desirable_weight", self.desirable_weight)
        check_positive("undesirable_weight", self.undesirable_weight)
        check_choice("kl", self.kl, ("matched", "mismatched", "input", "zero"))

    @property
    def coupling(self) -> Coupling:
        """A mean over the batch depends on all of it."""
        return "batch" if self.kl in ("matched", "mismatched") else "sequence"

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = log_ratios(pairs, "KTO")
        z = self._z(pairs, torch.cat([chosen, rejected]))
        desirable = torch.sigmoid(-self.beta * (chosen - z))
        undesirable = torch.sigmoid(-self.beta * (z - rejected))
        return self.desirable_weight * desirable + self.undesirable_weight * undesirable

    def _z(self, pairs: PairLogps, ratios: Tensor) -> Tensor:
        if self.kl == "zero":
            return ratios.new_zeros(())
        if self.kl == "input":
            return pairs.input("kl", "KTO").clamp_min(0.0)
        if self.kl == "mismatched":
            ratios = pairs.input("mismatched_ratio", "KTO")
        return batch_moments(ratios)[0].clamp_min(0.0)
