"""`linear_kl`: KL divergence of a policy's next-token distributions from a reference's, without `[N, V]` logits."""

from typing import Any

import torch
from torch import Tensor

from spo_kernels.backends.contract import LogitTransform
from spo_kernels.backends.products import accumulator_dtype
from spo_kernels.backends.registry import load_backend
from spo_kernels.engine.checks import check_head_inputs, check_label_range
from spo_kernels.engine.divergence import Models, backward, forward
from spo_kernels.engine.exact import Head
from spo_kernels.engine.ops import CountedLabels, find_counted
from spo_kernels.logprob import LogprobOptions, prepare_call

_library = torch.library.Library("spo_kernels", "FRAGMENT")
_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias, Tensor labels,"
    " float logit_scale, float? logit_softcap, int ignore_index, bool shift, int? workspace_bytes, str backend"
)
_library.define(f"linear_kl_fwd({_INPUTS}) -> (Tensor kl, Tensor ref_lse, Tensor lse)")
_library.define(
    f"linear_kl_bwd({_INPUTS}, Tensor ref_lse, Tensor lse, Tensor grad, bool need_hidden, bool need_weight,"
    " bool need_bias) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`KL(π_ref ‖ π_θ)` of each token's distribution, exact, over the whole vocabulary.

    Equivalent PyTorch::

        log_p = f(ref_hidden @ ref_weight.T + ref_bias).log_softmax(-1)
        log_q = f(hidden @ weight.T + bias).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).masked_fill(labels == ignore_index, 0.0)

    Differentiable in `hidden`, `weight` and `bias`; the reference is constant. Cost in products of `[N, H] x [H, V]`: 2
    forward, and backward 2 and one for each of hidden and weight that needs a gradient. What happens between products
    is done by torch operations on every backend.

    Args:
        hidden, weight, bias: The policy's, as in `linear_logprob`.
        ref_hidden, ref_weight, ref_bias: The reference's: `[..., H_ref]`, `[V, H_ref]` and `[V]`.
        labels: `[...]` int64: which positions count. Their classes are not looked at beyond that.
        logit_scale, logit_softcap, ignore_index, shift, workspace_bytes, backend: As in `linear_logprob`; scale and
            softcap are both models'.

    Returns:
        KL divergences in nats, float32 (float64 for float64 inputs), labels' shape, 0 where ignored.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: An argument is wrong; the message names it.
    """
    options: dict[str, Any] = {
        "logit_scale": logit_scale,
        "logit_softcap": logit_softcap,
        "ignore_index": ignore_index,
        "shift": shift,
        "workspace_bytes": workspace_bytes,
        "backend": backend,
    }
    policy = prepare_call(hidden, weight, labels, bias=bias, **options)
    check_head_inputs(ref_hidden, ref_weight, ref_bias, labels, prefix="ref_")
    reference = prepare_call(ref_hidden, ref_weight, labels, bias=ref_bias, **options)
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight must have weight's vocabulary, V = {weight.shape[0]} rows, got {ref_weight.shape[0]}"
        )
    if accumulator_dtype(policy.hidden.dtype) != accumulator_dtype(reference.hidden.dtype):
        raise TypeError(f"ref_hidden is {ref_hidden.dtype}, but hidden is {hidden.dtype}: float64 needs both")
    tensors = (
        reference.hidden.detach(),
        reference.weight.detach(),
        None if reference.bias is None else reference.bias.detach(),
        labels,
    )
    kl: Tensor = LinearKLFunction.apply(policy.hidden, policy.weight, policy.bias, *tensors, policy.options)
    return kl


class LinearKLFunction(torch.autograd.Function):
    """Two products forward; backward recomputes both models' logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        labels: Tensor,
        options: LogprobOptions,
    ) -> Tensor:
        """Returns the divergences, shaped like labels."""
        tensors = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels)
        kl, ref_lse, lse = _fwd(*tensors, *options.op_arguments())
        ctx.save_for_backward(*tensors, ref_lse, lse)
        ctx.options = options
        result: Tensor = kl
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias."""
        if torch.is_grad_enabled():
            raise RuntimeError("linear_kl does not support double backward (create_graph=True was passed)")
        *tensors, ref_lse, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        result = _bwd(*tensors, *ctx.options.op_arguments(), ref_lse, lse, upstream, *needs)
        return (*(g if need else None for g, need in zip(result, needs, strict=True)), *[None] * 5)


def _models(*arguments: Any) -> tuple[Models, CountedLabels]:
    """The ops' common arguments as the loops take them."""
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels, scale, softcap, *rest = arguments
    ignore_index, shift, workspace_bytes, backend = rest
    check_label_range(labels, weight.shape[0], ignore_index)
    transform = LogitTransform(scale, softcap)
    models = Models(
        hidden=hidden.reshape(-1, hidden.shape[-1]),
        head=Head(weight, bias, transform),
        ref_hidden=ref_hidden.reshape(-1, ref_hidden.shape[-1]),
        ref_head=Head(ref_weight, ref_bias, transform),
        backend=load_backend(backend),
        workspace_bytes=workspace_bytes,
    )
    return models, CountedLabels.of(*find_counted(labels, ignore_index, shift))


@torch.no_grad()
def linear_kl_fwd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Divergences and both models' log-sum-exps, labels' shape; see the schema and `linear_kl`."""
    models, counted = _models(*arguments)
    labels, shift = arguments[6], arguments[10]
    with torch.autocast(labels.device.type, enabled=False):
        found = forward(models, counted.tokens(labels, shift))
    kl, ref_lse, lse = (counted.spread(values, labels.shape) for values in found)
    return kl, ref_lse, lse


@torch.no_grad()
def linear_kl_bwd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, empty where they are not needed."""
    *common, ref_lse, lse, grad, need_hidden, need_weight, need_bias = arguments
    models, counted = _models(*common)
    hidden, weight, labels, shift = common[0], common[1], common[6], common[10]
    tokens = counted.tokens(labels, shift)
    ref_lse, lse, grad = (counted.gather(values) for values in (ref_lse, lse, grad))
    with torch.autocast(labels.device.type, enabled=False):
        found = backward(models, tokens, ref_lse, lse, grad, (need_hidden, need_weight, need_bias))
    d_hidden, d_weight, d_bias = (weight.new_empty(0) if value is None else value for value in found)
    return d_hidden.view(hidden.shape) if need_hidden else d_hidden, d_weight, d_bias


for _op in (linear_kl_fwd, linear_kl_bwd):
    _library.impl(_op.__name__, _op, "CompositeExplicitAutograd")
_fwd = torch.ops.spo_kernels.linear_kl_fwd.default
_bwd = torch.ops.spo_kernels.linear_kl_bwd.default


@torch.library.register_fake("spo_kernels::linear_kl_fwd", lib=_library)
def _fwd_fake(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    labels, dtype = rest[5], accumulator_dtype(hidden.dtype)
    kl, ref_lse, lse = (torch.empty(labels.shape, dtype=dtype, device=hidden.device) for _ in range(3))
    return kl, ref_lse, lse


@torch.library.register_fake("spo_kernels::linear_kl_bwd", lib=_library)
def _bwd_fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = rest[-3:]
    return (
        torch.empty(hidden.shape if need_hidden else (0,), dtype=hidden.dtype, device=hidden.device),
        torch.empty(weight.shape if need_weight else (0,), dtype=weight.dtype, device=hidden.device),
        torch.empty(weight.shape[:1] if need_bias else (0,), dtype=weight.dtype, device=hidden.device),
    )
