"""The plain PyTorch expression, and a run of it or of another function forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spo_kernels.head import LMHead
from spo_kernels.testing.batches import Batch

DIFFERENTIABLE = ("logp", "lse", "entropy", "log_sum_p2")


def statistics(logits: Tensor, labels: Tensor, outputs: Iterable[str]) -> dict[str, Tensor]:
    """Every output of the primitive from logits [n, V] and labels [n]."""
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    # Where p is 0, p log p is 0 too, and its gradient must not be 0 * -inf.
    safe = log_probs.masked_fill(probs == 0, 0.0)
    target = logits.gather(-1, labels.unsqueeze(-1))
    compute: dict[str, Callable[[], Tensor]] = {
        "logp": lambda: log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
        "lse": lambda: logits.logsumexp(-1),
        "entropy": lambda: -(probs * safe).sum(-1),
        "log_sum_p2": lambda: (2 * log_probs).logsumexp(-1),
        "correct": lambda: (target >= logits).all(-1),
    }
    return {name: compute[name]() for name in ("logp", *outputs)}


def cap(products: Tensor, logit_scale: float, logit_softcap: float | None) -> Tensor:
    """Logits from products."""
    logits = logit_scale * products
    return logits if logit_softcap is None else logit_softcap * torch.tanh(logits / logit_softcap)


def align(hidden: Tensor, labels: Tensor, ignore_index: int, shift: bool) -> tuple[Tensor, Tensor]:
    """Flat rows: the hidden state that predicts each label [N, H], and which of them count [N]."""
    keep = labels != ignore_index
    if shift:
        hidden = hidden.roll(1, dims=-2)
        keep = keep & (torch.arange(labels.shape[-1], device=labels.device) > 0)
    return hidden.reshape(labels.numel(), hidden.shape[-1]), keep.flatten()


def scatter(values: Tensor, keep: Tensor, shape: Sequence[int]) -> Tensor:
    """Values of the kept rows at their places, 0 elsewhere."""
    full = values.new_zeros(keep.shape + values.shape[1:]).index_put((keep,), values)
    return full.reshape(shape)


def eager_logprob(
    hidden: Tensor,
    head: Tensor | LMHead,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = False,
    outputs: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """`linear_logprob` as anyone would write it, differentiable, with the `[n, V]` logits in `dtype`."""
    hidden, keep = align(hidden, labels, ignore_index, shift)
    head = head if isinstance(head, LMHead) else LMHead(head)
    products = hidden[keep].to(dtype) @ head.weight.to(dtype).T
    if head.bias is not None:
        products = products + head.bias.to(dtype)
    found = statistics(cap(products, head.logit_scale, head.logit_softcap), labels.flatten()[keep], outputs)
    full = {name: scatter(value, keep, labels.shape) for name, value in found.items()}
    logp = full.pop("logp")
    return (logp, full) if outputs else logp


def evaluate(
    function: Callable[..., Any],
    batch: Batch,
    upstream: Mapping[str, Tensor],
    *,
    trained: Sequence[str] = ("hidden", "weight", "bias"),
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Run `function` forward and backward: its outputs by name, and `hidden.grad`, `weight.grad`, `bias.grad`.

    `upstream` holds the gradient of each output; an output that it does not name gets none.
    """
    inputs = {"hidden": batch.hidden, "weight": batch.weight, "bias": batch.bias}
    leaves = {
        name: tensor.detach().requires_grad_(name in trained) for name, tensor in inputs.items() if tensor is not None
    }
    head = LMHead(leaves["weight"], leaves.get("bias"), logit_scale=logit_scale, logit_softcap=logit_softcap)
    result = function(leaves["hidden"], head, batch.labels, **options)
    logp, extras = result if isinstance(result, tuple) else (result, {})
    found = {"logp": logp, **extras}
    wanted = [name for name in upstream if name in found]
    torch.autograd.backward([found[name] for name in wanted], [upstream[name] for name in wanted])
    values = {name: value.detach() for name, value in found.items()}
    values |= {f"{name}.grad": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return values


def random_upstream(
    batch: Batch, outputs: Sequence[str] = (), *, size: float = 1.0, seed: int = 0
) -> dict[str, Tensor]:
    """A normal upstream gradient of standard deviation `size` for logp and every differentiable output."""
    generator = torch.Generator().manual_seed(seed + 1)
    dtype = torch.float64 if batch.hidden.dtype == torch.float64 else torch.float32
    names = [name for name in ("logp", *outputs) if name in DIFFERENTIABLE]
    return {name: size * torch.randn(batch.labels.shape, generator=generator).to(dtype) for name in names}
