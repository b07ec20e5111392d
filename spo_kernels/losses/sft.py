"""Supervised fine-tuning on the chosen responses, alone and added to DPO."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spo_kernels.arguments import check_choice, check_not_negative, check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.terms import NORMALIZATIONS, coupling_with_nll, logistic, margin, nll


@dataclass(frozen=True)
class SFT:
    """`-log πθ(y_w|x)`, without a reference.

    Attributes:
        normalization: Mean over all chosen "tokens" of the batch, given to each of its pairs (TRL's `sft`); "mean"
            over each response's tokens; "sum".
    """

    normalization: str = "tokens"

    def __post_init__(self) -> None:
        check_choice("normalization", self.normalization, NORMALIZATIONS)

    @property
    def coupling(self) -> Coupling:
        """The sequence, or with "tokens" the batch."""
        return coupling_with_nll("sequence", self.normalization)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        return nll(pairs, self.normalization)


@dataclass(frozen=True)
class RPO:
    """Regularized Preference Optimization (arXiv 2405.16436): DPO plus NLL of the chosen response, in three variants.

    "official" (the authors' trainer): `-log σ(βΔ) - ηβ log πθ(y_w)`, summed over tokens, with the factor β.
    "mean" (the paper's appendix F, OpenRLHF): `-log σ(βΔ) - η log πθ(y_w) / n_w`. Also DPO+NLL (Iterative RPO, η 1.0).
    "trl" (TRL's paper index, `loss_type=["sigmoid", "sft"]`): η times the mean over the batch's chosen tokens.

    Attributes:
        beta: β > 0; 0.01 with the authors' zephyr, 0.05 with their gemma; "mean" has 0.5.
        eta: η >= 0; 0.005 "official" and "trl"; "mean" has 0.2.
        variant: Which of the three.
    """

    beta: float = 0.01
    eta: float = 0.005
    variant: str = "official"

    _NORMALIZATION: ClassVar[dict[str, str]] = {"official": "sum", "mean": "mean", "trl": "tokens"}

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_not_negative("eta", self.eta)
        check_choice("variant", self.variant, tuple(self._NORMALIZATION))

    @property
    def coupling(self) -> Coupling:
        """The pair, or with "trl" the batch."""
        return coupling_with_nll("pair", self._NORMALIZATION[self.variant])

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        weight = self.eta * self.beta if self.variant == "official" else self.eta
        preference = logistic(self.beta * margin(pairs, "RPO"))
        return preference + weight * nll(pairs, self._NORMALIZATION[self.variant])


@dataclass(frozen=True)
class SFTDPO:
    """`-log σ(βΔ) - γ log πθ(y_w)`, summed over tokens: SFT-DPO of 3D-Properties (arXiv 2406.07327, appendix B.2).

    Attributes:
        beta: β > 0.
        gamma: γ >= 0. The paper's value was not found; the default 1.0 is this library's.
    """

    coupling: ClassVar[Coupling] = "pair"
    beta: float = 0.1
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_not_negative("gamma", self.gamma)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        return logistic(self.beta * margin(pairs, "SFTDPO")) + self.gamma * nll(pairs, "sum")
