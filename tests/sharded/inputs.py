"""Inputs that every process makes alike, the parts that each is given, and comparisons with one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from spo_kernels import LMHead
from spo_kernels.head import LoRA
from spo_kernels.losses import state

# of what a process alone finds, in float32; on one machine errors are the same bits in each run
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Inputs:
    """A batch of pairs and two models, whole."""

    hidden: Tensor  # [2B, T, H], or [N, H]
    labels: Tensor
    weight: Tensor
    bias: Tensor | None
    ref_hidden: Tensor
    ref_weight: Tensor
    token_weights: Tensor
    cu_seqlens: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of the heads
    lora: tuple[Tensor, Tensor] | None = None

    def head(self, rows: slice = slice(None), **groups: Any) -> LMHead:
        """The policy's, or a part of it, with leaves of its own."""
        weight = self.weight[rows].clone().requires_grad_(self.lora is None)
        bias = None if self.bias is None else self.bias[rows].clone().requires_grad_(self.lora is None)
        lora: tuple[LoRA, ...] = ()
        if self.lora is not None:
            a, b = self.lora[0].clone(), self.lora[1][rows].clone()
            lora = (LoRA(a.requires_grad_(), b.requires_grad_(), 0.5),)
        return LMHead(weight, bias, lora=lora, **self.options, **groups)

    def ref_head(self, rows: slice = slice(None), **groups: Any) -> LMHead:
        return LMHead(self.ref_weight[rows].clone(), **self.options, **groups)


def random_inputs(
    seed: int,
    *,
    pairs: int = 3,
    tokens: int = 7,
    vocab: int = 300,
    width: int = 16,
    ignored: float = 0.3,
    bias: bool = False,
    packed: bool = False,
    lora: bool = False,
    spread: float = 1.0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Inputs:
    """Logits of standard deviation `spread`; sequences of different lengths, some of them maybe empty."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).mul(spread**0.5 * width**-0.25).to(dtype)

    shape: tuple[int, ...] = (2 * pairs, tokens)
    bounds = None
    if packed:
        lengths = torch.randint(0, tokens + 1, (2 * pairs,), generator=generator)
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        shape = (int(bounds[-1]),)
    labels = torch.randint(vocab, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = -100
    return Inputs(
        hidden=normal(*shape, width),
        labels=labels,
        weight=normal(vocab, width),
        bias=normal(vocab) if bias else None,
        ref_hidden=normal(*shape, width),
        ref_weight=normal(vocab, width),
        token_weights=torch.rand(shape, generator=generator).mul(2).floor_() + torch.rand(shape, generator=generator),
        cu_seqlens=bounds,
        options=options,
        lora=(normal(3, width), normal(vocab, 3)) if lora else None,
    )


def parts(total: int, shares: tuple[float, ...]) -> list[slice]:
    """0..total in consecutive slices of about these shares, none of them empty where there is enough."""
    bounds = [round(total * sum(shares[:i]) / sum(shares)) for i in range(len(shares) + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def token_part(inputs: Inputs, rank: int, shares: tuple[float, ...]) -> tuple[Inputs, Tensor]:
    """A process's tokens of each sequence, and which of all tokens they are, in the order of `labels` there."""
    if inputs.cu_seqlens is None:
        mine = parts(inputs.labels.shape[1], shares)[rank]
        places = torch.arange(inputs.labels.numel()).view(inputs.labels.shape)[:, mine]
        bounds = None
    else:
        found = []
        for start, stop in pairwise(inputs.cu_seqlens.tolist()):
            part = parts(stop - start, shares)[rank]
            found.append(torch.arange(start + part.start, start + part.stop))
        places = torch.cat([*found, torch.empty(0, dtype=torch.int64)])
        bounds = torch.nn.functional.pad(
            torch.tensor([len(part) for part in found], dtype=torch.int64).cumsum(0), (1, 0)
        )

    def of(values: Tensor) -> Tensor:
        return values.flatten(0, inputs.labels.ndim - 1)[places]

    taken = {name: of(getattr(inputs, name)) for name in ("hidden", "labels", "ref_hidden", "token_weights")}
    return replace(inputs, cu_seqlens=bounds, **taken), places.flatten()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, objectives see no other process."""
    with mock.patch.object(state, "_together", lambda: False):
        yield


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each, relative to the largest value. Both have the same names.

    What is a difference of larger numbers is compared with those: rewards with β times log-probabilities, margins with
    the rewards too, means of logits with the logits' spread, 1, and divergences with their normalisers, some 4 or more
    (whose last bit alone is 5e-7). What a sparse backward keeps is not compared: blocks differ.
    """
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())
    errors, minuends = {}, expected.get("reward minuends", torch.zeros(1))
    for name, ours in found.items():
        if name.startswith("sparsity/"):
            continue
        theirs = expected[name]
        assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
        ours, theirs = (torch.nn.functional.pad(v.detach().double().flatten(), (0, 1)) for v in (ours, theirs))
        scale = float(theirs.nan_to_num().abs().max())
        if name.startswith("rewards/"):
            rewards = (value for key, value in expected.items() if key.startswith("rewards/") and value.numel())
            scale = max(scale, float(torch.nn.functional.pad(minuends, (0, 1)).abs().max()))
            if name == "rewards/margins":
                scale = max(scale, *(float(value.nan_to_num().abs().max()) for value in rewards))
        elif name.startswith("logits/") or name in ("mean_logit", "kl"):
            scale = max(scale, 4.0 if name == "kl" else 1.0)
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())
        off = ((ours - theirs).abs() / max(scale, 1e-12)).masked_fill(same, 0.0)
        errors[name] = float(off.nan_to_num(torch.inf).max())
    return errors
