"""From token log-probabilities to sequence sums, for padded and for packed batches."""

from itertools import pairwise

import torch
from torch import Tensor

from spo_kernels.engine.checks import check_head_inputs, check_tensor, check_token_weights
from spo_kernels.logprob import prepare_call


def check_cu_seqlens(cu_seqlens: Tensor, hidden: Tensor) -> None:
    """`cu_seqlens` describes the rows of packed `hidden` completely."""
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens must have shape [S + 1], got {list(cu_seqlens.shape)}")
    if cu_seqlens.device != hidden.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, but hidden is on {hidden.device}")
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be packed, [N, H], where cu_seqlens is given; got {list(hidden.shape)}")
    # its values are checked where looking costs no synchronisation and is no data-dependent branch
    if cu_seqlens.is_cuda or torch.compiler.is_compiling():
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != hidden.shape[0]:
        raise ValueError(
            f"cu_seqlens must start at 0 and end at N = {hidden.shape[0]}, got {bounds[0]} and {bounds[-1]}"
        )
    for i, (start, stop) in enumerate(pairwise(bounds)):
        if stop < start:
            raise ValueError(f"cu_seqlens must not decrease, got cu_seqlens[{i + 1}] = {stop} after {start}")


def sum_sequences(values: Tensor, cu_seqlens: Tensor | None, weights: Tensor | None = None) -> Tensor:
    """Sums (with `weights`, of `values * weights`) over the last dimension, or over the segments of `cu_seqlens`.

    Summed in float64: in float32, 512 log-probabilities in a row lose up to 0.004 nat. Deterministic.
    """
    if cu_seqlens is not None:
        return sum_segments(values, cu_seqlens.diff().long(), weights)
    if weights is not None:
        return (values.double() * weights).sum(-1).to(values.dtype)
    return values.sum(-1, dtype=torch.float64).to(values.dtype)


def sum_segments(values: Tensor, lengths: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums over consecutive segments of the given lengths, in float64 like `sum_sequences`."""
    wide = values.double() if weights is None else values.double() * weights
    return torch.segment_reduce(wide, "sum", lengths=lengths, initial=0.0, unsafe=True).to(values.dtype)


def counted_labels(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, shift: bool) -> Tensor:
    """Labels whose log-probability exists: with `shift`, the first of each sequence has no predecessor."""
    if not shift:
        return labels
    if cu_seqlens is None:
        first = torch.arange(labels.shape[-1], device=labels.device) == 0
    else:
        # a start equal to N belongs to an empty last sequence and lands in the spare place
        first = labels.new_zeros(labels.numel() + 1, dtype=torch.bool)
        first[cu_seqlens[:-1].long()] = True
        first = first[:-1]
    return labels.masked_fill(first, ignore_index)


def weighted_labels(labels: Tensor, token_weights: Tensor | None, ignore_index: int) -> Tensor:
    """Labels whose log-probability is wanted: one that weighs nothing need not enter a product."""
    return labels if token_weights is None else labels.masked_fill(token_weights == 0, ignore_index)


def count_tokens(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    """Number of labels that count in each sequence, int64."""
    counts = (labels != ignore_index).double()
    return sum_sequences(counts, cu_seqlens).long()


def sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    token_weights: Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-probability of each sequence: `linear_logprob(...)` summed over the tokens that count.

    Equivalent PyTorch, padded: `(token_weights * linear_logprob(hidden, weight, labels, ...)).sum(-1)`.

    Args:
        hidden: `[S, T, H]` padded, or `[N, H]` packed with `cu_seqlens`.
        weight, bias: `[V, H]` and `[V]`.
        labels: `[S, T]` or `[N]` int64.
        cu_seqlens: `[S + 1]` int32 or int64 bounds of the packed sequences, from 0 to N.
        logit_scale, logit_softcap, ignore_index, shift, workspace_bytes, backend: As in `linear_logprob`; with
            `shift`, packed sequences do not see each other.
        token_weights: What each label's log-probability counts in the sum, shaped like `labels`; finite, taken as
            constants; 1 where None. Tokens of weight 0 take part in no product.

    Returns:
        `[S]` float32 (float64 for float64 inputs), nats; differentiable.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: As in `linear_logprob`.
    """
    check_tensor("hidden", hidden)
    check_tensor("labels", labels)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, hidden)
    elif hidden.ndim != 3:
        raise ValueError(f"hidden must be [S, T, H], or [N, H] with cu_seqlens; got {list(hidden.shape)}")
    check_head_inputs(hidden, weight, bias, labels)
    if token_weights is not None:
        check_token_weights("token_weights", token_weights, labels)
        token_weights = token_weights.detach()
    labels = counted_labels(labels, cu_seqlens, ignore_index, shift)
    logp, _ = prepare_call(
        hidden,
        weight,
        weighted_labels(labels, token_weights, ignore_index),
        bias=bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        ignore_index=ignore_index,
        shift=shift,
        workspace_bytes=workspace_bytes,
        backend=backend,
    ).run()
    return sum_sequences(logp, cu_seqlens, token_weights)
