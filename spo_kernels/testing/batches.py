"""Inputs of `linear_logprob`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo_kernels.head import LMHead


@dataclass(frozen=True)
class Batch:
    """Inputs of `linear_logprob`: hidden [.., H], weight [V, H], labels [..], bias [V] or None."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None

    def head(self, *, logit_scale: float = 1.0, logit_softcap: float | None = None) -> LMHead:
        """Weight and bias as an `LMHead`."""
        return LMHead(self.weight, self.bias, logit_scale=logit_scale, logit_softcap=logit_softcap)

    def to(self, dtype: torch.dtype) -> Batch:
        """The same batch with hidden, weight and bias in `dtype`."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return Batch(self.hidden.to(dtype), self.weight.to(dtype), self.labels, bias)


def random_batch(
    shape: Sequence[int],
    vocab: int,
    hidden_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    ignored: float = 0.0,
    ignore_index: int = -100,
    spread: float = 1.0,
    seed: int = 0,
) -> Batch:
    """Uniform labels and normal hidden states and weights whose logits have standard deviation `spread`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    scale = math.sqrt(spread / math.sqrt(max(hidden_size, 1)))
    labels = torch.randint(vocab, tuple(shape), generator=generator)
    labels[torch.rand(tuple(shape), generator=generator) < ignored] = ignore_index
    return Batch(
        hidden=(scale * normal(*shape, hidden_size)).to(dtype),
        weight=(scale * normal(vocab, hidden_size)).to(dtype),
        labels=labels,
        bias=normal(vocab).to(dtype) if bias else None,
    )


def peaked_batch(
    sequences: int,
    tokens: int,
    vocab: int,
    hidden_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    spread: float = 4.0,
    seed: int = 0,
) -> Batch:
    """Logits of standard deviation `spread`, and labels drawn from the softmax itself: what a trained model sees."""
    batch = random_batch((sequences, tokens), vocab, hidden_size, dtype=dtype, spread=spread, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for hidden, labels in zip(batch.hidden, batch.labels, strict=True):
        probs = (hidden.float() @ batch.weight.float().T).softmax(-1)
        labels.copy_(torch.multinomial(probs, 1, generator=generator).squeeze(-1))
    return batch
