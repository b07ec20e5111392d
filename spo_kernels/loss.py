"""`fused_spo_loss`: pairwise preference losses straight from hidden states."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from spo_kernels.arguments import check_choice, check_flag
from spo_kernels.engine.agreement import check_alike
from spo_kernels.engine.label_layout import LabelLayout
from spo_kernels.engine.renamed import refuses_old_names
from spo_kernels.head import LMHead, sequence_group
from spo_kernels.losses import Objective
from spo_kernels.losses.registry import resolve_objective
from spo_kernels.preference import factorised, packed, two_pass
from spo_kernels.preference.given import Given
from spo_kernels.preference.plan import PATHS, plan_path
from spo_kernels.preference.resolve import resolve_batch
from spo_kernels.sparsity import Sparsity

_WAYS = {"packed": packed.run, "factorised": factorised.run, "two_pass": two_pass.run}


@refuses_old_names
def fused_spo_loss(
    hidden: Tensor,
    head: Tensor | LMHead,
    labels: Tensor,
    *,
    loss: str | Objective = "spo",
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_head: Tensor | LMHead | None = None,
    pair_inputs: Mapping[str, Tensor] | None = None,
    token_weights: Tensor | None = None,
    ref_token_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int | None = -100,
    shift: bool = False,
    reduction: str = "mean",
    token_metrics: bool = False,
    pair_logps: bool = False,
    path: str | None = None,
    sparsity: str | Sparsity = "exact",
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Preference loss of B pairs and its metrics, tile by tile in a budget of memory; differentiable.

    Equivalent PyTorch, padded::

        logp = token_weights * log_softmax(logits).gather(labels)        # full logits, as in `linear_logprob`
        chosen, rejected = logp.sum(-1).chunk(2)
        losses = objective(PairLogps(chosen, rejected, *ref_logps.chunk(2), ...))
        loss = losses.mean()

    Args:
        hidden: Policy's last hidden states, chosen rows first: `[2B, T, H]` padded, or packed `[N, H]` with
            `cu_seqlens`.
        head: The policy's: its weight `[V, H]`, or an `LMHead` where there is a bias, a scale or a softcap, such as
            `LMHead.of(model)`. Frozen (no gradient): 2 products; trained: 3 or 4, see `path`.
        labels: `[2B, T]` or `[N]` int64; `ignore_index` for prompt and padding.
        loss: A name in `spo_kernels.losses.LOSSES` (its default hyperparameters; docs/objectives.md), or any
            objective: a callable from `PairLogps` to losses `[B]`.
        ref_logps: `[2B]` the reference's log-probabilities summed over each response, chosen first; or those of the
            tokens, shaped like `labels` and as `linear_logprob` gives them (`[N]` packed, unless N is 2B), for token
            weights and for objectives that draw tokens.
        ref_hidden, ref_head: Or the reference's hidden states (hidden's shape up to H) and head, evaluated here
            without gradient. Neither is needed by reference-free objectives.
        pair_inputs: Further constants `[B]` by name, for objectives that ask for them, such as ODPO's "offset" or, for
            `SPO(penalty="hinge", value="input")`, the value of the lower-level SFT loss, "spo_value".
        token_weights: What each label's log-probability counts in its sequence's sum, shaped like `labels`; finite,
            taken as constants; 1 where None. See `spo_kernels/extras/token_weights.py`. Sequence lengths stay the
            number of labels that are not ignored, so that a weight of 0 is the limit of a small one; but tokens of
            weight 0 take part in no product (unless the objective has `token_outputs`) and in no token metric.
        ref_token_weights: The same for the reference evaluated here, or for `ref_logps` of tokens; `token_weights`
            where None. Sums that are given as `ref_logps` must have been weighted by the caller, see `sequence_logps`.
        cu_seqlens: `[2B + 1]` bounds of packed sequences: B chosen, then B rejected; on the CPU or with
            labels.
        ignore_index, shift, backend: As in `linear_logprob`; with `shift`, each sequence's first label is not
            predicted. Where `ignore_index` is None (and `cu_seqlens`, if given, on the CPU) nothing waits for a GPU,
            else the number of labels of each sequence that count.
        workspace_bytes: Bound on temporaries as in `linear_logprob`. Default there, and for three products three
            times the bytes of the head and its gradient on a CPU, 3 GiB or a 16th of its memory on a GPU; docs/cost.md.
        reduction: Over pairs: "mean", "sum" or "none".
        path: "packed" or "factorised" (three products), "two_pass" (four), or None for the cheapest that the
            workspace allows; matters to a trained head only. See `spo_kernels/preference/plan.py`.
        sparsity: "exact", or which blocks of the vocabulary the policy's backward multiplies: "certified", "unbiased"
            or a `Sparsity`, as in `linear_logprob`; takes the two-pass path, whose 4 products become 1 + 3ρ.
        token_metrics: Also report TRL's `entropy` (nats, mean over all counted policy tokens), `mean_token_accuracy`
            (share of the chosen responses' tokens with the largest logit), and `logits/chosen` and `logits/rejected`
            (mean over each side's tokens and the vocabulary).
        pair_logps: Also report `pair_logps`, `[2B]`: the policy's log-probabilities summed over each response,
            detached, chosen first.

    Returns:
        The loss (0-d, or `[B]` for "none"; 0 for an empty batch), and detached 0-d metrics under TRL's names:
        loss, rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies, logps/chosen,
        logps/rejected (means over pairs; nan for an empty batch). With `sparsity`: sparsity/kept (the mean of ρ over
        tokens), sparsity/dropped_mass_max and sparsity/dropped_mass_mean (softmax mass left out, over tokens).

    Raises:
        TypeError: An argument has the wrong type or dtype. Every message names the argument.
        ValueError: A shape, a device or a value is wrong, arguments do not go together, the workspace is too small, or
            the objective needs what was not given or gives no loss for each pair.
        IndexError: A label is out of range.
        RuntimeError: The backend asked for is missing; in the backward, a second one of three products or a double one.
    """
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_flag("token_metrics", token_metrics)
    check_flag("pair_logps", pair_logps)
    if path is not None:
        check_choice("path", path, PATHS)
    objective = resolve_objective(loss)
    layout = LabelLayout(labels, ignore_index, shift, cu_seqlens, sequence_group(head))
    check_alike(
        "fused_spo_loss",
        labels,
        head,
        hidden=hidden,
        loss=objective,
        ref_logps=ref_logps,
        ref_hidden=ref_hidden,
        ref_head=ref_head,
        pair_inputs=pair_inputs,
        token_weights=token_weights,
        ref_token_weights=ref_token_weights,
        reduction=reduction,
        token_metrics=token_metrics,
        path=path,
    )
    batch = resolve_batch(
        objective,
        layout,
        Given(hidden, head, token_weights),
        Given(ref_hidden, ref_head, ref_token_weights, ref_logps),
        pair_inputs,
        reduction=reduction,
        token_metrics=token_metrics,
        sparsity=sparsity,
        workspace_bytes=workspace_bytes,
        backend=backend,
    )
    plan = plan_path(batch, path)
    outcome = _WAYS[plan.path](batch, plan)
    return outcome.loss, outcome.metrics(batch.layout, batch.lengths, pair_logps=pair_logps)
