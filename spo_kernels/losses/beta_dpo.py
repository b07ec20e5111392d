"""β-DPO (Wu et al., arXiv 2407.08639): one β for a batch, by how far its margins are from the usual, no outliers."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from spo_kernels.arguments import check_in, check_not_negative, check_positive, check_whole
from spo_kernels.losses.draws import draw_without_replacement
from spo_kernels.losses.pairs import Coupling, PairLogps
from spo_kernels.losses.state import RunningState, Stateful, gathered, moving_moments
from spo_kernels.losses.terms import logistic, margin, z_scores


@dataclass(frozen=True)
class BetaDPO(Stateful):
    """`-log σ(β_b Δ)` of the pairs that are kept, `β_b = sg[max(0.001, β (1 + a (mean_kept(Δ) - M)))]`.

    Of the N pairs of all processes' batches `K = ⌊(1 - ρ) N⌋`, at least one, are kept: drawn without replacement with
    weights `exp(-½ ((Δ - M) / S)²)`, equal ones where S = 0. M and S are moving averages of the mean and the standard
    deviation of Δ, from 0, updated before use: `M ← decay M + (1 - decay) mean(Δ)`. A pair that is left out has loss 0
    and a kept one N / K times its own, so that the mean over pairs is the mean over kept ones.

    Agrees with the authors' code (junkangwu/beta-DPO 16290473, trainers.py:73-95, 242-261 and 330-338) but for the
    draw's random numbers, which here depend on `seed`, the batch's number and the pair's place only. Where gradients
    are disabled, every pair is kept (this library's choice).

    Attributes:
        beta: β > 0; 0.1 in the authors' README.
        alpha: a >= 0 per nat; 0.6 in their README, 0 in their configuration.
        filtered: 0 <= ρ < 1, the share that is left out; 0.2 in their README.
        decay: 0 <= decay < 1; 0.9 in their code.
        seed: Of the draws, a whole number >= 0.
        state: M, S and the number of batches so far; changed by training, saved by `state_dict`.
    """

    coupling: ClassVar[Coupling] = "batch"
    beta: float = 0.1
    alpha: float = 0.6
    filtered: float = 0.2
    decay: float = 0.9
    seed: int = 0
    state: RunningState = field(
        default_factory=lambda: RunningState(mean=0.0, std=0.0, batches=0.0), init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_not_negative("alpha", self.alpha)
        check_in("filtered", self.filtered, "[0, 1)")
        check_in("decay", self.decay, "[0, 1)")
        check_whole("seed", self.seed, 0)

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`."""
        margins = margin(pairs, "BetaDPO")
        usual, spread = moving_moments(self.state, margins, self.decay)
        every, start = gathered(margins)
        kept = self._draw(every, usual, spread)
        mean_kept = every[kept].sum() / max(kept.numel(), 1)
        beta = (self.beta * (1.0 + self.alpha * (mean_kept - usual))).clamp_min(1e-3)
        weights = torch.zeros_like(every).scatter(0, kept, every.numel() / max(kept.numel(), 1))
        return weights[start : start + margins.numel()] * logistic(beta * margins)

    def _draw(self, margins: Tensor, usual: Tensor, spread: Tensor) -> Tensor:
        """`[K]` places of the pairs that are kept."""
        count = margins.numel()
        if not torch.is_grad_enabled():
            return torch.arange(count, device=margins.device)
        # rounded: (1 - 0.9) * 10 is a little less than 1
        size = min(max(math.floor(round((1.0 - self.filtered) * count, 9)), 1), count)
        batches = self.state.get("batches", margins.double())
        self.state.update(batches=batches + 1.0)
        return draw_without_replacement(-0.5 * z_scores(margins, usual, spread).square(), size, self.seed, batches)
