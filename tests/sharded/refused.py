"""Calls that cannot work: every process is to say so, none is to wait for the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from spo_kernels import LMHead, fused_spo_loss, linear_kl, linear_logprob, sequence_logps
from spo_kernels.extras.nthr import nthr_scores
from spo_kernels.head import LoRA
from spo_kernels.losses import DPO, SPO
from tests.sharded.inputs import Inputs, parts, random_inputs


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def messages() -> dict[str, list[str]]:
    """What each of two processes says."""
    found = {}
    for name, call in calls(random_inputs(11), dist.get_rank()).items():
        said: list[Any] = [None, None]
        dist.all_gather_object(said, message(call))
        found[name] = said
    return found


def calls(inputs: Inputs, rank: int) -> dict[str, Callable[[], Any]]:
    group, odd = dist.group.WORLD, rank == 1
    rows = parts(len(inputs.weight), (1, 2))[rank]
    head, ref_head = inputs.head(rows, vocab_group=group), inputs.ref_head(rows, vocab_group=group)
    tokens = inputs.head(sequence_group=group)
    stream, ref_stream = inputs.head(rows, shard_group=group), inputs.ref_head(rows, shard_group=group)

    def logprob(head: Any, labels: Any = inputs.labels, hidden: Any = inputs.hidden, **options: Any) -> Any:
        return linear_logprob(hidden, head, labels, **options)

    def pairs(head: Any, ref_head: Any = ref_head, **options: Any) -> Any:
        reference = {"ref_hidden": inputs.ref_hidden, "ref_head": ref_head}
        return fused_spo_loss(inputs.hidden, head, inputs.labels, **{"loss": "dpo", **reference, **options})

    def divergence(head: Any, ref_head: Any) -> Any:
        return linear_kl(inputs.hidden, head, inputs.ref_hidden, ref_head, inputs.labels)

    def no_grad(off: bool, call: Callable[[], Any]) -> Any:
        with torch.set_grad_enabled(not off):
            return call()

    def given(head: LMHead) -> Any:
        logps = torch.zeros(inputs.labels.shape if odd else len(inputs.labels))
        return fused_spo_loss(inputs.hidden, head, inputs.labels, loss="dpo", ref_logps=logps)

    frozen = replace(head, weight=head.weight.detach())
    dtype = (torch.float32, torch.bfloat16)[rank]
    swapped = inputs.labels.roll(1, 1) if odd else inputs.labels
    narrow = inputs.weight[rows, :15] if odd else inputs.weight[rows]
    other = parts(len(inputs.weight), (2, 1))[rank]
    lora = LoRA(torch.ones(2, 16), torch.ones(len(head.weight), 2), dropout=torch.nn.Dropout(0.1))
    fake, far = FakeTensorMode().from_tensor, inputs.labels.clone()
    far[0, 0] = len(inputs.weight)
    return {
        "labels": lambda: logprob(head, swapped),
        "label": lambda: logprob(head, far),
        "rows": lambda: logprob(LMHead(inputs.weight[: 300 if rank == 0 else 0], vocab_group=group)),
        "width": lambda: logprob(LMHead(narrow, vocab_group=group), hidden=inputs.hidden[..., : narrow.shape[1]]),
        "workspace": lambda: logprob(head, workspace_bytes=100_000 + rank),
        "backend": lambda: logprob(head, backend="cpp" if odd else "torch"),
        "path": lambda: pairs(head, path="packed", workspace_bytes=20_000),
        "paths": lambda: pairs(head, path=("packed", "two_pass")[rank]),
        "frozen": lambda: pairs(frozen if odd else head),
        "frozen hidden": lambda: logprob(head, hidden=inputs.hidden.clone().requires_grad_(odd)),
        "no_grad": lambda: no_grad(odd, lambda: logprob(head)),
        "metrics": lambda: pairs(head, token_metrics=odd),
        "outputs": lambda: logprob(head, outputs=("entropy", "lse")[: 1 + rank]),
        "weights": lambda: pairs(head, token_weights=torch.ones(inputs.labels.shape) if odd else None),
        "weights of other tokens": lambda: pairs(head, token_weights=1.0 * (inputs.labels % (2 + rank) > 0)),
        "offsets": lambda: pairs(head, loss="odpo", pair_inputs={"offset": torch.ones(3) * rank}),
        "references of tokens": lambda: given(head),
        "softcap": lambda: logprob(replace(head, logit_softcap=5.0 if odd else None)),
        "dtype": lambda: logprob(
            replace(frozen, weight=frozen.weight.to(dtype), bias=None), hidden=inputs.hidden.to(dtype)
        ),
        "objectives": lambda: pairs(head, loss=("simpo", "cpo")[rank]),
        "hyperparameters": lambda: pairs(head, loss=SPO(DPO(beta=0.1 + rank))),
        "functions": lambda: pairs(head) if odd else logprob(head),
        "plain reference": lambda: pairs(head, inputs.ref_weight[rows]),
        "whole reference": lambda: divergence(head, LMHead(inputs.ref_weight)),
        "other reference": lambda: divergence(head, LMHead(inputs.ref_weight[other], vocab_group=group)),
        "dropout": lambda: logprob(replace(head, weight=inputs.weight[rows], lora=(lora,))),
        "accumulate": lambda: logprob(replace(head, accumulate=True)),
        "traced": lambda: logprob(
            LMHead(fake(head.weight), vocab_group=group), fake(inputs.labels), fake(inputs.hidden)
        ),
        "scores": lambda: nthr_scores(inputs.hidden, head, inputs.labels, torch.ones(6, dtype=torch.bool)),
        "group": lambda: LMHead(inputs.weight, vocab_group=dist.GroupMember.NON_GROUP_MEMBER),  # type: ignore[arg-type]
        "streamed, width": lambda: logprob(
            LMHead(narrow, shard_group=group), hidden=inputs.hidden[..., : narrow.shape[1]]
        ),
        "streamed, rows": lambda: logprob(LMHead(inputs.weight[:0], shard_group=group)),
        "streamed, bias": lambda: logprob(replace(stream, bias=inputs.weight[rows, 0] if odd else None)),
        "streamed, workspace": lambda: logprob(stream, workspace_bytes=100_000 + rank),
        "streamed, frozen": lambda: logprob(stream if odd else replace(stream, weight=inputs.weight[rows])),
        "streamed, sparsity": lambda: logprob(stream, sparsity="certified"),
        "streamed, path": lambda: pairs(stream, ref_stream, path="packed"),
        "streamed, kl": lambda: divergence(stream, ref_stream),
        "streamed, plain reference": lambda: pairs(stream, inputs.ref_weight[rows]),
        "streamed, accumulate": lambda: logprob(replace(stream, accumulate=True)),
        "streamed, adapters": lambda: logprob(replace(stream, weight=inputs.weight[rows], lora=(lora,))),
        "streamed, traced": lambda: logprob(
            LMHead(fake(head.weight), shard_group=group), fake(inputs.labels), fake(inputs.hidden)
        ),
        "streamed, scores": lambda: nthr_scores(inputs.hidden, stream, inputs.labels, torch.ones(6, dtype=torch.bool)),
        "both groups": lambda: inputs.head(rows, vocab_group=group, shard_group=group),
        "shift": lambda: pairs(tokens, inputs.ref_head(), shift=True),
        "sequences": lambda: sequence_logps(inputs.hidden[rank:], tokens, inputs.labels[rank:]),
        "sequences, workspace": lambda: pairs(tokens, inputs.ref_head(), workspace_bytes=100_000 + rank),
        "sequences, metrics": lambda: pairs(tokens, inputs.ref_head(), token_metrics=odd),
        "sequences, paths": lambda: pairs(tokens, inputs.ref_head(), path=("packed", "two_pass")[rank]),
        "sequences, frozen": lambda: pairs(
            replace(tokens, weight=tokens.weight.detach()) if odd else tokens, inputs.ref_head()
        ),
        "sequences, references": lambda: pairs(
            tokens, None, ref_hidden=None, ref_logps=torch.ones(len(inputs.labels)) * (1 + rank)
        ),
        "sequences, references of tokens": lambda: given(tokens),
        "sequences, drawn": lambda: pairs(tokens, inputs.ref_head(), loss="sgdpo"),
    }
