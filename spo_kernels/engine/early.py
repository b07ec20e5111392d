"""Gradients that are made in the forward, together with the loss, and given out once by its backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spo_kernels.backends.contract import Backend
from spo_kernels.engine.checks import refuse_double_backward, without_autocast
from spo_kernels.engine.gradients import HeadGradient
from spo_kernels.engine.head_slices import HeadSlices
from spo_kernels.engine.inputs import ModelInputs
from spo_kernels.engine.token_rows import TokenRows


def why_not_early(model: ModelInputs) -> str | None:
    """Why gradients cannot be made early, or None where they can."""
    if model.streams:
        return "rows of a head with a shard_group pass by in slices"
    if model.hidden.dtype == torch.float16:
        # a scaled loss is what brings them into it, and it comes after the forward
        return "unscaled gradients may lie below float16's range"
    return None


class Made(NamedTuple):
    """What `EarlyWork.make` gives beside gradients."""

    losses: Tensor
    logps: Tensor
    # where it was given no `HeadGradient`: writes it, multiplied
    head_later: Callable[[HeadGradient, Tensor | None], None] | None = None


@dataclass(frozen=True)
class EarlyWork:
    """Who makes gradients, and of what."""

    name: str  # of the public function
    again: str  # what to do in order to go backward twice
    head: HeadSlices
    backend: Backend
    wide: torch.dtype
    tokens: TokenRows
    scale: float  # by which the sum of the losses is multiplied
    # writes gradients of the head, and of hidden ([rows, H], zero where no token counts)
    make: Callable[[HeadGradient | None, Tensor | None], Made]
    adds_to_grad: bool  # the head's gradient is left to the backward, which adds it to the one that exists

    def run(self, model: ModelInputs) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, differentiable once, and what `make` gives, without gradient."""
        found: tuple[Tensor, Tensor, Tensor] = EarlyGradients.apply(model.hidden, model.weight, model.bias, self)
        return found


class EarlyGradients(torch.autograd.Function):
    """Loss and gradients together in the forward; the backward multiplies by the upstream gradient.

    Where the head's is added to a gradient that exists, it is the backward that makes it, of the tile that is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: EarlyWork
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the reduced loss, losses and log-probabilities; the last two carry no gradient."""
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        rows, grad_hidden = hidden.reshape(-1, hidden.shape[-1]), None
        if need_hidden:
            # unscaled gradients wait in it
            allocate = torch.empty_like if work.tokens.fills else torch.zeros_like
            grad_hidden = allocate(rows, memory_format=torch.contiguous_format)
        head_out = None
        if work.adds_to_grad:
            ctx.save_for_backward(hidden, weight)
        else:
            head_out = work.head.gradient(work.wide, weight=need_weight, bias=need_bias)
        with without_autocast(hidden.device):
            losses, logps, head_later = work.make(head_out, grad_hidden)
        room = partial(work.head.gradient, work.wide, weight=need_weight, bias=need_bias) if head_later else None
        ctx.gradients = None if grad_hidden is None else grad_hidden.view(hidden.shape), head_out, head_later, room
        ctx.weight_dtype, ctx.work = weight.dtype, (work.name, work.again, work.wide, work.backend)
        ctx.mark_non_differentiable(losses, logps)
        return losses.sum() * work.scale, losses, logps

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, multiplied in place."""
        name, again, wide, backend = ctx.work
        refuse_double_backward(name)
        if ctx.gradients is None:
            raise RuntimeError(
                f"{name}: the gradients of a loss computed in three products are given out once; "
                f"to go backward through it again, {again}"
            )
        hidden, head_out, head_later, room = ctx.gradients
        # held here they would be copied, not taken over, by the parameter's .grad
        ctx.gradients = None
        # a loss's own backward sends 1: a CPU looks, a GPU's kernel passes by the rows whose factor it is
        factor = None if upstream.is_cpu and upstream.item() == 1.0 else upstream.to(wide)
        if head_later is None:
            _scale_(backend, factor, hidden, head_out.weight)
            if factor is not None and head_out.bias is not None:
                head_out.bias.mul_(factor)
        else:
            _scale_(backend, factor, hidden)
            head_out = room(onto=ctx.saved_tensors[1].grad)
            head_later(head_out, factor)
        weight = None if head_out.adds else head_out.weight
        return hidden, weight, None if head_out.bias is None else head_out.bias.to(ctx.weight_dtype), None


def _scale_(backend: Backend, factor: Tensor | None, *gradients: Tensor | None) -> None:
    """Multiply by a 0-d tensor, where there is one."""
    for grad in gradients:
        if grad is not None and factor is not None:
            rows = grad.view(grad.shape[:-1].numel(), grad.shape[-1])
            backend.scale_rows(rows, factor.expand(len(rows)).contiguous())
