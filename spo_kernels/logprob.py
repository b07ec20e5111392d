"""`linear_logprob`: token log-probabilities of an LM head, differentiable, without the `[N, V]` logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spo_kernels.backends.registry import choose_backend
from spo_kernels.engine.checks import check_head_inputs, check_options
from spo_kernels.engine.ops import linear_logprob_bwd, linear_logprob_fwd  # noqa: F401  (registers the ops)
from spo_kernels.sparsity import EXACT, Sparsity, as_sparsity

OUTPUTS = ("lse", "correct", "entropy", "log_sum_p2", "dropped_mass", "kept_share")
_EXACT = {"dropped_mass": 0.0, "kept_share": 1.0}
_WITHOUT_GRADIENT = ("correct", *_EXACT)

_fwd = torch.ops.spo_kernels.linear_logprob_fwd.default
_bwd = torch.ops.spo_kernels.linear_logprob_bwd.default


@dataclass(frozen=True)
class LogprobOptions:
    """Everything about a call that is not a tensor."""

    logit_scale: float
    logit_softcap: float | None
    ignore_index: int
    shift: bool
    workspace_bytes: int | None
    backend: str
    moments: bool
    grad_outputs: tuple[str, ...]  # optional outputs that carry a gradient
    sparsity: Sparsity

    def op_arguments(self) -> tuple[Any, ...]:
        """In the order of the ops' schemas."""
        return (
            self.logit_scale,
            self.logit_softcap,
            self.ignore_index,
            self.shift,
            self.workspace_bytes,
            self.backend,
        )


class LinearLogprobFunction(torch.autograd.Function):
    """Forward: two products where hidden needs a gradient (it is finished there), else one.

    Backward: two more where the weight needs a gradient (logits again, then dW); a gradient that flows into
    lse, entropy or log_sum_p2 costs one more for dH.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: LogprobOptions,
    ) -> tuple[Tensor, ...]:
        """Returns logp and everything in `OUTPUTS`."""
        recompute = bool(options.grad_outputs) or any(ctx.needs_input_grad[1:3])
        sparsity = options.sparsity if any(ctx.needs_input_grad[:3]) else EXACT
        exact = sparsity.mode == "exact"
        outputs = _fwd(
            hidden,
            weight,
            bias,
            labels,
            *options.op_arguments(),
            options.moments,
            ctx.needs_input_grad[0] and (exact or not recompute),
            sparsity.mode,
            sparsity.tolerance,
            sparsity.seed,
        )
        values, saved = outputs[: 1 + len(OUTPUTS)], outputs[1 + len(OUTPUTS) :]
        extras = dict(zip(OUTPUTS, values[1:], strict=True))
        # with a frozen head hidden need not outlive the forward: what is kept is its finished gradient
        kept = hidden if recompute or not exact else saved[0]
        statistics = (extras["lse"], extras["entropy"], extras["log_sum_p2"])
        ctx.save_for_backward(kept, weight, bias, labels, *statistics, *saved)
        ctx.options = options
        ctx.mark_non_differentiable(*(value for name, value in extras.items() if name not in options.grad_outputs))
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_logprob does not support double backward: its gradient cannot be differentiated "
                "(create_graph=True was passed)"
            )
        grad_logp, *extras = upstream
        # torch.compile passes zeros, not None, where nothing flows: they would cost a product
        named = {k: g for k, g in zip(OUTPUTS, extras, strict=True) if k in ctx.options.grad_outputs}
        grads = (grad_logp, named.get("lse"), named.get("entropy"), named.get("log_sum_p2"))
        needs = ctx.needs_input_grad[:3]
        if all(g is None for g in grads):
            return None, None, None, None, None
        result = _bwd(*ctx.saved_tensors, *grads, *ctx.options.op_arguments(), *needs)
        return (*(g if need else None for g, need in zip(result, needs, strict=True)), None, None)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    outputs: Sequence[str] = (),
    sparsity: str | Sparsity = "exact",
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of labels under a linear head, without materialising the `[N, V]` logits.

    Equivalent PyTorch, with `softcap(x) = logit_softcap * tanh(x / logit_softcap)`::

        logits = softcap(logit_scale * (hidden @ weight.T + bias)).float()
        logp = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        logp = logp.masked_fill(labels == ignore_index, 0.0)

    Differentiable in `hidden`, `weight` and `bias` for any upstream gradient. Cost in products of size
    `[N, H] x [H, V]` over the N tokens that are not ignored: 1 without gradients, 2 with a frozen head,
    4 with a trained one.

    Args:
        hidden: `[..., H]` last hidden states; float32, bfloat16, float16 or float64.
        weight: `[V, H]`, same dtype. A weight that needs no gradient costs no product for it.
        labels: `[...]` int64 target ids in [0, V), or `ignore_index`. Ignored tokens take part in no product.
        bias: `[V]`, same dtype.
        logit_scale: Multiplies the products (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`).
        logit_softcap: Gemma's `final_logit_softcapping`; None for none.
        ignore_index: Label of the positions that do not count.
        shift: Position t of `hidden` predicts `labels[..., t + 1]`. The result is aligned with `labels`, so
            its first position along the last dimension is 0.
        outputs: Any of "lse" (log-sum-exp of the logits), "correct" (bool: the label has the largest logit;
            ties count), "entropy" (nats) and "log_sum_p2" (log Σ_v p_v²), computed in the same pass. All but
            "correct" are differentiable; a gradient that flows into them costs one more product.
            With `sparsity`, also "dropped_mass" (softmax mass left out of a token's gradient) and "kept_share"
            (of its vocabulary blocks); 0 and 1 where the backward is exact.
        sparsity: "exact", "certified", "unbiased" or a `Sparsity`: which blocks of the vocabulary the backward
            multiplies. Costs 1 + 3ρ products with a trained head and 1 + 2ρ with a frozen one, ρ the share kept,
            and up to 64 MiB beside the workspace for masses and lists.
        workspace_bytes: Bound on temporaries beside inputs, gradients and per-token values. Default 32 MiB
            on a CPU, 512 MiB on a GPU.
        backend: "torch", "cpp", "triton" or "cuda"; None takes SPO_BACKEND or else the best that is available.

    Returns:
        logp in float32 (float64 for float64 inputs), shaped like `labels`, 0 where ignored. With `outputs`:
        `(logp, extras)`, where `extras` maps each name to a tensor shaped like `labels`.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape, device or value.
        IndexError: A label is out of range.
        RuntimeError: The backend asked for is missing; or a double backward.

    The same inputs give the same bits run to run. Under `torch.autocast`, hidden, weight and bias are cast to
    its dtype, as `F.linear` does.
    """
    logp, extras = prepare_call(
        hidden,
        weight,
        labels,
        bias=bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        ignore_index=ignore_index,
        shift=shift,
        outputs=outputs,
        sparsity=sparsity,
        workspace_bytes=workspace_bytes,
        backend=backend,
    ).run()
    # not made where nothing was left out
    made = {name: torch.full_like(logp, value) for name, value in _EXACT.items() if name in outputs}
    extras |= {name: value for name, value in made.items() if not extras[name].numel()}
    return (logp, {name: extras[name] for name in outputs}) if outputs else logp


@dataclass(frozen=True)
class LogprobCall:
    """A checked call: tensors in the dtype that they are computed in, and options."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    options: LogprobOptions

    def run(self) -> tuple[Tensor, dict[str, Tensor]]:
        """logp, and all optional outputs (empty where they were not asked for)."""
        tensors = (self.hidden, self.weight, self.bias, self.labels)
        logp, *extras = LinearLogprobFunction.apply(*tensors, self.options)
        return logp, dict(zip(OUTPUTS, extras, strict=True))


def prepare_call(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    ignore_index: int,
    shift: bool,
    workspace_bytes: int | None,
    backend: str | None,
    sparsity: str | Sparsity = "exact",
    outputs: Sequence[str] = (),
    outputs_carry_grad: bool = True,
) -> LogprobCall:
    """Check everything that `linear_logprob` is given, cast under autocast, and choose the backend."""
    check_head_inputs(hidden, weight, bias, labels, shift=shift)
    check_options(logit_scale, logit_softcap, ignore_index, workspace_bytes)
    unknown = [name for name in outputs if name not in OUTPUTS]
    if isinstance(outputs, str) or unknown:
        raise ValueError(f"outputs = {outputs!r}: expected a sequence of names from {', '.join(OUTPUTS)}")
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    options = LogprobOptions(
        logit_scale=float(logit_scale),
        logit_softcap=None if logit_softcap is None else float(logit_softcap),
        ignore_index=ignore_index,
        shift=shift,
        workspace_bytes=workspace_bytes,
        backend=choose_backend(backend, hidden.device, hidden.dtype),
        moments="entropy" in outputs or "log_sum_p2" in outputs,
        grad_outputs=tuple(name for name in outputs if name not in _WITHOUT_GRADIENT) if outputs_carry_grad else (),
        sparsity=as_sparsity(sparsity),
    )
    return LogprobCall(hidden, weight, bias, labels, options)
