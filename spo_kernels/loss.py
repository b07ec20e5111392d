"""`fused_spo_loss`: pairwise preference losses straight from hidden states."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spo_kernels.backends.products import accumulator_dtype
from spo_kernels.engine.checks import check_head_inputs, check_tensor, check_token_weights, check_vector
from spo_kernels.kl import linear_kl
from spo_kernels.logprob import OUTPUTS, LogprobCall, prepare_call
from spo_kernels.losses import Objective, PairLogps, implicit_rewards, named_loss
from spo_kernels.losses.pairs import PairInputs, by_side, check_choice, pair_losses, token_outputs_of
from spo_kernels.preference.kernel import PairKernel
from spo_kernels.preference.plan import PATHS
from spo_kernels.preference.three_products import plan_path, three_products
from spo_kernels.sequences import (
    check_cu_seqlens,
    count_tokens,
    counted_labels,
    sequence_logps,
    sum_sequences,
    weighted_labels,
)
from spo_kernels.sparsity import Sparsity


def fused_spo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    loss: str | Objective = "spo",
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    spo_value: Tensor | None = None,
    pair_inputs: Mapping[str, Tensor] | None = None,
    token_weights: Tensor | None = None,
    ref_token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    reduction: str = "mean",
    token_metrics: bool = False,
    pair_logps: bool = False,
    path: str | None = None,
    sparsity: str | Sparsity = "exact",
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Preference loss of B pairs and its metrics, without materialising logits; differentiable.

    Equivalent PyTorch, padded::

        logp = token_weights * linear_logprob_ref(hidden, weight, labels, ...)       # full logits
        chosen, rejected = logp.sum(-1).chunk(2)
        losses = objective(PairLogps(chosen, rejected, *ref_logps.chunk(2), ...))
        loss = losses.mean()

    Args:
        hidden: Policy's last hidden states, chosen rows first: `[2B, T, H]` padded, or packed `[N, H]` with
            `cu_seqlens`.
        weight: `[V, H]` policy head. Frozen (no gradient): 2 products; trained: 3 or 4, see `path`.
        labels: `[2B, T]` or `[N]` int64; `ignore_index` for prompt and padding.
        loss: A name in `spo_kernels.losses.LOSSES` (its default hyperparameters; docs/objectives.md), or any
            objective: a callable from `PairLogps` to losses `[B]`.
        bias: `[V]` policy head bias.
        ref_logps: `[2B]` the reference's log-probabilities summed over each response, chosen first.
        ref_hidden, ref_weight, ref_bias: Or the reference's hidden states (hidden's shape up to H) and head,
            evaluated here without gradient. Neither is needed by reference-free objectives.
        spo_value: `[B]` value of the lower-level SFT loss for `SPO(penalty="hinge", value="input")`.
        pair_inputs: Further constants `[B]` by name, for objectives that ask for them, such as ODPO's "offset".
        token_weights: What each label's log-probability counts in its sequence's sum, shaped like `labels`; finite,
            taken as constants; 1 where None. See `spo_kernels/extras/token_weights.py`. Sequence lengths stay the
            number of labels that are not ignored, so that a weight of 0 is the limit of a small one; but tokens of
            weight 0 take part in no product (unless the objective has `token_outputs`) and in no token metric.
        ref_token_weights: The same for the reference evaluated here; `token_weights` where None. Sums that are
            given as `ref_logps` must have been weighted by the caller, see `sequence_logps`.
        cu_seqlens: `[2B + 1]` bounds of packed sequences: B chosen, then B rejected.
        logit_scale, logit_softcap, ignore_index, shift, workspace_bytes, backend: As in `linear_logprob`;
            with `shift`, each sequence's first label is not predicted.
        reduction: Over pairs: "mean", "sum" or "none".
        path: "packed" or "factorised" (three products), "two_pass" (four), or None for the cheapest that the
            workspace allows; matters to a trained head only. See `spo_kernels/preference/plan.py`.
        sparsity: "exact", or which blocks of the vocabulary the policy's backward multiplies: "certified", "unbiased"
            or a `Sparsity`, as in `linear_logprob`; takes the two-pass path, whose 4 products become 1 + 3ρ.
        token_metrics: Also report `entropy` (nats, mean over all counted policy tokens) and
            `mean_token_accuracy` (share of the chosen responses' tokens with the largest logit).
        pair_logps: Also report `pair_logps`, `[2B]`: the policy's log-probabilities summed over each response,
            detached, chosen first.

    Returns:
        The loss (0-d, or `[B]` for "none"; 0 for an empty batch), and detached 0-d metrics under TRL's names:
        loss, rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies, logps/chosen,
        logps/rejected (means over pairs; nan for an empty batch). With `sparsity`: sparsity/kept (the mean of ρ over
        tokens), sparsity/dropped_mass_max and sparsity/dropped_mass_mean (softmax mass left out, over tokens).

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: An argument is wrong; the message names it.
    """
    objective = named_loss(loss) if isinstance(loss, str) else loss
    if not callable(objective) or isinstance(objective, type):
        raise TypeError(f"loss must be a name or an objective, such as DPO(beta=0.1), got {loss!r}")
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if path is not None:
        check_choice("path", path, PATHS)
    pairs_count = _check_pairs(hidden, labels, cu_seqlens)
    check_head_inputs(hidden, weight, bias, labels)
    options: dict[str, Any] = {
        "logit_scale": logit_scale,
        "logit_softcap": logit_softcap,
        "ignore_index": ignore_index,
        "shift": shift,
        "workspace_bytes": workspace_bytes,
        "backend": backend,
    }
    labels = counted_labels(labels, cu_seqlens, ignore_index, shift)
    if ref_token_weights is not None and ref_hidden is None:
        raise ValueError("ref_token_weights needs ref_hidden and ref_weight: ref_logps are already summed")
    token_weights = _constant_weights("token_weights", token_weights, labels)
    ref_token_weights = _constant_weights("ref_token_weights", ref_token_weights, labels)
    names = token_outputs_of(objective)
    computed = labels if names else weighted_labels(labels, token_weights, ignore_index)
    moments = [name for name in names if name in OUTPUTS]
    outputs = (*moments, *(("correct", "entropy") if token_metrics else ()))
    call = prepare_call(
        hidden,
        weight,
        computed,
        bias=bias,
        outputs=outputs,
        outputs_carry_grad=False,
        sparsity=sparsity,
        **options,
    )
    dtype = accumulator_dtype(call.hidden.dtype)
    reference = _reference_sums(
        pairs_count,
        dtype,
        labels,
        ref_logps,
        ref_hidden,
        ref_weight,
        ref_bias,
        token_weights if ref_token_weights is None else ref_token_weights,
        cu_seqlens,
        options,
    )
    if spo_value is not None:
        check_vector("spo_value", spo_value, pairs_count, labels.device)
        spo_value = spo_value.detach().to(dtype)
    inputs = PairInputs(
        reference=reference,
        lengths=count_tokens(labels, cu_seqlens, ignore_index),
        sft_value=spo_value,
        named=_pair_inputs({} if pair_inputs is None else pair_inputs, pairs_count, labels.device, dtype),
    )
    tokens = inputs.lengths if computed is labels else count_tokens(computed, cu_seqlens, ignore_index)
    kl = None
    if "kl" in names:
        if ref_hidden is None or ref_weight is None:
            raise ValueError("the objective needs the KL divergence from the reference: pass ref_hidden and ref_weight")
        kl = linear_kl(hidden, weight, ref_hidden, ref_weight, labels, bias=bias, ref_bias=ref_bias, **options)
    plan = plan_path(call, objective, tokens, path, per_pair=reduction == "none")
    scale = 1.0 / max(pairs_count, 1) if reduction == "mean" else 1.0
    if plan.path == "two_pass":
        result, metrics, token_sums = _two_pass(
            call, objective, inputs, kl, token_weights, cu_seqlens, reduction, scale
        )
    else:
        result, losses, sums, token_sums = three_products(call, objective, inputs, tokens, token_weights, plan, scale)
        metrics = _metrics(objective, inputs.pairs(sums), losses)
    if not pair_logps:
        del metrics["pair_logps"]
    if token_metrics:
        # TRL's: entropy over all counted tokens, accuracy over those of the chosen responses
        metrics["entropy"] = token_sums["entropy"].float() / tokens.sum().clamp_min(1)
        chosen_tokens = tokens[:pairs_count].sum().clamp_min(1)
        metrics["mean_token_accuracy"] = token_sums["mean_token_accuracy"] / chosen_tokens
    return result, metrics


def _two_pass(
    call: LogprobCall,
    objective: Objective,
    inputs: PairInputs,
    kl: Tensor | None,
    token_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    reduction: str,
    scale: float,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The result, pair metrics and token metric sums, by autograd on log-probabilities."""
    logp, extras = call.run()
    sparse = _sparsity_metrics(extras, (call.labels != call.options.ignore_index).sum())
    token_sums = (
        {}
        if not call.options.moments
        else {
            "entropy": extras["entropy"].detach().sum(),
            "mean_token_accuracy": sum_sequences(extras["correct"].float(), cu_seqlens).chunk(2)[0].sum(),
        }
    )
    values = {name: value.detach() for name, value in ({"logp": logp} | extras).items()}
    if kl is not None:
        values["kl"] = kl
    found = by_side({name: sum_sequences(values[name], cu_seqlens) for name in token_outputs_of(objective)})
    inputs = replace(inputs, named={**inputs.named, **found})
    kernel = None
    if reduction != "none" and token_weights is None:
        kernel = PairKernel.of(objective, inputs, call.options.backend)
    if kernel is not None:
        result, metrics = kernel.loss(logp, call.labels, cu_seqlens, call.options.ignore_index, scale)
        return result, metrics | sparse, token_sums
    sums = sum_sequences(logp, cu_seqlens, token_weights)
    losses = pair_losses(objective, inputs.pairs(sums))
    metrics = _metrics(objective, inputs.pairs(sums), losses)
    return (losses if reduction == "none" else losses.sum() * scale), metrics | sparse, token_sums


def _sparsity_metrics(extras: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """What the backward will leave out; nothing where that was not asked for."""
    dropped, kept = extras["dropped_mass"].detach(), extras["kept_share"].detach()
    if dropped.numel() == 0:
        return {}
    return {
        "sparsity/kept": (kept.sum() / tokens.clamp_min(1)).float(),
        "sparsity/dropped_mass_max": dropped.amax().float(),
        "sparsity/dropped_mass_mean": (dropped.sum() / tokens.clamp_min(1)).float(),
    }


def _check_pairs(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number of pairs B, from shapes alone."""
    check_tensor("hidden", hidden)
    check_tensor("labels", labels)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, hidden)
        sequences = cu_seqlens.numel() - 1
        if sequences % 2:
            raise ValueError(
                f"cu_seqlens must bound an even number of sequences (B chosen, B rejected), got {sequences}"
            )
        return sequences // 2
    if hidden.ndim != 3:
        raise ValueError(f"hidden must be [2B, T, H], or [N, H] with cu_seqlens; got {list(hidden.shape)}")
    if hidden.shape[0] % 2:
        raise ValueError(f"hidden must hold B chosen rows, then B rejected ones; got {hidden.shape[0]} rows")
    return hidden.shape[0] // 2


def _constant_weights(name: str, weights: Tensor | None, labels: Tensor) -> Tensor | None:
    """The caller's token weights, checked."""
    if weights is None:
        return None
    check_token_weights(name, weights, labels)
    return weights.detach()


def _pair_inputs(
    named: Mapping[str, Tensor], pairs_count: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The caller's per-pair inputs as constants of the dtype of the sums."""
    if not isinstance(named, Mapping):
        raise TypeError(f"pair_inputs must map names to tensors, got {type(named).__name__}")
    for name, value in named.items():
        check_vector(f"pair_inputs[{name!r}]", value, pairs_count, device)
    return {name: value.detach().to(dtype) for name, value in named.items()}


def _reference_sums(
    pairs_count: int,
    dtype: torch.dtype,
    labels: Tensor,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    token_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    options: dict[str, Any],
) -> Tensor | None:
    """The reference's `[2B]` sequence sums, given or computed; None without a reference."""
    if ref_logps is not None:
        if any(given is not None for given in (ref_hidden, ref_weight, ref_bias)):
            raise ValueError("pass either ref_logps, or ref_hidden with ref_weight and ref_bias, not both")
        check_vector("ref_logps", ref_logps, 2 * pairs_count, labels.device)
        return ref_logps.detach().to(dtype)
    if ref_hidden is None and ref_weight is None and ref_bias is None:
        return None
    if ref_hidden is None or ref_weight is None:
        missing = "ref_weight" if ref_weight is None else "ref_hidden"
        raise ValueError(f"ref_hidden and ref_weight go together; {missing} is missing")
    check_head_inputs(ref_hidden, ref_weight, ref_bias, labels, prefix="ref_")
    with torch.no_grad():
        sums = sequence_logps(
            ref_hidden,
            ref_weight,
            labels,
            bias=ref_bias,
            cu_seqlens=cu_seqlens,
            token_weights=token_weights,
            **options,
        )
    return sums.to(dtype)


def _metrics(objective: Objective, pairs: PairLogps, losses: Tensor) -> dict[str, Tensor]:
    """Means over pairs under TRL's names, and `pair_logps`."""
    chosen, rejected = implicit_rewards(objective, pairs)
    values = {
        "loss": losses,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
    }
    means = {name: value.detach().float().mean() for name, value in values.items()}
    return {**means, "pair_logps": torch.cat([pairs.chosen, pairs.rejected]).detach()}
