"""The primitive's forward and backward as `torch.library` ops, so that torch.compile treats each as one node.

The schema belongs to Python; a tensor that was not asked for comes back empty (shape `[0]`).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spo_kernels.backends.contract import LogitTransform, TokenGrads
from spo_kernels.backends.products import accumulator_dtype
from spo_kernels.backends.registry import load_backend
from spo_kernels.engine.checks import check_label_range
from spo_kernels.engine.exact import Head, TileShape, TokenRows, backward, forward, plan_tiles
from spo_kernels.engine.memory import in_huge_pages
from spo_kernels.engine.sparse import kept_slices, possible, probe, sparse_forward
from spo_kernels.engine.sparse_blocks import KeptBlocks, block_width
from spo_kernels.sparsity import Sparsity

_library = torch.library.Library("spo_kernels", "DEF")
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
_OPTIONS = "float logit_scale, float? logit_softcap, int ignore_index, bool shift, int? workspace_bytes, str backend"
_library.define(
    f"linear_logprob_fwd({_HEAD}, {_OPTIONS}, bool moments, bool need_logp_grad,"
    " str sparsity, float tolerance, int seed)"
    " -> (Tensor logp, Tensor lse, Tensor correct, Tensor entropy, Tensor log_sum_p2, Tensor dropped_mass,"
    " Tensor kept_share, Tensor logp_grad, Tensor positions, Tensor count, Tensor codes, Tensor code_counts)"
)
_library.define(
    f"linear_logprob_bwd({_HEAD}, Tensor lse, Tensor entropy, Tensor log_sum_p2, Tensor logp_grad,"
    " Tensor positions, Tensor count, Tensor codes, Tensor code_counts,"
    " Tensor? grad_logp, Tensor? grad_lse, Tensor? grad_entropy, Tensor? grad_log_sum_p2,"
    f" {_OPTIONS}, bool need_hidden, bool need_weight, bool need_bias)"
    " -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)


def logp_grad_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which d logp / d hidden waits for the backward.

    float16 is widened: a confident token's unscaled gradient would fall below its smallest normal number.
    """
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


# in place of a count: `positions` marks the labels that count with 1, and every row is processed
_MASKED = -1


def capturing(labels: Tensor) -> bool:
    """Whether a CUDA graph is being recorded: shapes then cannot depend on the labels."""
    return labels.is_cuda and torch.cuda.is_current_stream_capturing()


def find_counted(labels: Tensor, ignore_index: int, shift: bool) -> tuple[Tensor, Tensor]:
    """Flat positions of the labels that count, padded with zeros to all of them, and their number in CPU memory.

    The number is kept there so that the backward need not wait for the device to learn it again.
    """
    counts = labels != ignore_index
    if shift and labels.ndim:
        counts[..., :1] = False
    if capturing(labels):
        return counts.flatten().long(), torch.tensor(_MASKED)
    counted = counts.flatten().nonzero()[:, 0]
    positions = counted.new_zeros(labels.numel())
    positions[: counted.numel()] = counted
    return positions, torch.tensor(counted.numel())


@dataclass(frozen=True)
class CountedLabels:
    """Which labels count: those at `positions` (None: all), or those where `mask` is True."""

    positions: Tensor | None
    mask: Tensor | None

    @classmethod
    def of(cls, positions: Tensor, count: Tensor) -> "CountedLabels":
        """What `find_counted` found."""
        n = int(count)
        if n == _MASKED:
            return cls(None, positions.bool())
        return cls(None if n == positions.numel() else positions[:n], None)

    def tokens(self, labels: Tensor, shift: bool) -> TokenRows:
        """The tokens that predict the labels that count."""
        flat = labels.flatten()
        if self.mask is not None:
            # a permutation, so that each row is written once: the labels that wrap around do not count
            rows = torch.arange(flat.numel(), device=flat.device).roll(1) if shift else None
            return TokenRows(rows, flat.masked_fill(~self.mask, 0), self.mask)
        if self.positions is None:
            return TokenRows(None, flat)
        return TokenRows(self.positions - 1 if shift else self.positions, flat[self.positions])

    def gather(self, values: Tensor) -> Tensor:
        """Per-label values as the driver takes them."""
        flat = values.reshape(-1)
        if self.mask is not None:
            return flat.masked_fill(~self.mask, 0.0)
        # an expanded gradient, as sum() sends it, has stride 0
        return flat.contiguous() if self.positions is None else flat[self.positions]

    def spread(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Per-token values back at their labels' places, zero elsewhere."""
        if self.mask is not None:
            return values.masked_fill(~self.mask, 0).view(shape)
        if self.positions is None:
            return values.view(shape)
        out = values.new_zeros(shape)
        out.view(-1)[self.positions] = values
        return out


# in place of the number of tokens of the first block
_EXACT = -1


def _codes_shape(labels: Tensor, weight: Tensor, sparsity: Sparsity) -> tuple[int, int]:
    """Blocks and tokens among which a sparse backward chooses; [0, 0] where that was not asked for."""
    if sparsity.mode == "exact":
        return 0, 0
    width = block_width(labels.numel(), weight.shape[0], labels.device.type)
    return -(-weight.shape[0] // width), labels.numel()


@torch.no_grad()
def linear_logprob_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    ignore_index: int,
    shift: bool,
    workspace_bytes: int | None,
    backend: str,
    moments: bool,
    need_logp_grad: bool,
    sparsity: str,
    tolerance: float,
    seed: int,
) -> tuple[Tensor, ...]:
    """Token log-probabilities and softmax statistics; see the schema and `linear_logprob`.

    The backward is exact where `code_counts` starts with -1; else `codes` say what it covers, and `logp_grad` nothing.
    """
    check_label_range(labels, weight.shape[0], ignore_index)
    states = hidden.reshape(-1, hidden.shape[-1])
    head = Head(weight, bias, LogitTransform(logit_scale, logit_softcap))
    padded_positions, count = find_counted(labels, ignore_index, shift)
    counted = CountedLabels.of(padded_positions, count)
    tokens = counted.tokens(labels, shift)
    grad_dtype = logp_grad_dtype(hidden)
    logp_grad = hidden.new_empty(0, dtype=grad_dtype)
    if need_logp_grad:
        allocate = torch.empty if counted.positions is None else torch.zeros
        logp_grad = allocate(hidden.shape, dtype=grad_dtype, device=hidden.device)
    chosen = load_backend(backend)
    tile_shape = plan_tiles(tokens.labels.numel(), states, head, chosen, workspace_bytes)
    wanted = Sparsity(sparsity, tolerance, seed)
    codes = labels.new_empty(_codes_shape(labels, weight, wanted), dtype=torch.uint8)
    common = (states, head, tokens, chosen, tile_shape)
    with torch.autocast(hidden.device.type, enabled=False):
        # with a frozen head the exact way costs two products, both of them here: worth a look before
        sparse = codes.numel() > 0 and counted.mask is None and possible(tile_shape, weight.shape[0])
        sparse = sparse and (not need_logp_grad or probe(*common, wanted))
        if sparse:
            found = sparse_forward(*common, wanted, codes, moments=moments)
            stats, sparse = found.stats, need_logp_grad or found.pays
        else:
            gradient = logp_grad.view(-1, hidden.shape[-1]) if need_logp_grad else None
            stats = forward(*common, moments=moments, logp_grad=gradient)
    lse = stats.lse
    entropy, log_sum_p2 = (stats.entropy, stats.log_sum_p2) if moments else (None, None)
    dropped_mass = kept_share = None
    code_counts = torch.full(codes.shape[:1], _EXACT)
    if wanted.mode != "exact":
        dropped_mass, kept_share = torch.zeros_like(lse), torch.ones_like(lse)
    if sparse:
        code_counts = torch.tensor(found.kept.counts)
        dropped_mass, kept_share = found.dropped_mass, found.kept_share
    always = (stats.logp, lse, stats.label_logit == stats.max)
    values = (*always, entropy, log_sum_p2, dropped_mass, kept_share)
    outputs = (lse.new_empty(0) if v is None else counted.spread(v, labels.shape) for v in values)
    return (*outputs, logp_grad, padded_positions, count, codes, code_counts)


@torch.no_grad()
def linear_logprob_bwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    entropy: Tensor,
    log_sum_p2: Tensor,
    logp_grad: Tensor,
    padded_positions: Tensor,
    count: Tensor,
    codes: Tensor,
    code_counts: Tensor,
    grad_logp: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    grad_log_sum_p2: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    ignore_index: int,
    shift: bool,
    workspace_bytes: int | None,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for upstream gradients of logp and of the optional outputs; see `linear_logprob`."""
    states = hidden.reshape(-1, hidden.shape[-1])
    head = Head(weight, bias, LogitTransform(logit_scale, logit_softcap))
    counted = CountedLabels.of(padded_positions, count)
    tokens = counted.tokens(labels, shift)
    grads = TokenGrads(
        lse_value=lse,
        logp=grad_logp,
        lse=grad_lse,
        entropy=grad_entropy,
        entropy_value=entropy if grad_entropy is not None else None,
        log_sum_p2=grad_log_sum_p2,
        log_sum_p2_value=log_sum_p2 if grad_log_sum_p2 is not None else None,
    ).map(counted.gather)
    if counted.mask is not None:
        # e^(logit - inf) = 0 for any logit
        grads = replace(grads, lse_value=grads.lse_value.masked_fill(~counted.mask, torch.inf))

    grad_hidden, grad_weight, grad_bias = hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    hidden_out = bias_sum = None
    if need_hidden:
        allocate = torch.empty if counted.positions is None else torch.zeros
        grad_hidden = allocate(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        hidden_out = grad_hidden.view(-1, hidden.shape[-1])
    if need_weight:
        grad_weight = in_huge_pages(torch.empty_like(weight, memory_format=torch.contiguous_format))
    if need_bias:
        bias_sum = weight.new_zeros(weight.shape[0], dtype=accumulator_dtype(weight.dtype))

    sparse = code_counts.numel() > 0 and int(code_counts[0]) != _EXACT
    finished = grads.only_logp and hidden_out is not None and logp_grad.numel() > 0 and not sparse
    if finished and hidden_out is not None and grads.logp is not None:
        _scale_rows(logp_grad.view(-1, hidden.shape[-1]), grads.logp, tokens, out=hidden_out)
    if need_weight or need_bias or (need_hidden and not finished):
        chosen = load_backend(backend)
        tile_shape = plan_tiles(tokens.labels.numel(), states, head, chosen, workspace_bytes)
        common = (states, head, tokens, grads, chosen)
        outs = (None if finished else hidden_out, grad_weight if need_weight else None, bias_sum)
        with torch.autocast(hidden.device.type, enabled=False):
            slices = None
            if sparse:
                width = block_width(labels.numel(), weight.shape[0], labels.device.type)
                kept = KeptBlocks(codes, code_counts.tolist(), width)
                # a block may be wider than the tiles that the workspace allows
                rows = max(1, min(tile_shape.rows, tile_shape.rows * tile_shape.columns // width))
                tile_shape = TileShape(rows, width)
                slices = kept_slices(kept, tokens.labels.numel(), weight.shape[0], rows, lse.dtype)
            backward(*common, tile_shape, *outs, slices)
    if bias_sum is not None:
        grad_bias = bias_sum.to(weight.dtype)
    return grad_hidden, grad_weight, grad_bias


def _scale_rows(logp_grad: Tensor, coefficients: Tensor, tokens: TokenRows, out: Tensor) -> None:
    """`out = coefficient * d logp / d hidden`, rounded once; 1024 rows at a time bound the float32 temporary."""
    for start in range(0, coefficients.numel(), 1024):
        stop = min(start + 1024, coefficients.numel())
        rows = tokens.take(logp_grad, start, stop, logp_grad.dtype)
        tokens.put(out, start, stop, rows * coefficients[start:stop, None])


for _op in (linear_logprob_fwd, linear_logprob_bwd):
    _library.impl(_op.__name__, _op, "CompositeExplicitAutograd")


@torch.library.register_fake("spo_kernels::linear_logprob_fwd", lib=_library)
def _fwd_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any) -> tuple[Tensor, ...]:
    moments, need_logp_grad, mode, tolerance, seed = options[-5:]
    wide = accumulator_dtype(hidden.dtype)
    token = [torch.empty(labels.shape, dtype=wide, device=hidden.device) for _ in range(2)]
    correct = torch.empty(labels.shape, dtype=torch.bool, device=hidden.device)
    moment_shape = labels.shape if moments else (0,)
    moment = [torch.empty(moment_shape, dtype=wide, device=hidden.device) for _ in range(2)]
    chosen_shape = labels.shape if mode != "exact" else (0,)
    chosen = [torch.empty(chosen_shape, dtype=wide, device=hidden.device) for _ in range(2)]
    grad_shape = hidden.shape if need_logp_grad else (0,)
    logp_grad = torch.empty(grad_shape, dtype=logp_grad_dtype(hidden), device=hidden.device)
    positions = torch.empty(labels.numel(), dtype=torch.int64, device=hidden.device)
    count = torch.empty((), dtype=torch.int64, device="cpu")
    shape = _codes_shape(labels, weight, Sparsity(mode, tolerance, seed))
    codes = torch.empty(shape, dtype=torch.uint8, device=hidden.device)
    code_counts = torch.empty(shape[:1], dtype=torch.int64, device="cpu")
    return (*token, correct, *moment, *chosen, logp_grad, positions, count, codes, code_counts)


@torch.library.register_fake("spo_kernels::linear_logprob_bwd", lib=_library)
def _bwd_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = rest[-3:]
    return (
        torch.empty(hidden.shape if need_hidden else (0,), dtype=hidden.dtype, device=hidden.device),
        torch.empty(weight.shape if need_weight else (0,), dtype=weight.dtype, device=hidden.device),
        torch.empty(weight.shape[:1] if need_bias else (0,), dtype=weight.dtype, device=hidden.device),
    )
