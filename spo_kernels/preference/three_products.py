"""What the two ways of three products share: loss and gradients together in the forward; see `plan.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from spo_kernels.backends.contract import Backend, TokenStats
from spo_kernels.backends.pair_form import logps_of
from spo_kernels.backends.registry import load_backend
from spo_kernels.engine.early import EarlyWork, Made
from spo_kernels.engine.gradients import HeadGradient
from spo_kernels.engine.head_slices import HeadSlices
from spo_kernels.engine.kept import KeptTiles
from spo_kernels.engine.kept_space import KeptShape
from spo_kernels.engine.token_rows import TokenRows
from spo_kernels.preference.batch import PairBatch, Pilots
from spo_kernels.preference.kernel import PairKernel
from spo_kernels.preference.order import PairOrder
from spo_kernels.preference.outcome import Outcome, TokenSums, summarise
from spo_kernels.preference.plan import PathPlan


@dataclass
class PairWork:
    """A batch while its gradients are made."""

    batch: PairBatch
    plan: PathPlan
    hidden: Tensor  # [rows, H]
    head: HeadSlices
    backend: Backend
    order: PairOrder
    weights: Tensor | None  # [n], what tokens weigh in the sums
    pilots: Pilots | None  # of an objective that asks for them; subsets [n]
    kernel: PairKernel | None
    token_sums: TokenSums | None
    summaries: list[Tensor] = field(default_factory=list)  # the kernel's, of the pairs so far

    @classmethod
    def of(cls, batch: PairBatch, plan: PathPlan) -> PairWork:
        """Of a batch whose plan is one of three products."""
        hidden, head, weights, pilots = batch.policy.hidden, batch.policy.slices(), batch.token_weights, batch.pilots
        order = PairOrder.of(batch, head.first)
        zero = torch.zeros((), device=hidden.device) if batch.token_metrics else None
        return cls(
            batch,
            plan,
            hidden.reshape(-1, hidden.shape[-1]),
            head,
            load_backend(batch.execution.backend),
            order,
            weights=None if weights is None else order.tokens.gather(weights),
            pilots=None if pilots is None else replace(pilots, subsets=order.tokens.gather(pilots.subsets)),
            kernel=PairKernel.of(batch) if weights is None else None,
            token_sums=None if zero is None else TokenSums(zero, zero, zero, zero),
        )

    @property
    def shape(self) -> KeptShape:
        """Of the tile."""
        assert self.plan.shape is not None
        return self.plan.shape

    def tiles(self) -> KeptTiles:
        """The tile."""
        return KeptTiles(
            self.hidden,
            self.head,
            self.backend,
            self.shape,
            moments=self.batch.moments,
            mean_logits=self.batch.token_metrics,
        )

    def accumulator(self, head_out: HeadGradient) -> HeadGradient:
        """Where the head's gradient is summed: itself, or an accumulator beside it. Not written yet."""
        return head_out.accumulator(self.batch.policy.wide) if self.shape.sum_apart else head_out

    def differentiate(
        self, sums: Tensor, pairs: range, named: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses of consecutive pairs, and the whole loss's derivatives by their log-probabilities, chosen first.

        `named` are inputs of these pairs beside the call's.
        """
        with torch.enable_grad():
            leaf = sums.detach().requires_grad_()
            seen = self.batch.inputs.pairs(leaf, pairs.start, pairs.stop)
            if named:
                seen = replace(seen, inputs={**seen.inputs, **named})
            losses = self.batch.losses(seen)
            (slopes,) = torch.autograd.grad(losses, leaf, torch.full_like(losses, self.batch.scale))
        return losses.detach(), slopes

    def differentiate_tokens(self, stats: TokenStats, tokens: TokenRows, pairs: range) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and sums of consecutive pairs, and the whole loss's derivatives by their tokens, chosen first."""
        order, logp = self.order, tokens.masked(stats.logp)
        if self.kernel is not None:
            lengths = order.equal_length(pairs) or order.lengths_of(pairs)
            summary, slopes = self.kernel.differentiate(logp, tokens, lengths, pairs, self.batch)
            self.summaries.append(summary)
            return summary[0], logps_of(summary), slopes

        sum_of = partial(self.batch.layout.summed, partial(order.sum, pairs))
        weights, pilots = order.values_of(self.weights, pairs), self.pilots
        if pilots is not None:
            subsets, reference = order.values_of(pilots.subsets, pairs), pilots.reference.view(2, -1)
            assert subsets is not None
            pilots = Pilots(subsets, reference[:, pairs.start : pairs.stop].flatten())
        sums = sum_of(logp, weights)
        named = self.batch.sums_of_tokens(lambda name: tokens.masked(getattr(stats, name)), sum_of, pilots)
        losses, slopes = self.differentiate(sums, pairs, named)
        slopes = order.repeat(pairs, slopes)
        # weights may be wider than the gradients
        return losses, sums, tokens.masked(slopes if weights is None else (slopes * weights).to(slopes.dtype))

    def count_metrics(self, tiles: KeptTiles, stats: TokenStats, tokens: TokenRows, chosen: int) -> None:
        """Add a tile's tokens to the token metrics; the first `chosen` of them belong to chosen responses."""
        before, n = self.token_sums, stats.max.numel()
        if before is None or tiles.logit_sums is None:
            return
        logits, correct = tokens.masked(tiles.logit_sums.means(n)), tokens.masked(stats.label_logit == stats.max)
        self.token_sums = TokenSums(
            entropy=before.entropy + tokens.masked(stats.entropy).sum(),
            correct_chosen=before.correct_chosen + correct[:chosen].sum().float(),
            chosen_logits=before.chosen_logits + logits[:chosen].sum(),
            rejected_logits=before.rejected_logits + logits[chosen:].sum(),
        )


# see `EarlyWork.make`; gives losses [B] and sums [2B]
Way = Callable[[PairWork, HeadGradient | None, Tensor | None], Made]


def run_way(batch: PairBatch, plan: PathPlan, way: Way) -> Outcome:
    """The batch's loss, differentiable once, and what its metrics are made of."""
    work = PairWork.of(batch, plan)
    early = EarlyWork(
        name="fused_spo_loss",
        again="pass path='two_pass'",
        head=work.head,
        backend=work.backend,
        wide=batch.policy.wide,
        tokens=work.order.tokens,
        scale=batch.scale,
        make=partial(way, work),
        adds_to_grad=batch.policy.adds_to_grad,
    )
    loss, losses, sums = early.run(batch.policy)
    if work.summaries:
        summary = work.summaries[0] if len(work.summaries) == 1 else torch.cat(work.summaries, 1)
    else:
        summary = summarise(batch.objective, batch.inputs.pairs(sums), losses)
    return Outcome(loss, summary, work.token_sums)
