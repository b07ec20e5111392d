"""The mean of each token's logits over the vocabulary, which trainers log; no gradient, no `[N, V]` logits."""

from __future__ import annotations

import torch
from torch import Tensor

from spo_kernels.head import LMHead

# rows of hidden and of the weight in work at once: tiles of 4 M logits, 16 MiB in float32
_TOKENS, _VOCAB = 1024, 4096


@torch.no_grad()
def mean_logit(hidden: Tensor, head: LMHead) -> Tensor:
    """Mean logit of each token.

    Equivalent PyTorch, with `softcap(x) = logit_softcap * tanh(x / logit_softcap)`::

        softcap(head.logit_scale * (hidden @ head.weight.T + head.bias)).float().mean(-1)

    Without a softcap the mean of the products is the product with the mean row: the weight is read once. With one it
    costs a product `[N, H] x [H, V]` in hidden's dtype, or in autocast's.

    Args:
        hidden: `[N, H]` last hidden states.
        head: The head; under autocast its dtype may differ from hidden's.

    Returns:
        `[N]` in float32 (float64 for float64 hidden states), without a gradient.
    """
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if head.logit_softcap is None:
        return _of_mean_row(hidden, head, wide)
    return _of_tiles(hidden, head, head.logit_softcap, wide)


def _of_mean_row(hidden: Tensor, head: LMHead, wide: torch.dtype) -> Tensor:
    # slices: a sum in another dtype copies the whole weight on a CPU
    mean_row = torch.stack([rows.to(wide).sum(0) for rows in head.weight.split(_VOCAB)]).sum(0) / head.weight.shape[0]
    # no matrix product, which autocast would round
    means = torch.cat([(rows.to(wide) * mean_row).sum(-1) for rows in hidden.split(_TOKENS)])
    if head.bias is not None:
        means += head.bias.to(wide).mean()
    return head.logit_scale * means


def _of_tiles(hidden: Tensor, head: LMHead, softcap: float, wide: torch.dtype) -> Tensor:
    sums = hidden.new_zeros(hidden.shape[0], dtype=wide)
    for tokens, total in zip(hidden.split(_TOKENS), sums.split(_TOKENS), strict=True):
        for start in range(0, head.weight.shape[0], _VOCAB):
            tile = (tokens @ head.weight[start : start + _VOCAB].T).to(wide)
            if head.bias is not None:
                tile += head.bias[start : start + _VOCAB]
            total += tile.mul_(head.logit_scale / softcap).tanh_().sum(-1)
    return softcap * sums / head.weight.shape[0]
