"""The KL divergence's forward and backward as `torch.library` ops, and as a differentiable function."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spo_kernels.backends.products import accumulator_dtype
from spo_kernels.engine import divergence
from spo_kernels.engine.checks import is_traced, refuse_double_backward, without_autocast
from spo_kernels.engine.divergence import Normalisers
from spo_kernels.engine.head_slices import Shard
from spo_kernels.engine.inputs import Execution, ModelInputs
from spo_kernels.engine.op_arguments import CallOptions, Gradients, ModelTensors, Needs, schema, split
from spo_kernels.engine.ops import gradients_fake, gradients_of, like_hidden, plane_of
from spo_kernels.engine.tokens import UNGRAPHED, Tokens


class UpstreamKL(NamedTuple):
    """The gradient that flows into the divergences."""

    grad: Tensor


_FORWARD = (ModelTensors, ModelTensors, Tokens, CallOptions)
_BOTH = f"{schema(ModelTensors)}, {schema(ModelTensors, prefix='ref_')}, {schema(Tokens, CallOptions)}"
_library = torch.library.Library("spo_kernels", "FRAGMENT")
_library.define(f"linear_kl_fwd({_BOTH}) -> (Tensor kl, {schema(Normalisers)})", tags=UNGRAPHED)
_library.define(
    f"linear_kl_bwd({_BOTH}, {schema(Normalisers, UpstreamKL, Needs)}) -> ({schema(Gradients)})", tags=UNGRAPHED
)


def _models(
    policy: ModelTensors, reference: ModelTensors, tokens: Tokens, options: CallOptions, shard: Shard | None
) -> divergence.Models:
    """The ops' common arguments as the walk takes them."""
    planes = [plane_of(model, tokens, options, shard) for model in (policy, reference)]
    return divergence.Models(planes[0], planes[1], options.workspace_bytes)


@torch.no_grad()
def linear_kl_fwd(*arguments: Any, shard: Shard | None = None) -> tuple[Tensor, ...]:
    """Divergences and both models' `Normalisers`, labels' shape; see the schema and `linear_kl`.

    `shard`, which the op does not have, is of both heads.
    """
    policy, reference, tokens, options = split(arguments, *_FORWARD)
    models, shape = _models(policy, reference, tokens, options, shard), tokens.labels.shape
    with without_autocast(policy.hidden.device):
        kl, found = divergence.forward(models)
    return tuple(models.policy.tokens.spread(values, shape) for values in (kl, *found))


@torch.no_grad()
def linear_kl_bwd(*arguments: Any, shard: Shard | None = None) -> Gradients:
    """Gradients of hidden, weight and bias, empty where they are not needed."""
    model, reference, tokens, options, found, upstream, needs = split(
        arguments, *_FORWARD, Normalisers, UpstreamKL, Needs
    )
    models = _models(model, reference, tokens, options, shard)
    policy, hidden = models.policy, model.hidden
    grad_hidden = like_hidden(hidden, policy.tokens, hidden.dtype) if needs.need_hidden else hidden.new_empty(0)
    head_out = policy.head.gradient(policy.wide, weight=needs.need_weight, bias=needs.need_bias)
    hidden_out = grad_hidden.view(policy.hidden.shape) if needs.need_hidden else None
    with without_autocast(hidden.device):
        found = Normalisers(*map(policy.tokens.gather, found))
        divergence.backward(models, found, policy.tokens.gather(upstream.grad), hidden_out, head_out)
    return Gradients(grad_hidden, *gradients_of(head_out, model.weight))


for _op in (linear_kl_fwd, linear_kl_bwd):
    _library.impl(_op.__name__, _op, "CompositeExplicitAutograd")


@torch.library.register_fake("spo_kernels::linear_kl_fwd", lib=_library)
def _fwd_fake(*arguments: Any) -> tuple[Tensor, ...]:
    model, _, tokens, _ = split(arguments, *_FORWARD)
    hidden, dtype = model.hidden, accumulator_dtype(model.hidden.dtype)
    made = 1 + len(Normalisers._fields)
    return tuple(torch.empty(tokens.labels.shape, dtype=dtype, device=hidden.device) for _ in range(made))


@torch.library.register_fake("spo_kernels::linear_kl_bwd", lib=_library)
def _bwd_fake(*arguments: Any) -> Gradients:
    model, *_, needs = split(arguments, *_FORWARD, Normalisers, UpstreamKL, Needs)
    return gradients_fake(model, needs)


_fwd = torch.ops.spo_kernels.linear_kl_fwd.default
_bwd = torch.ops.spo_kernels.linear_kl_bwd.default


def kl_divergence(
    policy: ModelInputs, reference: ModelInputs, tokens: Tokens, shift: bool, execution: Execution
) -> Tensor:
    """`linear_kl` of resolved inputs: `[labels' shape]`, differentiable in the policy's."""
    tensors = (*policy.tensors(), *reference.detach().tensors())
    options = CallOptions(shift, execution.workspace_bytes, execution.backend)
    kl: Tensor = LinearKLFunction.apply(*tensors, *tokens, options, policy.shard)
    return kl


class LinearKLFunction(torch.autograd.Function):
    """Two products forward; backward recomputes both models' logits."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Arguments: the ops', and the shard of both heads. Returns the divergences, shaped like labels."""
        *tensors, ctx.options, ctx.shard = arguments
        run: Any = _fwd if is_traced(tensors[0]) else partial(linear_kl_fwd, shard=ctx.shard)
        result: Tensor
        result, *found = run(*tensors, *ctx.options)
        ctx.save_for_backward(*tensors, *found)
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias."""
        refuse_double_backward("linear_kl")
        needs = ctx.needs_input_grad[:3]
        run: Any = _bwd if is_traced(upstream) else partial(linear_kl_bwd, shard=ctx.shard)
        policy, reference, tokens, made = split(ctx.saved_tensors, ModelTensors, ModelTensors, Tokens, Normalisers)
        found = run(*policy, *reference, *tokens, *ctx.options, *made, upstream, *needs)
        rest = [None] * (len(ctx.needs_input_grad) - 3)
        return *(g if need else None for g, need in zip(found, needs, strict=True)), *rest
