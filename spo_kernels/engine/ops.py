"""The primitive's forward and backward as `torch.library` ops, so that torch.compile treats each as one node.

The schema belongs to Python; a tensor that was not asked for comes back empty (shape `[0]`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spo_kernels.backends.contract import TokenGrads, TokenStats
from spo_kernels.backends.products import accumulator_dtype
from spo_kernels.backends.registry import load_backend
from spo_kernels.engine.backward import backward
from spo_kernels.engine.checks import without_autocast
from spo_kernels.engine.forward import forward
from spo_kernels.engine.gradients import HeadGradient
from spo_kernels.engine.head_slices import HeadSlices, Shard
from spo_kernels.engine.logit_sums import LogitSums
from spo_kernels.engine.op_arguments import (
    Asked,
    CallOptions,
    ForBackward,
    ForLabels,
    Gradients,
    ModelTensors,
    Needs,
    Statistics,
    Upstream,
    schema,
    split,
)
from spo_kernels.engine.plane import Plane
from spo_kernels.engine.sparse import SparseForward, kept_slices, possible, probe, sparse_forward
from spo_kernels.engine.sparse_blocks import KeptBlocks
from spo_kernels.engine.token_rows import TokenRows
from spo_kernels.engine.tokens import UNGRAPHED, Tokens
from spo_kernels.engine.workspace import block_width, plan_tiles, spans
from spo_kernels.sparsity import Sparsity

_FORWARD = (ModelTensors, Tokens, CallOptions, Asked)
_BACKWARD = (ModelTensors, Tokens, Statistics, ForBackward, Upstream, CallOptions, Needs)

_library = torch.library.Library("spo_kernels", "FRAGMENT")
_library.define(
    f"linear_logprob_fwd({schema(*_FORWARD)}) -> ({schema(ForLabels, ForBackward)})",
    tags=UNGRAPHED,
)
_library.define(
    f"linear_logprob_bwd({schema(*_BACKWARD)}) -> ({schema(Gradients)})",
    tags=UNGRAPHED,
)


def logp_grad_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which d logp / d hidden waits for the backward.

    float16 is widened: a confident token's unscaled gradient would fall below its smallest normal number.
    """
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def _codes_shape(labels: Tensor, weight: Tensor, sparsity: Sparsity) -> tuple[int, int]:
    """Blocks and tokens among which a sparse backward chooses; [0, 0] where that was not asked for."""
    if sparsity.mode == "exact":
        return 0, 0
    width = block_width(labels.numel(), weight.shape[0], labels.device.type)
    return -(-weight.shape[0] // width), labels.numel()


def plane_of(model: ModelTensors, tokens: Tokens, options: CallOptions, shard: Shard | None) -> Plane:
    """What an op's arguments say is to be walked."""
    head = HeadSlices.of(model.weight, model.bias, model.transform, model.base, shard)
    rows = model.hidden.reshape(-1, model.hidden.shape[-1])
    return Plane(rows, head, TokenRows.of(tokens, options.shift, head.first), load_backend(options.backend))


def like_hidden(hidden: Tensor, tokens: TokenRows, dtype: torch.dtype) -> Tensor:
    """hidden's shape, 0 where no token will be written."""
    allocate = torch.empty if tokens.fills else torch.zeros
    return allocate(hidden.shape, dtype=dtype, device=hidden.device)


@torch.no_grad()
def linear_logprob_fwd(*arguments: Any, shard: Shard | None = None) -> tuple[Tensor, ...]:
    """Token log-probabilities and softmax statistics; see the schema and `linear_logprob`.

    Over all processes' classes where `shard` is given, which the op does not have.
    """
    model, tokens, options, asked = split(arguments, *_FORWARD)
    plane = plane_of(model, tokens, options, shard)
    rows, labels = plane.tokens, tokens.labels
    logp_grad = model.hidden.new_empty(0, dtype=logp_grad_dtype(model.hidden))
    if asked.need_logp_grad:
        logp_grad = like_hidden(model.hidden, rows, logp_grad.dtype)
    codes = labels.new_empty(_codes_shape(labels, model.weight, asked.choice), dtype=torch.uint8)
    with without_autocast(model.hidden.device):
        stats, chosen, mean_logit = _walk(plane, options.workspace_bytes, asked, logp_grad, codes)
    lse, lse_rest = stats.lse()
    dropped_mass = kept_share = None
    code_counts = torch.zeros(codes.shape[:1], dtype=torch.int64)
    if chosen is not None:
        dropped_mass, kept_share, code_counts = chosen.dropped_mass, chosen.kept_share, torch.tensor(chosen.kept.counts)
    elif asked.sparsity != "exact":
        dropped_mass, kept_share = torch.zeros_like(lse), torch.ones_like(lse)
    values = {
        "logp": stats.logp,
        "lse": lse,
        "correct": stats.label_logit == stats.max,
        "entropy": stats.entropy if asked.moments else None,
        "log_sum_p2": stats.log_sum_p2 if asked.moments else None,
        "dropped_mass": dropped_mass,
        "kept_share": kept_share,
        "mean_logit": mean_logit,
    }
    outputs = {k: lse.new_empty(0) if v is None else rows.spread(v, labels.shape) for k, v in values.items()}
    lse_rest = rows.spread(lse_rest, labels.shape)
    made = ForBackward(logp_grad, lse_rest, codes, code_counts, torch.tensor(chosen is not None))
    return *ForLabels(**outputs), *made


def _walk(
    plane: Plane, workspace_bytes: int | None, asked: Asked, logp_grad: Tensor, codes: Tensor
) -> tuple[TokenStats, SparseForward | None, Tensor | None]:
    """Statistics, what a sparse backward is to read (None: it is exact), and mean logits.

    Fills `logp_grad` where it is asked for and the backward is exact, `codes` where it is sparse.
    """
    beside = LogitSums.temporaries(plane.head, plane.backend) if asked.mean else None
    early, count = asked.need_logp_grad, plane.tokens.count
    shape = plan_tiles(
        count, plane.hidden, plane.head, plane.backend, workspace_bytes, exponentials=early, temporaries=beside
    )
    like = plane.hidden.new_empty(0, dtype=plane.wide)
    logit_sums = LogitSums(plane.head, like, count) if asked.mean else None
    # with a frozen head the exact way costs two products, both of them here: worth a look before
    sparse = codes.numel() > 0 and plane.tokens.mask is None and possible(shape, plane.head.widest)
    found = None
    if sparse and (not early or probe(plane, shape, asked.choice)):
        found = sparse_forward(plane, shape, asked.choice, codes, moments=asked.moments, logit_sums=logit_sums)
        stats = found.stats
    else:
        gradient = logp_grad.view(plane.hidden.shape) if early else None
        stats = forward(plane, shape, moments=asked.moments, logp_grad=gradient, logit_sums=logit_sums)
    pays = found is not None and (early or found.pays)
    return stats, found if pays else None, None if logit_sums is None else logit_sums.means(count)


@torch.no_grad()
def linear_logprob_bwd(
    *arguments: Any, onto: Tensor | None = None, shard: Shard | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for upstream gradients of logp and of the optional outputs; see `linear_logprob`.

    The weight's is added to `onto` where that is given; it and `shard` are not the op's.
    """
    model, tokens, statistics, made, upstream, options, needs = split(arguments, *_BACKWARD)
    plane = plane_of(model, tokens, options, shard)
    rows, hidden = plane.tokens, model.hidden
    grads = _token_grads(statistics, made, upstream, rows)

    grad_hidden = like_hidden(hidden, rows, hidden.dtype) if needs.need_hidden else hidden.new_empty(0)
    hidden_out = grad_hidden.view(plane.hidden.shape) if needs.need_hidden else None
    head_out = plane.head.gradient(plane.wide, weight=needs.need_weight, bias=needs.need_bias, onto=onto)
    # by its shape: of a process without tokens it is empty, and with a streamed head all are to do the same
    ready = made.logp_grad.shape == hidden.shape and grads.only_logp and not made.sparse
    if ready and hidden_out is not None and grads.logp is not None:
        _scale_rows(made.logp_grad.view(plane.hidden.shape), grads.logp, rows, out=hidden_out)
        hidden_out = None
    if needs.need_weight or needs.need_bias or (needs.need_hidden and not ready):
        shape = plan_tiles(
            rows.count, plane.hidden, plane.head, plane.backend, options.workspace_bytes, exponentials=False
        )
        slices = None
        if made.sparse:
            width = block_width(tokens.labels.numel(), plane.head.vocab, hidden.device.type)
            shape = shape.of_blocks(width)
            kept = KeptBlocks(made.codes, made.code_counts.tolist(), width)
            slices = kept_slices(kept, rows.count, plane.head.vocab, shape.rows, statistics.lse.dtype)
        with without_autocast(hidden.device):
            backward(plane, grads, shape, hidden_out, head_out, slices)
    return Gradients(grad_hidden, *gradients_of(head_out, model.weight))


def _token_grads(statistics: Statistics, made: ForBackward, upstream: Upstream, rows: TokenRows) -> TokenGrads:
    """The upstream gradients of the tokens that count, and the values that their factors are made of."""
    grads = TokenGrads(
        lse_value=statistics.lse,
        logp=upstream.grad_logp,
        lse=upstream.grad_lse,
        entropy=upstream.grad_entropy,
        entropy_value=statistics.entropy if upstream.grad_entropy is not None else None,
        log_sum_p2=upstream.grad_log_sum_p2,
        log_sum_p2_value=statistics.log_sum_p2 if upstream.grad_log_sum_p2 is not None else None,
        lse_rest=made.lse_rest,
    ).map(rows.gather)
    if rows.mask is None:
        return grads
    # e^(logit - inf) = 0 for any logit
    return replace(grads, lse_value=grads.lse_value.masked_fill(~rows.mask, torch.inf))


def gradients_of(head_out: HeadGradient, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The head's gradients as an op returns them: in the weight's dtype, empty where they were not wanted."""
    return (
        weight.new_empty(0) if head_out.weight is None else head_out.weight,
        weight.new_empty(0) if head_out.bias is None else head_out.bias.to(weight.dtype),
    )


def _scale_rows(logp_grad: Tensor, coefficients: Tensor, tokens: TokenRows, out: Tensor) -> None:
    """`out = coefficient * d logp / d hidden`, rounded once; 1024 rows at a time bound the float32 temporary."""
    for part in spans(coefficients.numel(), 1024):
        rows = tokens.take(logp_grad, part.start, part.stop, logp_grad.dtype)
        tokens.put(out, part.start, part.stop, rows * coefficients[part, None])


for _op in (linear_logprob_fwd, linear_logprob_bwd):
    _library.impl(_op.__name__, _op, "CompositeExplicitAutograd")


@torch.library.register_fake("spo_kernels::linear_logprob_fwd", lib=_library)
def _fwd_fake(*arguments: Any) -> tuple[Tensor, ...]:
    model, tokens, _, asked = split(arguments, *_FORWARD)
    hidden, wide, chosen = model.hidden, accumulator_dtype(model.hidden.dtype), asked.sparsity != "exact"

    def per_label(wanted: bool, dtype: torch.dtype = wide) -> Tensor:
        return torch.empty(tokens.labels.shape if wanted else (0,), dtype=dtype, device=hidden.device)

    codes = _codes_shape(tokens.labels, model.weight, asked.choice)
    grad_shape = hidden.shape if asked.need_logp_grad else (0,)
    values = ForLabels(
        logp=per_label(True),
        lse=per_label(True),
        correct=per_label(True, torch.bool),
        entropy=per_label(asked.moments),
        log_sum_p2=per_label(asked.moments),
        dropped_mass=per_label(chosen),
        kept_share=per_label(chosen),
        mean_logit=per_label(asked.mean),
    )
    return *values, *ForBackward(
        logp_grad=torch.empty(grad_shape, dtype=logp_grad_dtype(hidden), device=hidden.device),
        lse_rest=per_label(True),
        codes=torch.empty(codes, dtype=torch.uint8, device=hidden.device),
        code_counts=torch.empty(codes[:1], dtype=torch.int64, device="cpu"),
        sparse=torch.empty((), dtype=torch.bool, device="cpu"),
    )


def gradients_fake(model: ModelTensors, needs: Needs) -> Gradients:
    """Shapes of what a backward op returns."""
    hidden, weight = model.hidden, model.weight
    return Gradients(
        torch.empty(hidden.shape if needs.need_hidden else (0,), dtype=hidden.dtype, device=hidden.device),
        torch.empty(weight.shape if needs.need_weight else (0,), dtype=weight.dtype, device=hidden.device),
        torch.empty(weight.shape[:1] if needs.need_bias else (0,), dtype=weight.dtype, device=hidden.device),
    )


@torch.library.register_fake("spo_kernels::linear_logprob_bwd", lib=_library)
def _bwd_fake(*arguments: Any) -> Gradients:
    model, *_, needs = split(arguments, *_BACKWARD)
    return gradients_fake(model, needs)


linear_logprob_fwd_op = torch.ops.spo_kernels.linear_logprob_fwd.default
linear_logprob_bwd_op = torch.ops.spo_kernels.linear_logprob_bwd.default
