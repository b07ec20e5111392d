"""Gradients that are made in the forward, together with the loss, and given out once by its backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spo_kernels.engine.checks import without_autocast
from spo_kernels.engine.gradients import HeadGradient
from spo_kernels.engine.head_slices import HeadSlices
from spo_kernels.engine.inputs import ModelInputs
from spo_kernels.engine.tokens import TokenRows


def why_not_early(model: ModelInputs) -> str | None:
    """Why gradients cannot be made early, or None where they can."""
    if model.adds_to_grad:
        return "a head with accumulate=True adds to weight.grad in the backward"
    if model.streams:
        return "rows of a head with a shard_group pass by in slices"
    if model.hidden.dtype == torch.float16:
        # a scaled loss is what brings them into it, and it comes after the forward
        return "unscaled gradients may lie below float16's range"
    return None


@dataclass(frozen=True)
class EarlyWork:
    """Who makes gradients, and of what."""

    name: str  # of the public function
    again: str  # what to do in order to go backward twice
    head: HeadSlices
    wide: torch.dtype
    tokens: TokenRows
    scale: float  # by which the sum of the losses is multiplied
    # writes gradients of hidden ([rows, H], zero where no token counts) and of the head; gives losses and log-probs
    make: Callable[[HeadGradient, Tensor | None], tuple[Tensor, Tensor]]

    def run(self, model: ModelInputs) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, differentiable once, and what `make` gives, without gradient."""
        found: tuple[Tensor, Tensor, Tensor] = EarlyGradients.apply(model.hidden, model.weight, model.bias, self)
        return found


class EarlyGradients(torch.autograd.Function):
    """Loss and gradients together in the forward; the backward multiplies by the upstream gradient."""

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
        head_out = work.head.gradient(work.wide, weight=need_weight, bias=need_bias)
        with without_autocast(hidden.device):
            losses, logps = work.make(head_out, grad_hidden)
        ctx.gradients = (
            None if grad_hidden is None else grad_hidden.view(hidden.shape),
            head_out.weight,
            head_out.bias,
        )
        ctx.weight_dtype, ctx.work = weight.dtype, (work.name, work.again)
        ctx.mark_non_differentiable(losses, logps)
        return losses.sum() * work.scale, losses, logps

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, multiplied in place."""
        name, again = ctx.work
        if torch.is_grad_enabled():
            raise RuntimeError(f"{name} does not support double backward (create_graph=True was passed)")
        if ctx.gradients is None:
            raise RuntimeError(
                f"{name}: the gradients of a loss computed in three products are given out once; "
                f"to go backward through it again, {again}"
            )
        hidden, weight, bias = ctx.gradients
        # held here they would be copied, not taken over, by the parameter's .grad
        ctx.gradients = None
        # looking costs a CPU nothing, and a loss's own backward sends 1
        if not upstream.is_cpu or upstream.item() != 1.0:
            for grad in (hidden, weight, bias):
                if grad is not None:
                    grad.mul_(upstream)
        return hidden, weight, None if bias is None else bias.to(ctx.weight_dtype), None
