"""Any objective, by autograd on log-probabilities: logits once for them, and again for the gradients.

Four products with a trained head; 1 + 3ρ where the backward is sparse.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from spo_kernels.losses.pairs import by_side, pair_losses
from spo_kernels.preference.batch import PairBatch
from spo_kernels.preference.kernel import PairKernel
from spo_kernels.preference.outcome import Outcome, TokenSums, summarise
from spo_kernels.preference.plan import PathPlan


def run(batch: PairBatch, plan: PathPlan) -> Outcome:
    """The batch's loss, differentiable, and what its metrics are made of."""
    layout = batch.layout
    logp, extras = batch.call().run()
    sparsity = _sparsity_metrics(extras, batch.lengths)
    token_sums = None
    if batch.token_metrics:
        correct, logits = layout.sum(extras["correct"].float()), layout.sum(extras["mean_logit"])
        token_sums = TokenSums(
            entropy=extras["entropy"].detach().sum(),
            correct_chosen=correct[: batch.pairs].sum(),
            chosen_logits=logits[: batch.pairs].sum(),
            rejected_logits=logits[batch.pairs :].sum(),
        )
    kernel = PairKernel.of(batch) if batch.reduced and batch.token_weights is None else None
    if kernel is not None:
        loss, summary = kernel.loss(logp, batch)
        return Outcome(loss, summary, token_sums, sparsity)
    inputs, values = batch.inputs, {"logp": logp.detach(), **extras}
    found = {name: layout.sum(values[name].detach()) for name in batch.token_outputs}
    if batch.kl is not None:
        found["kl"] = layout.sum(batch.kl)
    if batch.pilots is not None:
        found["pilot"] = layout.sum(logp.detach(), batch.pilots.subsets) - batch.pilots.reference
    if found:
        inputs = replace(inputs, named={**inputs.named, **by_side(found)})
    pairs = inputs.pairs(layout.sum(logp, batch.token_weights))
    losses = pair_losses(batch.objective, pairs)
    loss = losses.sum() * batch.scale if batch.reduced else losses
    return Outcome(loss, summarise(batch.objective, pairs, losses), token_sums, sparsity)


def _sparsity_metrics(extras: dict[str, Tensor], lengths: Tensor) -> dict[str, Tensor]:
    """What the backward will leave out; nothing where that was not asked for."""
    dropped, kept = extras["dropped_mass"].detach(), extras["kept_share"].detach()
    if dropped.numel() == 0:
        return {}
    tokens = lengths.sum().clamp_min(1)
    return {
        "sparsity/kept": (kept.sum() / tokens).float(),
        "sparsity/dropped_mass_max": dropped.amax().float(),
        "sparsity/dropped_mass_mean": (dropped.sum() / tokens).float(),
    }
