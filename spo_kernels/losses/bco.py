"""Binary Classifier Optimization (arXiv 2404.04656): TRL's pairwise form, and the one with a running shift."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from spo_kernels.arguments import check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.state import RunningState, Stateful, batch_moments
from spo_kernels.losses.terms import log_ratios, logistic


@dataclass(frozen=True)
class BCOPair:
    """`-log σ(β r_w) - log σ(-β r_l)`, TRL's `bco_pair`.

    Attributes:
        beta: β > 0.
    """

    coupling: ClassVar[Coupling] = "sequence"
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = log_ratios(pairs, "BCOPair")
        return logistic(self.beta * chosen) + logistic(-self.beta * rejected)


@dataclass(frozen=True)
class BCO(Stateful):
    """`-log σ(β r_w - δ) - log σ(-(β r_l - δ))`, δ the running mean of the rewards βr of both responses, detached.

    δ is the mean over all batches so far, of all processes and this batch included.

    Attributes:
        beta: β > 0.
        state: δ and the number of batches in it; changed by training, saved by `state_dict`.
    """

    coupling: ClassVar[Coupling] = "batch"
    beta: float = 0.1
    state: RunningState = field(
        default_factory=lambda: RunningState(mean=0.0, batches=0.0), init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = log_ratios(pairs, "BCO")
        chosen, rejected = self.beta * chosen, self.beta * rejected
        batch_mean, _ = batch_moments(torch.cat([chosen, rejected]))
        mean, batches = self.state.get("mean", chosen), self.state.get("batches", chosen) + 1.0
        self.state.update(mean=mean + (batch_mean - mean) / batches, batches=batches)
        delta = self.state.get("mean", chosen)
        return logistic(chosen - delta) + logistic(delta - rejected)
