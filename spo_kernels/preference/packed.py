"""Whole pairs keep their logits until their coefficients are known: three products for any loss separable by pair."""

from __future__ import annotations

import torch
from torch import Tensor

from spo_kernels.backends.contract import TokenStats
from spo_kernels.engine.early import Made
from spo_kernels.engine.gradients import HeadGradient
from spo_kernels.engine.token_rows import TokenRows
from spo_kernels.preference.batch import PairBatch
from spo_kernels.preference.outcome import Outcome
from spo_kernels.preference.plan import PathPlan
from spo_kernels.preference.three_products import PairWork, run_way


def run(batch: PairBatch, plan: PathPlan) -> Outcome:
    """The batch's loss, differentiable once, and what its metrics are made of."""
    return run_way(batch, plan, _gradients)


def _gradients(work: PairWork, head_out: HeadGradient | None, grad_hidden: Tensor | None) -> Made:
    """Group by group: logits, the pairs' coefficients, and gradients from the same tile."""
    total = None if head_out is None else work.accumulator(head_out)
    groups = [(pairs, work.order.select(pairs)) for pairs in work.plan.groups]
    tiles = work.tiles()
    found: list[tuple[Tensor, Tensor]] = []
    for number, (pairs, tokens) in enumerate(groups):

        def coefficients(stats: TokenStats, pairs: range = pairs, tokens: TokenRows = tokens) -> Tensor:
            losses, sums, slopes = work.differentiate_tokens(stats, tokens, pairs)
            found.append((losses, sums.view(2, -1)))
            return slopes

        stats = tiles.run(tokens, coefficients, total, grad_hidden, accumulate=number > 0)
        work.count_metrics(tiles, stats, tokens, chosen=sum(work.order.counts[pairs.start : pairs.stop]))
    if head_out is not None and total is not None:
        head_out.copy_(total)
    losses = torch.cat([losses for losses, _ in found])
    sums = torch.cat([sums for _, sums in found], dim=1).flatten()
    return Made(losses, sums, tiles.left)
