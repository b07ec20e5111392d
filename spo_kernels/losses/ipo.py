"""Identity Preference Optimization (Azar et al., arXiv 2310.12036)."""

from dataclasses import dataclass

from torch import Tensor

from spo_kernels.arguments import check_choice, check_positive
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.terms import log_ratios, per_token


@dataclass(frozen=True)
class IPO:
    """`(r_w / n_w - r_l / n_l - 1 / (2β))²` ("mean", TRL's `ipo`), or `(r_w - r_l - 1 / (2β))²` ("sum").

    Attributes:
        beta: β > 0, the paper's τ.
        normalization: Log-ratios per token ("mean") or of whole responses ("sum").
    """

    beta: float = 0.1
    normalization: str = "mean"

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_choice("normalization", self.normalization, ("mean", "sum"))

    @property
    def coupling(self) -> Coupling:
        """Lengths scale the two responses differently."""
        return "pair" if self.normalization == "mean" else "margin"

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        chosen, rejected = log_ratios(pairs, "IPO")
        if self.normalization == "mean":
            chosen, rejected = per_token(pairs, chosen, rejected)
        return (chosen - rejected - 0.5 / self.beta).square()
