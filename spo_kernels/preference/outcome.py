"""What computing a batch gives, and the metrics that are made of it: the same for every way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spo_kernels.backends.pair_form import SUMMARY, logps_of
from spo_kernels.engine.label_layout import LabelLayout
from spo_kernels.losses.pairs import Objective, PairLogps, implicit_rewards


@dataclass(frozen=True)
class TokenSums:
    """Over the policy's tokens here: entropies of all, how many of the chosen responses' have the largest logit, and
    the mean logits of either side's.
    """

    entropy: Tensor
    correct_chosen: Tensor
    chosen_logits: Tensor
    rejected_logits: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenSums:
        """The same record with every sum replaced."""
        return TokenSums(**{name: function(value) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Outcome:
    """A batch's loss and what its metrics are made of; all but `loss` without gradient."""

    loss: Tensor  # 0-d, or [B] where they are not reduced
    summary: Tensor  # [7, B], see SUMMARY
    token_sums: TokenSums | None = None
    sparsity: dict[str, Tensor] = field(default_factory=dict)

    def metrics(self, layout: LabelLayout, lengths: Tensor, *, pair_logps: bool) -> dict[str, Tensor]:
        """Everything to report; `lengths` (`[2B]`) are the tokens that took part here."""
        means = self.summary.float().mean(1)
        metrics = dict(zip(SUMMARY, means.unbind(), strict=True)) | self.sparsity
        if pair_logps:
            metrics["pair_logps"] = logps_of(self.summary)
        if self.token_sums is not None:
            # TRL's: entropy over all counted tokens, accuracy over those of the chosen responses
            sums, lengths = self.token_sums.map(layout.joined), layout.joined(lengths)
            chosen, rejected = (side.sum().clamp_min(1) for side in lengths.chunk(2))
            metrics["entropy"] = sums.entropy.float() / lengths.sum().clamp_min(1)
            metrics["mean_token_accuracy"] = sums.correct_chosen / chosen
            metrics["logits/chosen"] = sums.chosen_logits.float() / chosen
            metrics["logits/rejected"] = sums.rejected_logits.float() / rejected
        return metrics


@torch.no_grad()
def summarise(objective: Objective, pairs: PairLogps, losses: Tensor) -> Tensor:
    """`Outcome.summary`."""
    chosen, rejected = implicit_rewards(objective, pairs)
    margins = chosen - rejected
    accuracy = (margins > 0).to(chosen.dtype)
    return torch.stack([losses.to(chosen.dtype), chosen, rejected, margins, accuracy, pairs.chosen, pairs.rejected])
