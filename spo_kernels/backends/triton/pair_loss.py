"""From token log-probs to preference losses and per-token coefficients in one launch, one program per pair.

With sums `P`, `Q` of the policy's and the reference's log-probs over a sequence, w chosen, l rejected, n its length:

    z = β ((P_w - P_l) - (Q_w - Q_l))        loss = -log σ(z) + λ max(0, NLL - v - ε)      NLL = -P_w / n_w (or -P_w)
    d loss/d P_w = -β σ(-z) - λ [NLL - v >= ε] / n_w        d loss/d P_l = β σ(-z)

The `nll` penalty has neither the maximum nor v and ε. The losses' own code is in `spo_kernels.losses`; a test holds
this to it. Bytes moved per token: 12 read (log-prob, label), 8 read and 4 written by the second walk (label,
coefficient); nothing per logit. A segment's bounds are clamped to the batch, so that a bad one reads nothing else.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spo_kernels.backends.pair_form import PairForm, PairTensors
from spo_kernels.backends.triton.config import Launch, architecture_of, resolve


@triton.jit
def _bounds(cu_seqlens_ptr, sequence, tokens, width):
    """First token of a sequence and the one after its last."""
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        stop = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
        start = tl.minimum(tl.maximum(start, 0), tokens)
        stop = tl.minimum(tl.maximum(stop, start), tokens)
    else:
        start = sequence.to(tl.int64) * width
        stop = start + width
    return start, stop


@triton.jit
def _segment_sum(logp_ptr, labels_ptr, start, stop, ignore_index, BLOCK: tl.constexpr):
    """Sum and number of the labels that count; in float32, 512 log-probs in a row would lose up to 0.004 nat."""
    total = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(start, stop, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        counts = tl.load(labels_ptr + offs, mask=offs < stop, other=ignore_index) != ignore_index
        total += tl.load(logp_ptr + offs, mask=counts, other=0.0).to(tl.float64)
        count += counts.to(tl.int32)
    return tl.sum(total, 0).to(tl.float32), tl.sum(count, 0)


@triton.jit
def _store_coefficients(coefficients_ptr, labels_ptr, start, stop, ignore_index, value, BLOCK: tl.constexpr):
    for first in range(start, stop, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = offs < stop
        counts = tl.load(labels_ptr + offs, mask=mask, other=ignore_index) != ignore_index
        tl.store(coefficients_ptr + offs, tl.where(counts, value, 0.0), mask=mask)


@triton.jit
def _softplus(x):
    """log(1 + e^x), with a log1p that keeps the digits of a small e^x."""
    small = tl.exp(-tl.abs(x))
    rounded = 1.0 + small
    exact = tl.where(rounded == 1.0, small, tl.log(rounded) * (small / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
    return tl.maximum(x, 0.0) + exact


@triton.jit
def _pair_loss_kernel(
    logp_ptr,
    labels_ptr,
    cu_seqlens_ptr,
    reference_ptr,
    value_ptr,
    summary_ptr,
    coefficients_ptr,
    pairs,
    tokens,
    width,
    ignore_index,
    beta,
    weight,
    epsilon,
    factor,
    USE_REFERENCE: tl.constexpr,
    PENALTY: tl.constexpr,
    MEAN: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
):
    BLOCK: tl.constexpr = UNROLL * LANES
    pair = tl.program_id(0)
    start_w, stop_w = _bounds(cu_seqlens_ptr, pair, tokens, width)
    start_l, stop_l = _bounds(cu_seqlens_ptr, pair + pairs, tokens, width)
    chosen, length = _segment_sum(logp_ptr, labels_ptr, start_w, stop_w, ignore_index, BLOCK)
    rejected, _ = _segment_sum(logp_ptr, labels_ptr, start_l, stop_l, ignore_index, BLOCK)

    reward_w = chosen
    reward_l = rejected
    margin = chosen - rejected
    if reference_ptr is not None:
        ref_chosen = tl.load(reference_ptr + pair)
        ref_rejected = tl.load(reference_ptr + pair + pairs)
        reward_w -= ref_chosen
        reward_l -= ref_rejected
        if USE_REFERENCE:
            margin -= ref_chosen - ref_rejected
    z = beta * margin
    loss = _softplus(-z)
    slope_l = beta / (1.0 + tl.exp(z))
    slope_w = -slope_l
    if PENALTY != "none":
        share = 1.0
        if MEAN:
            share = 1.0 / tl.maximum(length, 1).to(tl.float32)
        excess = -chosen * share
        if PENALTY == "hinge":
            if value_ptr is not None:
                excess -= tl.load(value_ptr + pair)
            else:
                excess -= -ref_chosen * share
            excess -= epsilon
            # nan stays nan; at 0 the gradient flows, as through clamp_min
            share = tl.where(excess >= 0.0, share, 0.0)
            excess = tl.where(excess < 0.0, 0.0, excess)
        loss += weight * excess
        slope_w -= weight * share

    reward_w *= beta
    reward_l *= beta
    tl.store(summary_ptr + pair, loss)
    tl.store(summary_ptr + pairs + pair, reward_w)
    tl.store(summary_ptr + 2 * pairs + pair, reward_l)
    tl.store(summary_ptr + 3 * pairs + pair, reward_w - reward_l)
    tl.store(summary_ptr + 4 * pairs + pair, (reward_w > reward_l).to(tl.float32))
    tl.store(summary_ptr + 5 * pairs + pair, chosen)
    tl.store(summary_ptr + 6 * pairs + pair, rejected)
    _store_coefficients(coefficients_ptr, labels_ptr, start_w, stop_w, ignore_index, slope_w * factor, BLOCK)
    _store_coefficients(coefficients_ptr, labels_ptr, start_l, stop_l, ignore_index, slope_l * factor, BLOCK)


def pair_loss(pairs: PairTensors, form: PairForm, factor: float, launch: Launch | None = None) -> tuple[Tensor, Tensor]:
    """See `Backend.pair_loss`. `launch` overrides the table."""
    pairs = pairs.contiguous()
    logp, (summary, coefficients) = pairs.logp, pairs.outputs()
    kernel, options = resolve(_pair_loss_kernel, "pair_loss", architecture_of(logp.device), launch)
    with torch.cuda.device_of(logp):
        kernel[(pairs.pairs,)](
            logp_ptr=logp,
            labels_ptr=pairs.labels,
            cu_seqlens_ptr=pairs.cu_seqlens,
            reference_ptr=pairs.reference,
            value_ptr=pairs.value if form.value_from == "input" else None,
            summary_ptr=summary,
            coefficients_ptr=coefficients,
            pairs=pairs.pairs,
            tokens=logp.numel(),
            width=pairs.width,
            ignore_index=pairs.ignore_index,
            beta=form.beta,
            weight=form.weight,
            epsilon=form.epsilon,
            factor=factor,
            USE_REFERENCE=form.use_reference,
            PENALTY=form.penalty,
            MEAN=form.mean,
            **options,
        )
    return summary, coefficients
