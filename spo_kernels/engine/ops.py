"""The primitive's forward and backward as `torch.library` ops, so that torch.compile treats each as one node.

The schema belongs to Python; a tensor that was not asked for comes back empty (shape `[0]`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from spo_kernels.backends.contract import TokenGrads
from spo_kernels.backends.products import accumulator_dtype
from spo_kernels.backends.registry import load_backend
from spo_kernels.engine import exact
from spo_kernels.engine.checks import without_autocast
from spo_kernels.engine.gradients import HeadGradient
from spo_kernels.engine.head_slices import HeadSlices, Shard
from spo_kernels.engine.logit_sums import LogitSums
from spo_kernels.engine.sparse import kept_slices, possible, probe, sparse_forward
from spo_kernels.engine.sparse_blocks import KeptBlocks
from spo_kernels.engine.tokens import UNGRAPHED, TokenRows, Tokens
from spo_kernels.engine.workspace import block_width, plan_tiles, spans
from spo_kernels.sparsity import Sparsity

MODEL = "Tensor hidden, Tensor weight, Tensor? bias, Tensor transform, Tensor? base"
TOKENS = "Tensor labels, Tensor counted, Tensor positions, Tensor total, Tensor listed"
OPTIONS = "bool shift, int? workspace_bytes, str backend"

_library = torch.library.Library("spo_kernels", "FRAGMENT")
_library.define(
    f"linear_logprob_fwd({MODEL}, {TOKENS}, {OPTIONS}, bool moments, bool mean, bool need_logp_grad,"
    " str sparsity, float tolerance, int seed)"
    " -> (Tensor logp, Tensor lse, Tensor correct, Tensor entropy, Tensor log_sum_p2, Tensor dropped_mass,"
    " Tensor kept_share, Tensor mean_logit, Tensor logp_grad, Tensor codes, Tensor code_counts, Tensor sparse)",
    tags=UNGRAPHED,
)
_library.define(
    f"linear_logprob_bwd({MODEL}, {TOKENS}, Tensor lse, Tensor entropy, Tensor log_sum_p2, Tensor logp_grad,"
    " Tensor codes, Tensor code_counts, Tensor sparse,"
    " Tensor? grad_logp, Tensor? grad_lse, Tensor? grad_entropy, Tensor? grad_log_sum_p2,"
    f" {OPTIONS}, bool need_hidden, bool need_weight, bool need_bias)"
    " -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    tags=UNGRAPHED,
)


class ForwardResult(NamedTuple):
    """What the forward op returns; the first eight are per label, the rest is for the backward."""

    logp: Tensor
    lse: Tensor
    correct: Tensor
    entropy: Tensor
    log_sum_p2: Tensor
    dropped_mass: Tensor
    kept_share: Tensor
    mean_logit: Tensor
    logp_grad: Tensor  # d logp / d hidden, if it was finished
    codes: Tensor  # see `KeptBlocks`
    code_counts: Tensor  # [blocks] int64 on the CPU: tokens of each
    sparse: Tensor  # 0-d bool on the CPU: whether the backward is sparse, and codes are filled


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


def plane_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: Tensor,
    base: Tensor | None,
    tokens: Tokens,
    shift: bool,
    backend: str,
    shard: Shard | None,
) -> exact.Plane:
    """What an op's arguments say is to be walked."""
    head, rows = HeadSlices.of(weight, bias, transform, base, shard), hidden.reshape(-1, hidden.shape[-1])
    return exact.Plane(rows, head, TokenRows.of(tokens, shift, head.first), load_backend(backend))


def like_hidden(hidden: Tensor, tokens: TokenRows, dtype: torch.dtype) -> Tensor:
    """hidden's shape, 0 where no token will be written."""
    allocate = torch.empty if tokens.fills else torch.zeros
    return allocate(hidden.shape, dtype=dtype, device=hidden.device)


@torch.no_grad()
def linear_logprob_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: Tensor,
    base: Tensor | None,
    labels: Tensor,
    counted: Tensor,
    positions: Tensor,
    total: Tensor,
    listed: Tensor,
    shift: bool,
    workspace_bytes: int | None,
    backend: str,
    moments: bool,
    mean: bool,
    need_logp_grad: bool,
    sparsity: str,
    tolerance: float,
    seed: int,
    shard: Shard | None = None,
) -> tuple[Tensor, ...]:
    """Token log-probabilities and softmax statistics; see the schema and `linear_logprob`.

    Over all processes' classes where `shard` is given, which the op does not have.
    """
    tokens = Tokens(labels, counted, positions, total, listed)
    plane = plane_of(hidden, weight, bias, transform, base, tokens, shift, backend, shard)
    rows = plane.tokens
    logp_grad = hidden.new_empty(0, dtype=logp_grad_dtype(hidden))
    if need_logp_grad:
        logp_grad = like_hidden(hidden, rows, logp_grad.dtype)
    beside = LogitSums.temporaries(plane.head, plane.backend) if mean else None
    shape = plan_tiles(rows.count, plane.hidden, plane.head, plane.backend, workspace_bytes, temporaries=beside)
    wanted = Sparsity(sparsity, tolerance, seed)
    codes = labels.new_empty(_codes_shape(labels, weight, wanted), dtype=torch.uint8)
    code_counts = torch.zeros(codes.shape[:1], dtype=torch.int64)
    with without_autocast(hidden.device):
        logit_sums = LogitSums(plane.head, hidden.new_empty(0, dtype=plane.wide), rows.count) if mean else None
        # with a frozen head the exact way costs two products, both of them here: worth a look before
        sparse = codes.numel() > 0 and rows.mask is None and possible(shape, plane.head.widest)
        sparse = sparse and (not need_logp_grad or probe(plane, shape, wanted))
        if sparse:
            found = sparse_forward(plane, shape, wanted, codes, moments=moments, logit_sums=logit_sums)
            stats, sparse = found.stats, need_logp_grad or found.pays
        else:
            gradient = logp_grad.view(-1, hidden.shape[-1]) if need_logp_grad else None
            stats = exact.forward(plane, shape, moments=moments, logp_grad=gradient, logit_sums=logit_sums)
    lse = stats.lse
    entropy, log_sum_p2 = (stats.entropy, stats.log_sum_p2) if moments else (None, None)
    dropped_mass = kept_share = None
    if wanted.mode != "exact":
        dropped_mass, kept_share = torch.zeros_like(lse), torch.ones_like(lse)
    if sparse:
        code_counts = torch.tensor(found.kept.counts)
        dropped_mass, kept_share = found.dropped_mass, found.kept_share
    values = (
        stats.label_logit - lse,
        lse,
        stats.label_logit == stats.max,
        entropy,
        log_sum_p2,
        dropped_mass,
        kept_share,
        None if logit_sums is None else logit_sums.means(rows.count),
    )
    outputs = (lse.new_empty(0) if v is None else rows.spread(v, labels.shape) for v in values)
    return ForwardResult._make((*outputs, logp_grad, codes, code_counts, torch.tensor(sparse)))


@torch.no_grad()
def linear_logprob_bwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: Tensor,
    base: Tensor | None,
    labels: Tensor,
    counted: Tensor,
    positions: Tensor,
    total: Tensor,
    listed: Tensor,
    lse: Tensor,
    entropy: Tensor,
    log_sum_p2: Tensor,
    logp_grad: Tensor,
    codes: Tensor,
    code_counts: Tensor,
    sparse: Tensor,
    grad_logp: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    grad_log_sum_p2: Tensor | None,
    shift: bool,
    workspace_bytes: int | None,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    onto: Tensor | None = None,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for upstream gradients of logp and of the optional outputs; see `linear_logprob`.

    The weight's is added to `onto` where that is given; it and `shard` are not the op's.
    """
    tokens = Tokens(labels, counted, positions, total, listed)
    plane = plane_of(hidden, weight, bias, transform, base, tokens, shift, backend, shard)
    rows = plane.tokens
    grads = TokenGrads(
        lse_value=lse,
        logp=grad_logp,
        lse=grad_lse,
        entropy=grad_entropy,
        entropy_value=entropy if grad_entropy is not None else None,
        log_sum_p2=grad_log_sum_p2,
        log_sum_p2_value=log_sum_p2 if grad_log_sum_p2 is not None else None,
    ).map(rows.gather)
    if rows.mask is not None:
        # e^(logit - inf) = 0 for any logit
        grads = replace(grads, lse_value=grads.lse_value.masked_fill(~rows.mask, torch.inf))

    grad_hidden = like_hidden(hidden, rows, hidden.dtype) if need_hidden else hidden.new_empty(0)
    hidden_out = grad_hidden.view(-1, hidden.shape[-1]) if need_hidden else None
    head_out = plane.head.gradient(plane.wide, weight=need_weight, bias=need_bias, onto=onto)
    # by its shape: of a process without tokens it is empty, and with a streamed head all are to do the same
    made = logp_grad.shape == hidden.shape
    finished = grads.only_logp and hidden_out is not None and made and not sparse
    if finished and hidden_out is not None and grads.logp is not None:
        _scale_rows(logp_grad.view(-1, hidden.shape[-1]), grads.logp, rows, out=hidden_out)
    if need_weight or need_bias or (need_hidden and not finished):
        shape = plan_tiles(rows.count, plane.hidden, plane.head, plane.backend, workspace_bytes)
        slices = None
        if sparse:
            width = block_width(labels.numel(), weight.shape[0], labels.device.type)
            shape = shape.of_blocks(width)
            kept = KeptBlocks(codes, code_counts.tolist(), width)
            slices = kept_slices(kept, rows.count, plane.head.vocab, shape.rows, lse.dtype)
        with without_autocast(hidden.device):
            exact.backward(plane, grads, shape, None if finished else hidden_out, head_out, slices)
    return grad_hidden, *gradients_of(head_out, weight)


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
def _fwd_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: Tensor,
    base: Tensor | None,
    labels: Tensor,
    counted: Tensor,
    positions: Tensor,
    total: Tensor,
    listed: Tensor,
    shift: bool,
    workspace_bytes: int | None,
    backend: str,
    moments: bool,
    mean: bool,
    need_logp_grad: bool,
    sparsity: str,
    tolerance: float,
    seed: int,
) -> tuple[Tensor, ...]:
    wanted = Sparsity(sparsity, tolerance, seed)
    wide, device = accumulator_dtype(hidden.dtype), hidden.device

    def per_label(asked: bool, dtype: torch.dtype = wide) -> Tensor:
        return torch.empty(labels.shape if asked else (0,), dtype=dtype, device=device)

    chosen = wanted.mode != "exact"
    codes = _codes_shape(labels, weight, wanted)
    grad_shape = hidden.shape if need_logp_grad else (0,)
    return ForwardResult(
        logp=per_label(True),
        lse=per_label(True),
        correct=per_label(True, torch.bool),
        entropy=per_label(moments),
        log_sum_p2=per_label(moments),
        dropped_mass=per_label(chosen),
        kept_share=per_label(chosen),
        mean_logit=per_label(mean),
        logp_grad=torch.empty(grad_shape, dtype=logp_grad_dtype(hidden), device=device),
        codes=torch.empty(codes, dtype=torch.uint8, device=device),
        code_counts=torch.empty(codes[:1], dtype=torch.int64, device="cpu"),
        sparse=torch.empty((), dtype=torch.bool, device="cpu"),
    )


def gradients_fake(
    hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of what a backward op returns."""
    return (
        torch.empty(hidden.shape if need_hidden else (0,), dtype=hidden.dtype, device=hidden.device),
        torch.empty(weight.shape if need_weight else (0,), dtype=weight.dtype, device=hidden.device),
        torch.empty(weight.shape[:1] if need_bias else (0,), dtype=weight.dtype, device=hidden.device),
    )


@torch.library.register_fake("spo_kernels::linear_logprob_bwd", lib=_library)
def _bwd_fake(hidden: Tensor, weight: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_hidden, need_weight, need_bias = rest
    return gradients_fake(hidden, weight, bool(need_hidden), bool(need_weight), bool(need_bias))


linear_logprob_fwd_op = torch.ops.spo_kernels.linear_logprob_fwd.default
linear_logprob_bwd_op = torch.ops.spo_kernels.linear_logprob_bwd.default
