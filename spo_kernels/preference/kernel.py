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
from spo_kernels.engine.op_arguments import schema, split
from spo_kernels.engine.token_rows import TokenRows
from spo_kernels.losses import DPO, SPO, Objective
from spo_kernels.losses.reconstructed.spo import SPO_VALUE
from spo_kernels.preference.batch import PairBatch

_library = torch.library.Library("spo_kernels", "FRAGMENT")
_library.define(
    f"pair_loss({schema(PairTensors, PairForm)}, float factor, str backend) -> (Tensor summary, Tensor coefficients)"
)


def _pair_loss(*arguments: Any) -> tuple[Tensor, Tensor]:
    """See `Backend.pair_loss`."""
    *given, factor, backend = arguments
    pairs, form = split(given, PairTensors, PairForm)
    return load_backend(backend).pair_loss(pairs, form, factor)


_library.impl("pair_loss", _pair_loss, "CompositeExplicitAutograd")


@torch.library.register_fake("spo_kernels::pair_loss", lib=_library)
def _pair_loss_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    (pairs,) = split(arguments, PairTensors)
    return pairs.contiguous().outputs()


_op = torch.ops.spo_kernels.pair_loss.default
# less than any class, also where they are counted from another than the first; 32 bits
_NO_CLASS = -(2**31)


class PairLossFunction(torch.autograd.Function):
    """Sum of `factor * loss` over pairs; its gradient was computed with it."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Arguments: `PairTensors`, form, backend and factor. Returns the loss, and the summary without gradient."""
        *tensors, form, backend, ctx.factor = (logp, *arguments)
        # the op is not given the factor, with which it would be compiled anew for every number of pairs
        run = _op if is_traced(logp) else _pair_loss
        summary, coefficients = run(*tensors, *form, 1.0, backend)
        ctx.save_for_backward(coefficients)
        ctx.arguments = len(arguments)
        ctx.mark_non_differentiable(summary)
        return summary[0].sum() * ctx.factor, summary

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of logp."""
        (coefficients,) = ctx.saved_tensors
        return (coefficients * (grad * ctx.factor), *[None] * ctx.arguments)


def kernel_form(objective: Objective, has_reference: bool, has_value: bool) -> PairForm | None:
    """What the kernel is to compute for an objective, or None where it does not apply."""
    base = objective.base if type(objective) is SPO else objective
    if type(base) is not DPO or not (has_reference or base.reference_free):
        return None
    form = PairForm(base.beta, not base.reference_free)
    if type(objective) is not SPO:
        return form
    if objective.penalty == "hinge" and not (has_reference if objective.value == "reference" else has_value):
        return None
    return form._replace(
        penalty=objective.penalty,
        weight=objective.weight,
        epsilon=objective.epsilon,
        value_from=objective.value,
        mean=objective.normalization == "mean",
    )


@dataclass(frozen=True)
class PairKernel:
    """The kernel for one batch. Its summary is `Outcome.summary`."""

    form: PairForm
    backend: str

    @classmethod
    def of(cls, batch: PairBatch) -> PairKernel | None:
        """None where the ordinary way is to be taken."""
        name = batch.execution.backend
        # the kernel sums the tokens of this process alone
        if batch.pairs == 0 or batch.layout.group is not None or not has_pair_loss(name):
            return None
        inputs = batch.inputs
        form = kernel_form(batch.objective, inputs.reference is not None, SPO_VALUE in inputs.named)
        return None if form is None else cls(form, name)

    def loss(self, logp: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """`batch.scale` times the sum of the losses, differentiable, and the summary."""
        layout, inputs = batch.layout, batch.inputs
        labels = layout.labels.masked_fill(~batch.tokens.counted, _NO_CLASS)
        pairs = PairTensors(logp, labels, layout.cu_seqlens, inputs.reference, inputs.named.get(SPO_VALUE), _NO_CLASS)
        loss, summary = PairLossFunction.apply(*pairs, self.form, self.backend, batch.scale)
        return loss, summary

    def differentiate(
        self, logp: Tensor, tokens: TokenRows, lengths: Tensor | int, pairs: range, batch: PairBatch
    ) -> tuple[Tensor, Tensor]:
        """The summary and the per-token derivatives of consecutive pairs, whose tokens these are.

        `lengths` of the sequences, or the one that all have.
        """
        reference, value = batch.inputs.reference, batch.inputs.named.get(SPO_VALUE)
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
        given = PairTensors(logp, labels, bounds, reference, value, _NO_CLASS)
        summary, slopes = load_backend(self.backend).pair_loss(given, self.form, batch.scale)
        return summary, slopes.view(-1)
