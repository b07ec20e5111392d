"""Sparse backwards where processes share the vocabulary: what is left out, and that they decide alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from spo_kernels import linear_logprob
from spo_kernels.engine import sparse
from spo_kernels.sparsity import Sparsity
from tests.sharded.inputs import alone, parts, random_inputs, worst
from tests.sharded.modes import alone_of, logprob, rows_of

TOLERANCE = 2.0**-6
SEEDS = 40


def everything_kept(mode: str, frozen: bool) -> dict[str, float]:
    """With a tolerance that no block is below, the backward over lists of blocks gives the exact gradient."""
    inputs = random_inputs(21, vocab=1100, tokens=40, bias=True)
    rows, group = parts(1100, (1, 2))[dist.get_rank()], dist.group.WORLD
    with mock.patch.object(sparse, "_WORTH", 2.0):
        run = logprob(frozen=frozen, sparsity=Sparsity(mode, 1e-12))
        ours = run(inputs, inputs.head(rows, vocab_group=group), inputs.ref_head())
    return worst(ours, rows_of(alone_of(inputs, logprob(frozen=frozen)), rows))


def peaked() -> tuple[torch.Tensor, Callable[[Sparsity], tuple[torch.Tensor, dict[str, Any]]]]:
    """Hidden's exact gradient, and a function to a sparse one with what is said of it."""
    inputs = random_inputs(22, vocab=2000, tokens=16, spread=40.0)
    rows, names = parts(2000, (1, 2))[dist.get_rank()], ("dropped_mass", "kept_share")
    exact = inputs.hidden.clone().requires_grad_()
    with alone():
        linear_logprob(exact, inputs.head(), inputs.labels).sum().backward()

    def sparsely(sparsity: Sparsity) -> tuple[torch.Tensor, dict[str, Any]]:
        hidden, head = inputs.hidden.clone().requires_grad_(), inputs.head(rows, vocab_group=dist.group.WORLD)
        found, extras = linear_logprob(hidden, head, inputs.labels, sparsity=sparsity, outputs=names)
        found.sum().backward()
        counted = inputs.labels != -100
        share = float(extras["kept_share"][counted].mean())
        largest = inputs.weight.norm(dim=-1).max()
        return hidden.grad, {"bound": extras["dropped_mass"] * largest, "kept": share, "minus kept": -share}

    return exact.grad, sparsely


def certified() -> dict[str, float]:
    """The largest error of a token's gradient as a share of what the dropped mass allows, and what was kept."""
    exact, sparsely = peaked()
    found, said = sparsely(Sparsity("certified", TOLERANCE))
    allowed = said.pop("bound")
    rounding = 1e-5 * exact.norm(dim=-1) + 1e-6
    return {"of the bound": float(((found - exact).norm(dim=-1) / (allowed + rounding)).max()), **said}


def unbiased() -> dict[str, float]:
    """How the mean over seeds errs, as a share of what draws without a bias would leave; and what was kept."""
    exact, sparsely = peaked()
    found = [sparsely(Sparsity("unbiased", 2.0**-3, seed)) for seed in range(SEEDS)]
    off = torch.stack([gradient for gradient, _ in found]) - exact
    left = off.mean(0).square().sum() / (off.square().sum() / SEEDS**2)
    said = found[0][1]
    said.pop("bound")
    return {"of the draws' error": float(left), **said}


def decided_together(shares: tuple[float, ...], frozen: bool) -> dict[str, float]:
    """One process would keep all of its blocks and the other none; in float64, see `replicas`."""
    inputs = random_inputs(23, vocab=1024, tokens=40, spread=0.1, dtype=torch.float64)
    rows, group = parts(1024, shares)[dist.get_rank()], dist.group.WORLD
    bias = torch.zeros(1024, dtype=torch.float64)
    bias[: parts(1024, shares)[0].stop] = 30.0
    labels = inputs.labels.where(inputs.labels == -100, inputs.labels % parts(1024, shares)[0].stop)
    inputs = replace(inputs, bias=bias, labels=labels)
    ours = logprob(frozen=frozen, sparsity="certified", outputs=("kept_share",))(
        inputs, inputs.head(rows, vocab_group=group), inputs.ref_head()
    )
    share = ours.pop("kept_share")[labels != -100].mean()
    theirs = alone_of(inputs, logprob(frozen=frozen))
    return {
        # the second process's rows have gradients of 1e-16, and may have none
        **worst(*({name: found[name] for name in ("logp", "hidden")} for found in (ours, theirs))),
        "kept": float(share),
        "minus kept": -float(share),
    }
