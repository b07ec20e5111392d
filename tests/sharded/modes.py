"""A loss of one process, and the same loss of processes that share the vocabulary, the tokens, or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spo_kernels import LMHead, fused_spo_loss, linear_kl, linear_logprob, linear_token_loss, sequence_logps
from spo_kernels.losses.registry import resolve_objective
from tests.sharded.inputs import Inputs, alone, parts, token_part, worst

# heads of policy and reference
Run = Callable[[Inputs, LMHead, LMHead], dict[str, Tensor]]


def gradients(hidden: Tensor, head: LMHead) -> dict[str, Tensor]:
    leaves = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    for lora in head.lora:
        leaves |= {"a": lora.a, "b": lora.b}
    return {name: leaf.grad for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None}


def pair_loss(loss: Any = "dpo", *, frozen: bool = False, weighted: bool = False, **options: Any) -> Run:
    """`fused_spo_loss` with a reference that is evaluated in the call, forward and backward."""

    def run(inputs: Inputs, head: LMHead, ref_head: LMHead) -> dict[str, Tensor]:
        hidden = inputs.hidden.clone().requires_grad_()
        if frozen:
            head.weight.requires_grad_(False)
        # of an objective that draws, the first process's draws count
        torch.manual_seed(0 if head.vocab_group is None else dist.get_rank(head.vocab_group))
        objective = resolve_objective(loss() if callable(loss) else loss)
        found, metrics = fused_spo_loss(
            hidden,
            head,
            inputs.labels,
            loss=objective,
            ref_hidden=inputs.ref_hidden,
            ref_head=ref_head,
            cu_seqlens=inputs.cu_seqlens,
            token_weights=inputs.token_weights if weighted else None,
            **{"token_metrics": True, "pair_logps": True, **options},
        )
        if found.requires_grad:
            found.sum().backward()
        minuends = {"reward minuends": getattr(objective, "beta", 1.0) * metrics["pair_logps"]}
        return {"loss": found.detach(), **metrics, **minuends, **gradients(hidden, head)}

    return run


def logprob(*, frozen: bool = False, upstream: tuple[str, ...] = (), **options: Any) -> Run:
    """`linear_logprob` with its outputs, and an uneven gradient into each of `upstream` and logp."""

    def run(inputs: Inputs, head: LMHead, ref_head: LMHead) -> dict[str, Tensor]:
        hidden = inputs.hidden.clone().requires_grad_()
        if frozen:
            head.weight.requires_grad_(False)
        found = linear_logprob(hidden, head, inputs.labels, **options)
        logp, extras = found if isinstance(found, tuple) else (found, {})
        slope = torch.linspace(-1, 1, logp.numel(), dtype=logp.dtype).view(logp.shape)
        sum((value * slope).sum() for value in (logp, *(extras[name] for name in upstream))).backward()
        return {"logp": logp.detach(), **extras, **gradients(hidden, head)}

    return run


def of_tokens(**options: Any) -> Run:
    """`linear_token_loss`, each token's with a weight of its own."""

    def run(inputs: Inputs, head: LMHead, ref_head: LMHead) -> dict[str, Tensor]:
        hidden = inputs.hidden.clone().requires_grad_()
        loss, logp = linear_token_loss(
            hidden, head, inputs.labels, lambda logp, at: inputs.token_weights[at] * logp.square(), **options
        )
        loss.backward()
        return {"loss": loss.detach(), "logp": logp, **gradients(hidden, head)}

    return run


def divergence(**options: Any) -> Run:
    """`linear_kl`."""

    def run(inputs: Inputs, head: LMHead, ref_head: LMHead) -> dict[str, Tensor]:
        hidden = inputs.hidden.clone().requires_grad_()
        kl = linear_kl(hidden, head, inputs.ref_hidden, ref_head, inputs.labels, **options)
        kl.sum().backward()
        return {"kl": kl.detach(), **gradients(hidden, head)}

    return run


def of_sequences(**options: Any) -> Run:
    """`sequence_logps`."""

    def run(inputs: Inputs, head: LMHead, ref_head: LMHead) -> dict[str, Tensor]:
        hidden = inputs.hidden.clone().requires_grad_()
        sums = sequence_logps(hidden, head, inputs.labels, cu_seqlens=inputs.cu_seqlens, **options)
        sums.square().sum().backward()
        return {"sums": sums.detach(), **gradients(hidden, head)}

    return run


def alone_of(inputs: Inputs, run: Run) -> dict[str, Tensor]:
    with alone():
        return run(inputs, inputs.head(), inputs.ref_head())


def rows_of(found: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """What a process with these rows should have of a result of all."""
    return {name: value[rows] if name in ("weight", "bias", "b") else value for name, value in found.items()}


def split_vocabulary(inputs: Inputs, run: Run, shares: tuple[float, ...]) -> dict[str, float]:
    """Errors where every process has rows."""
    rows, group = parts(len(inputs.weight), shares)[dist.get_rank()], dist.group.WORLD
    ours = run(inputs, inputs.head(rows, vocab_group=group), inputs.ref_head(rows, vocab_group=group))
    return worst(ours, rows_of(alone_of(inputs, run), rows))


def split_tokens(inputs: Inputs, run: Run, shares: tuple[float, ...]) -> dict[str, float]:
    """Errors where every process has tokens of each sequence; gradients of the head are summed."""
    part, places = token_part(inputs, dist.get_rank(), shares)
    ours = run(part, inputs.head(sequence_group=dist.group.WORLD), inputs.ref_head())
    return worst(total(ours, None), tokens_of(alone_of(inputs, run), inputs, part, places))


def split_both(inputs: Inputs, run: Run, vocab: dist.ProcessGroup, tokens: dist.ProcessGroup) -> dict[str, float]:
    """Errors where processes share the vocabulary, and such groups the tokens."""
    rows = parts(len(inputs.weight), (1, 2))[dist.get_rank(vocab)]
    part, places = token_part(inputs, dist.get_rank(tokens), (2, 1))
    ours = run(
        part, inputs.head(rows, vocab_group=vocab, sequence_group=tokens), inputs.ref_head(rows, vocab_group=vocab)
    )
    expected = rows_of(alone_of(inputs, run), rows)
    return worst(total(ours, tokens), tokens_of(expected, inputs, part, places))


def total(found: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """The head's gradients summed, as a trainer does."""
    for name in ("weight", "bias", "a", "b"):
        if name in found:
            dist.all_reduce(found[name], group=group)
    return found


def tokens_of(found: dict[str, Tensor], inputs: Inputs, part: Inputs, places: Tensor) -> dict[str, Tensor]:
    """What a process with these tokens should have of a result of all."""
    flat = found["hidden"].flatten(0, inputs.labels.ndim - 1)
    return {**found, "hidden": flat[places].view(part.hidden.shape)}
