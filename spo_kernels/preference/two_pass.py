"""Any objective, by autograd on log-probabilities: logits once for them, and again for the gradients.

Four products with a trained head; 1 + 3ρ where the backward is sparse.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spo_kernels.losses.pairs import by_side
from spo_kernels.preference.batch import PairBatch
from spo_kernels.preference.kernel import PairKernel
from spo_kernels.preference.outcome import Outcome, TokenSums, summarise
from spo_kernels.preference.plan import PathPlan


def run(batch: PairBatch, plan: PathPlan) -> Outcome:
    """The batch's loss, differentiable, and what its metrics are made of."""
    layout = batch.layout
    logp, extras = batch.call().run()
    sparsity = _sparsity_metrics(extras, batch)
    token_sums = None
    if batch.token_metrics:
        correct, logits = (layout.sum_here(extras[name].float()) for name in ("correct", "mean_logit"))
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
    values = {"logp": logp, **extras}
    named = batch.sums_of_tokens(lambda name: values[name].detach(), layout.sum, batch.pilots)
    if batch.kl is not None:
        named |= by_side({"kl": layout.sum(batch.kl)})
    inputs = batch.inputs
    if named:
        inputs = replace(inputs, named={**inputs.named, **named})
    pairs = inputs.pairs(layout.sum(logp, batch.token_weights))
    losses = batch.losses(pairs)
    loss = losses.sum() * batch.scale if batch.reduced else losses
    return Outcome(loss, summarise(batch.objective, pairs, losses), token_sums, sparsity)


def _sparsity_metrics(extras: dict[str, Tensor], batch: PairBatch) -> dict[str, Tensor]:
    """What the backward will leave out; nothing where that was not asked for."""
    dropped, kept = extras["dropped_mass"].detach(), extras["kept_share"].detach()
    layout, most = batch.layout, dropped.numel()
    if layout.group is not None:
        most = int(layout.largest(torch.tensor(most, device=dropped.device)))
    if most == 0:
        return {}
    tokens = layout.joined(batch.lengths.sum()).clamp_min(1)
    return {
        "sparsity/kept": (layout.joined(kept.sum()) / tokens).float(),
        "sparsity/dropped_mass_max": layout.largest(torch.nn.functional.pad(dropped.flatten(), (0, 1)).amax()).float(),
        "sparsity/dropped_mass_mean": (layout.joined(dropped.sum()) / tokens).float(),
    }
