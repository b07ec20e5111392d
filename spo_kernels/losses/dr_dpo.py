"""Dr. DPO: a soft minimum over the batch's losses, so that pairs with wrong labels count less."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from spo_kernels.arguments import check_positive
from spo_kernels.losses.composite import Composite, check_objective
from spo_kernels.losses.dpo import DPO
from spo_kernels.losses.pairs import Coupling, Objective, PairLogps


@dataclass(frozen=True)
class DrDPO(Composite):
    """`-β' log mean_i exp(-L_i / β')`, given to each pair of the batch; L_i is the base's loss of pair i.

    Agrees with the authors' code (junkangwu/Dr_DPO 3c0678fe, trainers.py:269-270), where the batch is each process's
    micro-batch too.

    Attributes:
        base: Any objective; the authors' is DPO with β 0.1.
        beta_prime: β' > 0; 1 in that code; large is the plain mean.
    """

    coupling: ClassVar[Coupling] = "batch"
    base: Objective = field(default_factory=DPO)
    beta_prime: float = 1.0

    def __post_init__(self) -> None:
        check_objective("base", self.base)
        check_positive("beta_prime", self.beta_prime)

    def parts(self) -> tuple[Objective, ...]:
        """The base."""
        return (self.base,)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`, all equal."""
        losses = self.base(pairs)
        count = max(losses.numel(), 1)
        soft_minimum = -self.beta_prime * (torch.logsumexp(-losses / self.beta_prime, 0) - math.log(count))
        return soft_minimum.expand(losses.shape)
