"""From the arguments of a call to a batch of pairs: each is checked here, once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spo_kernels.engine.checks import check_vector
from spo_kernels.engine.collectives import check_close
from spo_kernels.engine.divergence_ops import kl_divergence
from spo_kernels.engine.inputs import Execution, ModelInputs
from spo_kernels.engine.label_layout import LabelLayout
from spo_kernels.engine.subsets import PairTokens
from spo_kernels.engine.vocab_shard import VocabShard
from spo_kernels.losses.pairs import PILOTS, Objective, PairInputs, token_outputs_of, token_subsets_of
from spo_kernels.preference.batch import PairBatch, Pilots
from spo_kernels.preference.computed import Computed
from spo_kernels.preference.given import Given
from spo_kernels.preference.reference import Reference
from spo_kernels.sparsity import Sparsity


def resolve_batch(
    objective: Objective,
    layout: LabelLayout,
    policy: Given,
    reference: Given,
    pair_inputs: Mapping[str, Tensor] | None,
    *,
    reduction: str,
    token_metrics: bool,
    sparsity: str | Sparsity,
    workspace_bytes: int | None,
    backend: str | None,
) -> PairBatch:
    """Check every argument once, and derive what all ways to compute the loss share.

    Waits for a device once at most, for the lengths of the sequences where the host does not have them.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: An argument is wrong; the message names it.
    """
    labels, pairs = layout.labels, layout.check_pairs()
    assert policy.hidden is not None and policy.head is not None
    model = ModelInputs.resolve(policy.hidden, policy.head, labels)
    execution = Execution.resolve(workspace_bytes, backend, model, sparsity)
    of_tokens = token_outputs_of(objective)
    shares = None if PILOTS[0] in (pair_inputs or {}) else token_subsets_of(objective)
    ref = Reference.resolve(reference, policy, layout)
    ref.check_enough(model, kl="kl" in of_tokens, pilots=shares is not None)
    named = _pair_inputs(pair_inputs, pairs, labels, model.wide)
    if layout.group is not None:
        execution.check_same("head's sequence_group", layout.group, labels.device)
        _check_draws_none(shares)

    weights = policy.constant_weights("token_weights", labels)
    _check_close(model, layout, ref, weights, named)
    # an objective that asks for sums over tokens, or draws them, has all computed; else those of weight 0 are left out
    every = bool(of_tokens) or shares is not None
    skipped = (None, None) if every else (weights, None if ref.model is None else ref.weights)
    vocab = min(m.vocab for m in (model, ref.model) if m is not None)
    computed = Computed.find(layout, *skipped, vocab)

    sums, pilots = ref.sums, None
    logp = ref.of_tokens(layout, computed.counted, computed.theirs, model.wide, workspace_bytes, backend)
    if logp is not None:
        sums = layout.sum(logp, weights if ref.weights is None else ref.weights)
        if shares is not None:
            drawn_from = PairTokens.of(layout, computed.counted, computed.host.tokens)
            pilots = Pilots.draw(shares, drawn_from, layout, model, logp)
    sums = None if sums is None else sums.detach().to(model.wide)
    kl = None
    if "kl" in of_tokens and ref.model is not None:
        kl = kl_divergence(model, ref.model, computed.tokens, layout.shift, execution)
    return PairBatch(
        objective=objective,
        layout=layout,
        policy=model,
        tokens=computed.tokens,
        lengths=computed.lengths,
        host_lengths=computed.host.lengths,
        token_weights=weights,
        inputs=PairInputs(sums, layout.joined(computed.counts), named),
        kl=kl,
        pilots=pilots,
        execution=execution,
        token_metrics=token_metrics,
        reduced=reduction != "none",
        scale=1.0 / max(pairs, 1) if reduction == "mean" else 1.0,
    )


def _check_close(
    model: ModelInputs, layout: LabelLayout, ref: Reference, weights: Tensor | None, named: Mapping[str, Tensor]
) -> None:
    """Raise ValueError where processes that make one loss have other numbers for its pairs, or for the same tokens."""
    of_pairs = {"ref_logps": ref.sums, **{f"pair_inputs[{name!r}]": values for name, values in named.items()}}
    of_tokens = {"token_weights": weights, "ref_token_weights": ref.weights, "ref_logps of tokens": ref.token_logps}
    if isinstance(model.shard, VocabShard):
        check_close(model.shard.group, "head's vocab_group", {**of_pairs, **of_tokens}, layout.labels.device)
    if layout.group is not None:
        check_close(layout.group, "head's sequence_group", of_pairs, layout.labels.device)


def _check_draws_none(shares: object) -> None:
    """Raise ValueError where the objective draws tokens of responses that are on several processes."""
    if shares is not None:
        raise ValueError(
            "the objective draws tokens of whole responses, of which a process of head's sequence_group has a "
            'part: pass pair_inputs["chosen_pilot"] and ["rejected_pilot"]'
        )


def _pair_inputs(
    named: Mapping[str, Tensor] | None, pairs: int, labels: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The caller's per-pair inputs as constants of the dtype of the sums."""
    if named is None:
        return {}
    if not isinstance(named, Mapping):
        raise TypeError(f"pair_inputs must map names to tensors, got {type(named).__name__}")
    for name, value in named.items():
        check_vector(f"pair_inputs[{name!r}]", value, labels, (pairs,))
    return {name: value.detach().to(dtype) for name, value in named.items()}
