"""The primitive as a differentiable function of hidden states, weight and bias."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spo_kernels.engine.checks import is_traced, refuse_double_backward
from spo_kernels.engine.head_slices import Shard
from spo_kernels.engine.inputs import Execution, ModelInputs
from spo_kernels.engine.op_arguments import (
    Asked,
    CallOptions,
    ForBackward,
    ForLabels,
    ModelTensors,
    Statistics,
    Upstream,
    split,
)
from spo_kernels.engine.ops import (
    linear_logprob_bwd,
    linear_logprob_bwd_op,
    linear_logprob_fwd,
    linear_logprob_fwd_op,
)
from spo_kernels.engine.row_stream import RowStream
from spo_kernels.engine.tokens import Tokens
from spo_kernels.sparsity import EXACT, Sparsity

OUTPUTS = ForLabels._fields[1:]
_WITH_GRADIENT = Statistics._fields


@dataclass(frozen=True)
class LogprobOptions:
    """What the function needs beside tensors."""

    call: CallOptions
    sparsity: Sparsity
    moments: bool  # entropy and log Σ p² are wanted
    mean: bool  # the mean logit is wanted
    differentiable: tuple[str, ...]  # optional outputs that carry a gradient
    accumulate: bool = False  # into the weight's .grad, where it exists
    shard: Shard | None = None  # the weight is a part of a head


@dataclass(frozen=True)
class LogprobCall:
    """A checked call."""

    model: ModelInputs
    tokens: Tokens
    options: LogprobOptions

    @classmethod
    def of(
        cls,
        model: ModelInputs,
        tokens: Tokens,
        shift: bool,
        execution: Execution,
        outputs: Sequence[str] = (),
        *,
        outputs_carry_grad: bool = False,
    ) -> LogprobCall:
        """`outputs` are names of `OUTPUTS`.

        Raises:
            ValueError: They are not.
        """
        named = isinstance(outputs, Collection) and not isinstance(outputs, str)
        unknown = [name for name in outputs if name not in OUTPUTS] if named else []
        if not named or unknown:
            expected = f"outputs must be a sequence of names from {', '.join(OUTPUTS)}"
            raise ValueError(f"{expected}, got {unknown if named else outputs!r}")
        options = LogprobOptions(
            call=CallOptions(shift, execution.workspace_bytes, execution.backend),
            sparsity=execution.sparsity,
            moments="entropy" in outputs or "log_sum_p2" in outputs,
            mean="mean_logit" in outputs,
            differentiable=tuple(n for n in outputs if n in _WITH_GRADIENT) if outputs_carry_grad else (),
            accumulate=model.accumulate,
            shard=model.shard,
        )
        return cls(model, tokens, options)

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        """logp, and all optional outputs (empty where they were not asked for), shaped like labels."""
        model, shard = self.model, self.options.shard
        if isinstance(shard, RowStream):
            shard.check_call(replace(self.options, shard=None), (model.hidden, model.weight, model.bias))
        logp, *extras = LinearLogprobFunction.apply(*model.tensors(), *self.tokens, self.options)
        return logp, dict(zip(OUTPUTS, extras, strict=True))


class LinearLogprobFunction(torch.autograd.Function):
    """Forward: two products where hidden needs a gradient (it is finished there), else one.

    Backward: two more where the weight needs a gradient (logits again, then dW); a gradient that flows into
    lse, entropy or log_sum_p2 costs one more for dH.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        """Arguments: `ModelInputs.tensors()`, `Tokens` and options. Returns logp and all of `OUTPUTS`."""
        *tensors, options = arguments
        model, tokens = split(tensors, ModelTensors, Tokens)
        recompute = bool(options.differentiable) or any(ctx.needs_input_grad[1:3])
        sparsity = options.sparsity if any(ctx.needs_input_grad[:3]) else EXACT
        exact = sparsity.mode == "exact"
        asked = Asked(
            moments=options.moments,
            mean=options.mean,
            need_logp_grad=ctx.needs_input_grad[0] and (exact or not recompute),
            sparsity=sparsity.mode,
            tolerance=sparsity.tolerance,
            seed=sparsity.seed,
        )
        # an op's boundary costs 10 us, which matters to a small call; traces need it
        traced = is_traced(model.hidden)
        run: Any = linear_logprob_fwd_op if traced else partial(linear_logprob_fwd, shard=options.shard)
        found, made = split(run(*model, *tokens, *options.call, *asked), ForLabels, ForBackward)
        # with a frozen head hidden need not outlive the forward: what is kept is its finished gradient
        kept = model.hidden if recompute or not exact else made.logp_grad
        statistics = Statistics(found.lse, found.entropy, found.log_sum_p2)
        ctx.save_for_backward(*model._replace(hidden=kept), *tokens, *statistics, *made)
        ctx.options = options
        outputs = dict(zip(OUTPUTS, found[1:], strict=True))
        ctx.mark_non_differentiable(*(v for name, v in outputs.items() if name not in options.differentiable))
        ctx.set_materialize_grads(False)
        return found.logp, *outputs.values()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias."""
        refuse_double_backward("linear_logprob")
        grad_logp, *extras = upstream
        # torch.compile passes zeros, not None, where nothing flows: they would cost a product
        named = {k: g for k, g in zip(OUTPUTS, extras, strict=True) if k in ctx.options.differentiable}
        grads = Upstream(grad_logp, *(named.get(name) for name in _WITH_GRADIENT))
        needs = ctx.needs_input_grad[:3]
        rest = [None] * (len(ctx.needs_input_grad) - 3)
        if all(g is None for g in grads):
            return None, None, None, *rest
        saved = ctx.saved_tensors  # once: checkpointing gives out each a single time
        arguments: Any = (*saved, *grads, *ctx.options.call, *needs)
        if is_traced(saved[0]):
            found, onto = linear_logprob_bwd_op(*arguments), None
        else:
            onto = saved[1].grad if ctx.options.accumulate and needs[1] else None
            found = linear_logprob_bwd(*arguments, onto=onto, shard=ctx.options.shard)
        wanted = needs[0], needs[1] and onto is None, needs[2]
        return *(g if want else None for g, want in zip(found, wanted, strict=True)), *rest
