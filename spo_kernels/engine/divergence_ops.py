"""The KL divergence's forward and backward as `torch.library` ops, and as a differentiable function."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from spo_kernels.backends.products import accumulator_dtype
from spo_kernels.engine import divergence
from spo_kernels.engine.checks import is_traced, without_autocast
from spo_kernels.engine.head_slices import Shard
from spo_kernels.engine.inputs import Execution, ModelInputs
from spo_kernels.engine.ops import MODEL, OPTIONS, TOKENS, gradients_fake, gradients_of, like_hidden, plane_of
from spo_kernels.engine.tokens import UNGRAPHED, TokenRows, Tokens

_BOTH = f"{MODEL}, {MODEL.replace('Tensor ', 'Tensor ref_').replace('Tensor? ', 'Tensor? ref_')}, {TOKENS}, {OPTIONS}"
_library = torch.library.Library("spo_kernels", "FRAGMENT")
_library.define(f"linear_kl_fwd({_BOTH}) -> (Tensor kl, Tensor ref_lse, Tensor lse)", tags=UNGRAPHED)
_library.define(
    f"linear_kl_bwd({_BOTH}, Tensor ref_lse, Tensor lse, Tensor grad, bool need_hidden, bool need_weight,"
    " bool need_bias) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    tags=UNGRAPHED,
)


def _models(*arguments: Any, shard: Shard | None) -> tuple[divergence.Models, TokenRows, Tensor]:
    """The ops' common arguments as the walk takes them; the tokens, and labels."""
    found, (shift, workspace_bytes, backend) = Tokens(*arguments[10:15]), arguments[15:]
    policy, reference = (
        plane_of(*model, found, shift, backend, shard)  # type: ignore[call-arg]
        for model in (arguments[:5], arguments[5:10])
    )
    return divergence.Models(policy, reference, workspace_bytes), policy.tokens, found.labels


@torch.no_grad()
def linear_kl_fwd(*arguments: Any, shard: Shard | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Divergences and both models' log-sum-exps, labels' shape; see the schema and `linear_kl`.

    `shard`, which the op does not have, is of both heads.
    """
    models, tokens, labels = _models(*arguments, shard=shard)
    with without_autocast(labels.device):
        found = divergence.forward(models)
    kl, ref_lse, lse = (tokens.spread(values, labels.shape) for values in found)
    return kl, ref_lse, lse


@torch.no_grad()
def linear_kl_bwd(*arguments: Any, shard: Shard | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, empty where they are not needed."""
    *common, ref_lse, lse, grad, need_hidden, need_weight, need_bias = arguments
    models, tokens, labels = _models(*common, shard=shard)
    hidden, weight = common[:2]
    grad_hidden = like_hidden(hidden, tokens, hidden.dtype) if need_hidden else hidden.new_empty(0)
    head_out = models.policy.head.gradient(models.policy.wide, weight=need_weight, bias=need_bias)
    hidden_out = grad_hidden.view(-1, hidden.shape[-1]) if need_hidden else None
    with without_autocast(labels.device):
        ref_lse, lse, grad = (tokens.gather(values) for values in (ref_lse, lse, grad))
        divergence.backward(models, ref_lse, lse, grad, hidden_out, head_out)
    return grad_hidden, *gradients_of(head_out, weight)


for _op in (linear_kl_fwd, linear_kl_bwd):
    _library.impl(_op.__name__, _op, "CompositeExplicitAutograd")


@torch.library.register_fake("spo_kernels::linear_kl_fwd", lib=_library)
def _fwd_fake(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    labels, dtype = rest[9], accumulator_dtype(hidden.dtype)
    kl, ref_lse, lse = (torch.empty(labels.shape, dtype=dtype, device=hidden.device) for _ in range(3))
    return kl, ref_lse, lse


@torch.library.register_fake("spo_kernels::linear_kl_bwd", lib=_library)
def _bwd_fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_hidden, need_weight, need_bias = rest
    return gradients_fake(hidden, weight, need_hidden, need_weight, need_bias)


_fwd = torch.ops.spo_kernels.linear_kl_fwd.default
_bwd = torch.ops.spo_kernels.linear_kl_bwd.default


def kl_divergence(
    policy: ModelInputs, reference: ModelInputs, tokens: Tokens, shift: bool, execution: Execution
) -> Tensor:
    """`linear_kl` of resolved inputs: `[labels' shape]`, differentiable in the policy's."""
    tensors = (*policy.tensors(), *reference.detach().tensors())
    options = (shift, execution.workspace_bytes, execution.backend)
    kl: Tensor = LinearKLFunction.apply(*tensors, *tokens, *options, policy.shard)
    return kl


class LinearKLFunction(torch.autograd.Function):
    """Two products forward; backward recomputes both models' logits."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Arguments: the ops', and the shard of both heads. Returns the divergences, shaped like labels."""
        *tensors, shift, workspace_bytes, backend, ctx.shard = arguments
        ctx.options = (shift, workspace_bytes, backend)
        run: Any = _fwd if is_traced(tensors[0]) else partial(linear_kl_fwd, shard=ctx.shard)
        kl, ref_lse, lse = run(*tensors, *ctx.options)
        ctx.save_for_backward(*tensors, ref_lse, lse)
        result: Tensor = kl
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias."""
        if torch.is_grad_enabled():
            raise RuntimeError("linear_kl does not support double backward (create_graph=True was passed)")
        *tensors, ref_lse, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        run: Any = _bwd if is_traced(upstream) else partial(linear_kl_bwd, shard=ctx.shard)
        found = run(*tensors, *ctx.options, ref_lse, lse, upstream, *needs)
        rest = [None] * (len(ctx.needs_input_grad) - 3)
        return *(g if need else None for g, need in zip(found, needs, strict=True)), *rest
