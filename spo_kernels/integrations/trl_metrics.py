"""What TRL's `DPOTrainer` logs of a batch, over all processes, with one transfer to the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spo_kernels.preference.outcome import PAIR_METRICS


def batch_metrics(
    found: Mapping[str, Tensor], labels: Tensor, attention_mask: Tensor, reward_scale: float, accelerator: Any
) -> tuple[dict[str, float], int]:
    """TRL's metrics of this step, and how many tokens it had.

    Args:
        found: Of `PairLoss`.
        labels: `[2B, T]`, unshifted.
        attention_mask: `[2B, T]`.
        reward_scale: Multiplies the rewards.
        accelerator: accelerate's, whose processes come here together.
    """
    chosen, rejected = ((side != -100).sum() for side in labels[:, 1:].chunk(2))
    pairs = torch.as_tensor(len(labels) // 2, device=labels.device)
    weights = {name: pairs for name in found if name in PAIR_METRICS[1:] or name.startswith("sparsity/")}
    weights |= {"entropy": chosen + rejected, "mean_token_accuracy": chosen, "aux_loss": torch.ones_like(pairs)}
    weights |= {"logits/chosen": chosen, "logits/rejected": rejected}
    names = [name for name in weights if name in found]
    # a mean's numerator and denominator
    sums, over = [found[name] * weights[name] for name in names], [weights[name] for name in names]
    both = torch.stack([value.detach().double().to(labels.device) for value in (*sums, *over, attention_mask.sum())])
    *totals, tokens = accelerator.reduce(both, reduction="sum").tolist()
    means = zip(names, totals, totals[len(names) :], strict=False)
    metrics = {name: total / count if count else 0.0 for name, total, count in means}
    return {name: value * (reward_scale if _is_reward(name) else 1.0) for name, value in metrics.items()}, int(tokens)


def _is_reward(name: str) -> bool:
    return name.startswith("rewards/") and name != "rewards/accuracies"
