"""What the two ways of three products share: loss and gradients together in the forward; see `plan.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from spo_kernels.backends.contract import Backend, TokenStats
from spo_kernels.backends.registry import load_backend
from spo_kernels.engine.early import EarlyWork, Made
from spo_kernels.engine.gradients import HeadGradient
from spo_kernels.engine.head_slices import HeadSlices
from spo_kernels.engine.kept import KeptTiles
from spo_kernels.engine.kept_space import KeptShape
from spo_kernels.engine.label_layout import sum_segments, sum_sequences
from spo_kernels.engine.token_rows import TokenRows
from spo_kernels.losses.pairs import by_side
from spo_kernels.preference.batch import PairBatch
from spo_kernels.preference.kernel import PairKernel
from spo_kernels.preference.outcome import Outcome, TokenSums, summarise
from spo_kernels.preference.plan import PathPlan


@dataclass
class PairWork:
    """A batch while its gradients are made: tokens in order, sequence by sequence, chosen first."""

    batch: PairBatch
    plan: PathPlan
    hidden: Tensor  # [rows, H]
    head: HeadSlices
    backend: Backend

    @classmethod
    def of(cls, batch: PairBatch, plan: PathPlan) -> PairWork:
        """Of a batch whose plan is one of three products."""
        hidden = batch.policy.hidden
        backend = load_backend(batch.execution.backend)
        return cls(batch, plan, hidden.reshape(-1, hidden.shape[-1]), batch.policy.slices(), backend)

    def __post_init__(self) -> None:
        assert self.batch.host_lengths is not None
        self.counts: list[int] = self.batch.host_lengths  # [2B], tokens of each sequence
        self.bounds = [0, *accumulate(self.counts)]
        self.pairs = self.batch.pairs
        self.tokens = TokenRows.of(self.batch.tokens, self.batch.layout.shift, self.head.first)
        weights = self.batch.token_weights
        self.weights = None if weights is None else self.tokens.gather(weights)  # [n], what tokens weigh in the sums
        pilots = self.batch.pilots
        self.subsets = None if pilots is None else self.tokens.gather(pilots.subsets)  # [n]
        self.kernel = PairKernel.of(self.batch) if weights is None else None
        self.summaries: list[Tensor] = []  # the kernel's, of the pairs so far
        zero = torch.zeros((), device=self.hidden.device) if self.batch.token_metrics else None
        self.token_sums = None if zero is None else TokenSums(zero, zero, zero, zero)

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
            if not losses.requires_grad:
                return losses, torch.zeros_like(leaf)
            (slopes,) = torch.autograd.grad(losses, leaf, torch.full_like(losses, self.batch.scale))
        return losses.detach(), slopes

    def differentiate_tokens(self, stats: TokenStats, tokens: TokenRows, pairs: range) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and sums of consecutive pairs, and the whole loss's derivatives by their tokens, chosen first."""
        logp, weights, equal = tokens.masked(stats.logp), self.of_pairs(self.weights, pairs), self.equal_length(pairs)
        lengths, layout = self.lengths(pairs), self.batch.layout
        if self.kernel is not None:
            common = lengths if equal is None else equal
            summary, slopes = self.kernel.differentiate(logp, tokens, common, pairs, self.batch)
            self.summaries.append(summary)
            return summary[0], summary[5:].flatten(), slopes

        def sums_here(values: Tensor, weights: Tensor | None = None) -> Tensor:
            if equal is None:
                return sum_segments(values, lengths, weights)
            return sum_sequences(values.view(-1, equal), None, None if weights is None else weights.view(-1, equal))

        def sums_of(values: Tensor, weights: Tensor | None = None) -> Tensor:
            if layout.group is None:
                return sums_here(values, weights)
            return layout.joined(sums_here(values.double(), weights)).to(values.dtype)

        sums, names = sums_of(logp, weights), self.batch.token_outputs
        found = {name: sums_of(tokens.masked(getattr(stats, name))) for name in names}
        if self.batch.pilots is not None:
            reference = self.batch.pilots.reference.view(2, -1)[:, pairs.start : pairs.stop].flatten()
            found["pilot"] = sums_of(logp, self.of_pairs(self.subsets, pairs)) - reference
        losses, slopes = self.differentiate(sums, pairs, by_side(found) if found else None)
        if equal is None:
            slopes = slopes.repeat_interleave(lengths, output_size=logp.numel())
        else:
            slopes = slopes[:, None].expand(-1, equal).reshape(-1)
        # weights may be wider than the gradients
        return losses, sums, tokens.masked(slopes if weights is None else (slopes * weights).to(slopes.dtype))

    def of_pairs(self, values: Tensor | None, pairs: range) -> Tensor | None:
        """Per-token values of consecutive pairs, chosen first."""
        if values is None or len(pairs) == self.pairs:
            return values
        return torch.cat([values[part] for part in self.parts(pairs)])

    def parts(self, pairs: range) -> list[slice]:
        """The tokens of the chosen and of the rejected responses of consecutive pairs."""
        return [slice(self.bounds[first + pairs.start], self.bounds[first + pairs.stop]) for first in (0, self.pairs)]

    def lengths(self, pairs: range) -> Tensor:
        """Tokens of each sequence of consecutive pairs, chosen first; with those that are masked."""
        lengths, bounds = self.batch.lengths, self.batch.layout.cu_seqlens
        if self.tokens.mask is not None and bounds is not None:
            lengths = bounds.diff().long()
        if len(pairs) == self.pairs:
            return lengths
        both = lengths.view(2, -1)
        return both[:, pairs.start : pairs.stop].flatten()

    def equal_length(self, pairs: range) -> int | None:
        """The length of all sequences of consecutive pairs, where they have the same; ragged ones cost more steps."""
        counts = [self.counts[first + pair] for first in (0, self.pairs) for pair in pairs]
        return counts[0] if counts and counts[0] and min(counts) == max(counts) else None

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
        tokens=work.tokens,
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
