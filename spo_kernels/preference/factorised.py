"""Unscaled gradients of a pair, scaled once its coefficients are known: three products for pairs of any length."""

from __future__ import annotations

import torch
from torch import Tensor

from spo_kernels.backends.contract import TokenStats
from spo_kernels.engine.early import Made
from spo_kernels.engine.gradients import HeadGradient
from spo_kernels.engine.kept import KeptTiles
from spo_kernels.engine.token_rows import TokenRows
from spo_kernels.engine.workspace import spans
from spo_kernels.losses.pairs import coupling_of
from spo_kernels.preference.batch import PairBatch
from spo_kernels.preference.outcome import Outcome
from spo_kernels.preference.plan import PathPlan
from spo_kernels.preference.three_products import PairWork, run_way


def run(batch: PairBatch, plan: PathPlan) -> Outcome:
    """The batch's loss, differentiable once, and what its metrics are made of."""
    return run_way(batch, plan, _gradients)


def _gradients(work: PairWork, head_out: HeadGradient | None, grad_hidden: Tensor | None) -> Made:
    """Pair by pair: unscaled gradients from tiles of whole-vocabulary rows, scaled once both sums are known.

    Where the loss is of the margin alone, the rejected response's gradient is subtracted from the chosen one's.
    """
    assert head_out is not None
    wide = work.batch.policy.wide
    total = work.accumulator(head_out)
    first = total
    if work.order.pairs > 1:
        total.zero_()
        first = total.accumulator(wide)
    margin = coupling_of(work.batch.objective) == "margin"
    second = first if margin else total.accumulator(wide)
    sign = -1.0 if margin else 1.0
    tiles = work.tiles()
    found, sums = [], work.hidden.new_zeros((2, work.order.pairs), dtype=wide)
    layout = work.batch.layout
    for pair in range(work.order.pairs):
        chosen, rejected = pair, work.order.pairs + pair
        both = (
            _unscaled(tiles, work, chosen, 1.0, first, grad_hidden, fresh=True),
            _unscaled(tiles, work, rejected, sign, second, grad_hidden, fresh=not margin),
        )
        sums[:, pair] = layout.joined(torch.stack(both))
        losses, slopes = work.differentiate(sums[:, pair], range(pair, pair + 1))
        found.append(losses)
        if grad_hidden is not None:
            _scale_tokens_(grad_hidden, work, chosen, slopes[0])
            _scale_tokens_(grad_hidden, work, rejected, slopes[1] * sign)
        if first is total:
            first.scale_(slopes[0])
        else:
            total.add_(first, slopes[0])
        if not margin:
            total.add_(second, slopes[1])
    head_out.copy_(total)
    return Made(torch.cat(found), sums.flatten())


def _unscaled(
    tiles: KeptTiles,
    work: PairWork,
    sequence: int,
    sign: float,
    out: HeadGradient,
    grad_hidden: Tensor | None,
    *,
    fresh: bool,
) -> Tensor:
    """The sequence's log-probability; `sign` times its gradient into (`fresh`) or onto `out`."""
    if fresh and work.order.counts[sequence] == 0:
        out.zero_()
    total = torch.zeros((), dtype=torch.float64, device=work.hidden.device)
    first = work.order.bounds[sequence]
    for part in spans(work.order.counts[sequence], work.shape.rows):
        start, stop = first + part.start, first + part.stop
        weights = 1.0 if work.weights is None else work.weights[start:stop]

        tokens = work.order.tokens.part(start, stop)

        def coefficients(stats: TokenStats, weights: Tensor | float = weights, tokens: TokenRows = tokens) -> Tensor:
            # weights may be wider than the gradients
            return tokens.masked((torch.full_like(stats.max, sign) * weights).to(stats.max.dtype))

        stats = tiles.run(tokens, coefficients, out, grad_hidden, accumulate=not fresh)
        total += (tokens.masked(stats.logp) * weights).sum(dtype=torch.float64)
        work.count_metrics(tiles, stats, tokens, chosen=stats.max.numel() if sequence < work.order.pairs else 0)
        fresh = False
    return total


def _scale_tokens_(grad_hidden: Tensor, work: PairWork, sequence: int, factor: Tensor) -> None:
    """Multiply the rows of one sequence's tokens; 1024 at a time bound the temporary."""
    first = work.order.bounds[sequence]
    for part in spans(work.order.counts[sequence], 1024):
        rows = work.order.tokens.part(first + part.start, first + part.stop).rows
        grad_hidden[rows] = (grad_hidden[rows] * factor).to(grad_hidden.dtype)
