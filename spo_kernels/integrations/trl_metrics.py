"""What TRL's `DPOTrainer` logs of a batch, over all processes, with one transfer to the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spo_kernels.backends.pair_form import SUMMARY


@dataclass(frozen=True)
class Forward:
    """What metrics are made of.

    Attributes:
        found: Of `PairLoss`.
        labels: `[2B, T]`, unshifted.
        attention_mask: `[2B, T]`.
    """

    found: Mapping[str, Tensor]
    labels: Tensor
    attention_mask: Tensor

    def sums(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each metric a mean's numerator and denominator."""
        chosen, rejected = ((side != -100).sum() for side in self.labels[:, 1:].chunk(2))
        pairs = torch.as_tensor(len(self.labels) // 2, device=self.labels.device)
        weights = {name: pairs for name in self.found if name in SUMMARY[1:] or name.startswith("sparsity/")}
        weights |= {"entropy": chosen + rejected, "mean_token_accuracy": chosen, "aux_loss": torch.ones_like(pairs)}
        weights |= {"logits/chosen": chosen, "logits/rejected": rejected}
        return {n: (self.found[n].detach() * w, w) for n, w in weights.items() if n in self.found}


def batch_metrics(forwards: Sequence[Forward], reward_scale: float, accelerator: Any) -> tuple[dict[str, float], int]:
    """TRL's metrics of a batch that was computed in these forwards, and how many tokens it had.

    `reward_scale` multiplies the rewards; all processes of the accelerator come here together.
    """
    every = [forward.sums() for forward in forwards]
    names = list(every[0])
    # numerators, then denominators
    parts = [sum(sums[name][side] for sums in every) for side in (0, 1) for name in names]
    tokens = sum(forward.attention_mask.sum() for forward in forwards)
    device = forwards[0].labels.device
    both = torch.stack([torch.as_tensor(value).double().to(device) for value in (*parts, tokens)])
    *totals, count = accelerator.reduce(both, reduction="sum").tolist()
    means = zip(names, totals, totals[len(names) :], strict=False)
    metrics = {name: total / over if over else 0.0 for name, total, over in means}
    return {name: value * (reward_scale if _is_reward(name) else 1.0) for name, value in metrics.items()}, int(count)


def _is_reward(name: str) -> bool:
    return name.startswith("rewards/") and name != "rewards/accuracies"
