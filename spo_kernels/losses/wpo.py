"""Weighted Preference Optimization (WPO, arXiv 2406.11827): pairs count by how likely the policy is to write them."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from spo_kernels.arguments import check_flag
from spo_kernels.losses.composite import Composite, check_objective
from spo_kernels.losses.dpo import DPO
from spo_kernels.losses.pairs import Coupling, Objective, PairLogps, coupling_of


@dataclass(frozen=True)
class WPO(Composite):
    """`w * base` with `w = min(1, exp(ā_w + ā_l))`, `ā = mean_t [log πθ(y_t) - log Σ_v πθ(v)²]`, w detached.

    The weight is from the authors' code (wzhouad/WPO): each token's probability relative to that of a token sampled
    from the policy, so that an on-policy response has ā about 0. `fused_spo_loss` computes log Σ_v πθ(v)² in the pass
    that it makes anyway; per-token weights of the call do not enter ā.

    Attributes:
        base: Any objective.
        clamp: Limit the weight to 1. TRL's `use_weighting` does not: False gives its numbers.
    """

    own_token_outputs: ClassVar[tuple[str, ...]] = ("logp", "log_sum_p2")
    base: Objective = field(default_factory=DPO)
    clamp: bool = True

    def __post_init__(self) -> None:
        check_objective("base", self.base)
        check_flag("clamp", self.clamp)

    def parts(self) -> tuple[Objective, ...]:
        """The base."""
        return (self.base,)

    @property
    def coupling(self) -> Coupling:
        """What the base declares: the weight carries no gradient."""
        return coupling_of(self.base)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        return self.weights(pairs) * self.base(pairs)

    def weights(self, pairs: PairLogps) -> Tensor:
        """w of each pair, `[B]`."""
        total = torch.zeros_like(pairs.chosen.detach())
        for side, lengths in (("chosen", pairs.chosen_lengths), ("rejected", pairs.rejected_lengths)):
            aligned = pairs.input(f"{side}_logp", "WPO") - pairs.input(f"{side}_log_sum_p2", "WPO")
            total = total + aligned / lengths.clamp_min(1)
        weights = total.exp()
        return weights.clamp_max(1.0) if self.clamp else weights
