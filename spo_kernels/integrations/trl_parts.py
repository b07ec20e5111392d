"""A batch of TRL's `DPOTrainer` in several forwards, each within a budget of tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spo_kernels.integrations.token_batches import TokenBudget


def parts_of(inputs: Mapping[str, Tensor], budget: TokenBudget) -> list[dict[str, Tensor]]:
    """The batch's pairs in as many batches as the budget makes of them.

    Args:
        inputs: Tensors `[2B, ...]`, chosen rows first, and `[B, ...]`; input_ids, attention_mask and completion_mask
            `[2B, T]` among them.
        budget: Of each forward.

    Raises:
        ValueError: A pair is longer than the budget.
    """
    try:
        groups = budget.forwards(lengths_of(inputs))
    except ValueError as error:
        raise ValueError(f"tokens_per_batch = {budget.tokens}: {error}; raise it, or lower max_length") from None
    pairs = len(inputs["attention_mask"]) // 2
    return [_pairs(inputs, group, pairs) for group in groups] if len(groups) > 1 else [dict(inputs)]


def lengths_of(inputs: Mapping[str, Tensor]) -> list[list[int]]:
    """Of each pair the tokens of its prompt and of both responses."""
    real, completion = inputs["attention_mask"], inputs["completion_mask"]
    chosen, rejected = (completion * real).sum(-1).chunk(2)
    prompts = real[: len(chosen)].sum(-1) - chosen
    return torch.stack([prompts, chosen, rejected], 1).tolist()


def _pairs(inputs: Mapping[str, Tensor], group: list[int], pairs: int) -> dict[str, Tensor]:
    """Some pairs of a batch, without columns at its end that are padding in all of them.

    Those in front stay: there are models whose positions count them.
    """
    width, both = inputs["attention_mask"].shape[1], [*group, *(pairs + i for i in group)]
    kept = slice(int(inputs["attention_mask"][both].any(0).nonzero().max()) + 1)

    def picked(value: Tensor) -> Tensor:
        if len(value) == pairs:
            return value[group]
        return value[both][:, kept] if value.ndim == 2 and value.shape[1] == width else value[both]

    return {name: picked(value) for name, value in inputs.items()}
