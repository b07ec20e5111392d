"""Kahneman-Tversky Optimization (Ethayarajh et al., arXiv 2402.01306) on pairs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spo_kernels.losses.pairs import Coupling, PairLogps, check_choice, check_positive
from spo_kernels.losses.terms import log_ratios


@dataclass(frozen=True)
class KTO:
    """`λ_D (1 - σ(β (r_w - z))) + λ_U (1 - σ(β (z - r_l)))`: the chosen response desirable, the rejected one not.

    The two terms are TRL's `KTOTrainer`'s. Its z comes from responses paired with other prompts, which pairs do not
    have: z here is an estimate from this batch, or given.

    Attributes:
        beta: β > 0.
        desirable_weight, undesirable_weight: λ_D, λ_U > 0.
        kl: Where z >= 0, detached, comes from. "batch": the mean of all log-ratios of the call, at least 0 (of this
            process alone); "input": `pair_inputs["kl"]`, at least 0; "zero".
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    kl: str = "batch"

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_positive("desirable_weight", self.desirable_weight)
        check_positive("undesirable_weight", self.undesirable_weight)
        check_choice("kl", self.kl, ("batch", "input", "zero"))

    @property
    def coupling(self) -> Coupling:
        """A z from the batch depends on all of it."""
        return "batch" if self.kl == "batch" else "sequence"

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = log_ratios(pairs, "KTO")
        z = self._z(pairs, torch.cat([chosen, rejected]).detach())
        desirable = torch.sigmoid(-self.beta * (chosen - z))
        undesirable = torch.sigmoid(-self.beta * (z - rejected))
        return self.desirable_weight * desirable + self.undesirable_weight * undesirable

    def _z(self, pairs: PairLogps, ratios: Tensor) -> Tensor:
        if self.kl == "zero":
            return ratios.new_zeros(())
        z = pairs.input("kl", "KTO") if self.kl == "input" else ratios.sum() / max(ratios.numel(), 1)
        return z.clamp_min(0.0)
