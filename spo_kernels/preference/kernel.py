"""DPO and SPO(DPO) in one kernel, where the backend has it: for short sequences launches and small steps cost most.

The losses' definition is `spo_kernels.losses`; this only recognises the two forms that the kernel knows. Other
objectives, subclasses of these and reduction="none" take the ordinary way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spo_kernels.backends.pair_form import PairForm, PairTensors
from spo_kernels.backends.registry import has_pair_loss, load_backend
from spo_kernels.engine.checks import is_traced
from spo_kernels.engine.tokens import TokenRows
from spo_kernels.losses import DPO, SPO, Objective
from spo_kernels.preference.batch import PairBatch

_library = torch.library.Library("spo_kernels", "FRAGMENT")
_library.define(
    "pair_loss(Tensor logp, Tensor labels, Tensor? cu_seqlens, Tensor? reference, Tensor? value, int ignore_index,"
    " float factor, float beta, bool use_reference, str penalty, float weight, float epsilon, str value_from,"
    " bool mean, str backend) -> (Tensor summary, Tensor coefficients)"
)


def pair_loss(
    logp: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    reference: Tensor | None,
    value: Tensor | None,
    ignore_index: int,
    factor: float,
    beta: float,
    use_reference: bool,
    penalty: str,
    weight: float,
    epsilon: float,
    value_from: str,
    mean: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """See `Backend.pair_loss`."""
    pairs = PairTensors(logp, labels, cu_seqlens, reference, value, ignore_index)
    form = PairForm(beta, use_reference, penalty, weight, epsilon, value_from, mean)
    return load_backend(backend).pair_loss(pairs, form, factor)


_library.impl("pair_loss", pair_loss, "CompositeExplicitAutograd")


@torch.library.register_fake("spo_kernels::pair_loss", lib=_library)
def _pair_loss_fake(logp: Tensor, labels: Tensor, cu_seqlens: Tensor | None, *rest: object) -> tuple[Tensor, Tensor]:
    sequences = logp.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return logp.new_empty((7, sequences // 2)), torch.empty_like(logp, memory_format=torch.contiguous_format)


_op = torch.ops.spo_kernels.pair_loss.default
# less than any class, also where they are counted from another than the first; 32 bits
_NO_CLASS = -(2**31)


class PairLossFunction(torch.autograd.Function):
    """Sum of `factor * loss` over pairs; its gradient was computed with it."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, factor: float, *rest: Any) -> tuple[Tensor, Tensor]:
        """Returns the loss and the kernel's summary, the latter without gradient."""
        labels, cu_seqlens, reference, value, ignore_index, *form = rest
        run = _op if is_traced(logp) else pair_loss
        summary, coefficients = run(logp, labels, cu_seqlens, reference, value, ignore_index, 1.0, *form)
        ctx.save_for_backward(coefficients)
        # not given to the op, which would be compiled anew for every number of pairs
        ctx.factor = factor
        ctx.arguments = 2 + len(rest)
        ctx.mark_non_differentiable(summary)
        return summary[0].sum() * factor, summary

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of logp."""
        (coefficients,) = ctx.saved_tensors
        return (coefficients * (grad * ctx.factor), *[None] * (ctx.arguments - 1))


def kernel_form(objective: Objective, has_reference: bool, has_value: bool) -> tuple[Any, ...] | None:
    """The kernel's arguments for an objective, or None where it does not apply."""
    base = objective.base if type(objective) is SPO else objective
    if type(base) is not DPO or not (has_reference or base.reference_free):
        return None
    form = (base.beta, not base.reference_free)
    if type(objective) is not SPO:
        return (*form, "none", 0.0, 0.0, "reference", True)
    if objective.penalty == "hinge" and not (has_reference if objective.value == "reference" else has_value):
        return None
    mean = objective.normalization == "mean"
    return (*form, objective.penalty, objective.weight, objective.epsilon, objective.value, mean)


@dataclass(frozen=True)
class PairKernel:
    """The kernel for one batch. Its summary is `Outcome.summary`."""

    form: tuple[Any, ...]

    @classmethod
    def of(cls, batch: PairBatch) -> PairKernel | None:
        """None where the ordinary way is to be taken."""
        name = batch.execution.backend
        # the kernel sums the tokens of this process alone
        if batch.pairs == 0 or batch.layout.group is not None or not has_pair_loss(name):
            return None
        inputs = batch.inputs
        form = kernel_form(batch.objective, inputs.reference is not None, inputs.sft_value is not None)
        return None if form is None else cls((*form, name))

    def loss(self, logp: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """`batch.scale` times the sum of the losses, differentiable, and the summary."""
        layout, inputs = batch.layout, batch.inputs
        labels = layout.labels.masked_fill(~batch.tokens.counted, _NO_CLASS)
        arguments = (labels, layout.cu_seqlens, inputs.reference, inputs.sft_value, _NO_CLASS)
        loss, summary = PairLossFunction.apply(logp, batch.scale, *arguments, *self.form)
        return loss, summary

    def differentiate(
        self, logp: Tensor, tokens: TokenRows, lengths: Tensor | int, pairs: range, batch: PairBatch
    ) -> tuple[Tensor, Tensor]:
        """The summary and the per-token derivatives of consecutive pairs, whose tokens these are.

        `lengths` of the sequences, or the one that all have.
        """
        reference, value = batch.inputs.reference, batch.inputs.sft_value
        if len(pairs) < batch.pairs:
            part = slice(pairs.start, pairs.stop)
            reference = None if reference is None else reference.view(2, -1)[:, part].flatten()
            value = None if value is None else value[part]
        bounds, labels = None, tokens.labels
        if tokens.mask is not None:
            labels = labels.masked_fill(~tokens.mask, _NO_CLASS)
        if isinstance(lengths, int):
            logp, labels = logp.view(-1, lengths), labels.view(-1, lengths)
        else:
            bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        summary, slopes = pair_loss(logp, labels, bounds, reference, value, _NO_CLASS, batch.scale, *self.form)
        return summary, slopes.view(-1)
