"""β-DPO (arXiv 2407.08639): a β for each pair, by how far its margin is from the usual."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from spo_kernels.losses.pairs import Coupling, PairLogps, check_flag, check_in, check_not_negative, check_positive
from spo_kernels.losses.state import RunningState, Stateful, batch_moments
from spo_kernels.losses.terms import logistic, margin


@dataclass(frozen=True)
class BetaDPO(Stateful):
    """`-log σ(β_i Δ_i)`, `β_i = max(0.001, β (1 + α (Δ_i - mean)))`, `mean` a running one of Δ.

    From third-party code, not checked against the paper; that code does not detach β_i, the default here does. The
    mean starts at 0, where Δ starts, and is updated before use: `mean ← decay mean + (1 - decay) mean(Δ)` over all
    processes.

    Attributes:
        beta: β > 0.
        alpha: α >= 0 per nat. The default 0.6 is this library's.
        decay: 0 <= decay < 1. The default 0.9 is this library's.
        detach_beta: Whether no gradient flows through β_i.
        state: The running mean; changed by training, saved by `state_dict`.
    """

    coupling: ClassVar[Coupling] = "batch"
    beta: float = 0.1
    alpha: float = 0.6
    decay: float = 0.9
    detach_beta: bool = True
    state: RunningState = field(default_factory=lambda: RunningState(mean=0.0), init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_not_negative("alpha", self.alpha)
        check_in("decay", self.decay, "[0, 1)")
        check_flag("detach_beta", self.detach_beta)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        margins = margin(pairs, "BetaDPO")
        batch_mean, _ = batch_moments(margins)
        self.state.update(mean=self.decay * self.state.get("mean", margins) + (1 - self.decay) * batch_mean)
        usual = self.state.get("mean", margins)
        betas = (self.beta * (1.0 + self.alpha * (margins - usual))).clamp_min(1e-3)
        return logistic((betas.detach() if self.detach_beta else betas) * margins)
