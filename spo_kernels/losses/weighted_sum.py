"""Weighted sums of objectives, such as MPO (mixed preference optimization, arXiv 2411.10442)."""

from dataclasses import dataclass, field

from torch import Tensor

from spo_kernels.arguments import check_list, check_not_negative
from spo_kernels.losses.bco import BCOPair
from spo_kernels.losses.composite import Composite, check_objective, widest_coupling
from spo_kernels.losses.dpo import DPO
from spo_kernels.losses.pairs import Coupling, Objective, PairLogps
from spo_kernels.losses.sft import SFT


@dataclass(frozen=True)
class WeightedSum(Composite):
    """`Σ weight_k L_k`. The default is MPO as TRL has it: 0.8 `sigmoid`, 0.2 `bco_pair`, 1.0 `sft`.

    Attributes:
        objectives: One or more; the first one's rewards are logged.
        weights: As many numbers >= 0.
    """

    objectives: tuple[Objective, ...] = field(default_factory=lambda: (DPO(), BCOPair(), SFT()))
    weights: tuple[float, ...] = (0.8, 0.2, 1.0)

    def __post_init__(self) -> None:
        check_list("objectives", self.objectives)
        check_list("weights", self.weights)
        object.__setattr__(self, "objectives", tuple(self.objectives))
        object.__setattr__(self, "weights", tuple(self.weights))
        if not self.objectives or len(self.objectives) != len(self.weights):
            raise ValueError(
                f"objectives and weights must be as many, at least one; got {len(self.objectives)} objectives and "
                f"{len(self.weights)} weights"
            )
        for objective in self.objectives:
            check_objective("objectives", objective)
        for weight in self.weights:
            check_not_negative("weights", weight)

    def parts(self) -> tuple[Objective, ...]:
        """The objectives."""
        return self.objectives

    @property
    def coupling(self) -> Coupling:
        """What its objectives together depend on."""
        return widest_coupling(self.objectives)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        losses = [w * objective(pairs) for objective, w in zip(self.objectives, self.weights, strict=True)]
        return sum(losses[1:], losses[0])
