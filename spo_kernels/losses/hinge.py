"""Hinge losses: TRL's `hinge`, and SLiC with its regulariser."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spo_kernels.arguments import check_choice, check_flag, check_not_negative, check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.terms import NORMALIZATIONS, coupling_with_nll, margin, nll


@dataclass(frozen=True)
class Hinge:
    """`max(0, 1 - βΔ)`, TRL's `hinge`.

    Attributes:
        beta: β > 0; 1/β is the margin in nats that is enough.
        reference_free: Leave the reference out: `max(0, 1 - β (p_w - p_l))`.
    """

    coupling: ClassVar[Coupling] = "margin"
    beta: float = 0.1
    reference_free: bool = False

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_flag("reference_free", self.reference_free)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        return (1.0 - self.beta * margin(pairs, "Hinge", self.reference_free)).clamp_min(0.0)


@dataclass(frozen=True)
class SLiC:
    """`max(0, δ - p_w + p_l) - λ log πθ(y_ref)` with the chosen response as y_ref. No reference model.

    Agrees with eq. 4 of the paper as a card quotes it, and with ContextualAI/HALOs 48319886
    (train/trainers.py:824-848); the paper itself was not read. SLiC's y_ref is a supervised target; a preference pair
    has none, so the chosen response stands for it here.

    Attributes:
        delta: δ > 0, nats; 1 in that code.
        weight: λ >= 0. The default 1.0 is this library's.
        normalization: Of the last term: "sum", "mean" over its tokens, or over all chosen "tokens" of the batch.
    """

    delta: float = 1.0
    weight: float = 1.0
    normalization: str = "sum"

    def __post_init__(self) -> None:
        check_positive("delta", self.delta)
        check_not_negative("weight", self.weight)
        check_choice("normalization", self.normalization, NORMALIZATIONS)

    @property
    def coupling(self) -> Coupling:
        """The pair, or with "tokens" the batch."""
        return coupling_with_nll("pair", self.normalization)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        hinge = (self.delta - margin(pairs, "SLiC", reference_free=True)).clamp_min(0.0)
        return hinge + self.weight * nll(pairs, self.normalization)
