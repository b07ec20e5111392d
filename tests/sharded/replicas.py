"""Two replicas of two processes that share a vocabulary: objectives' statistics are over pairs, not processes."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from spo_kernels import LMHead, fused_spo_loss
from spo_kernels.losses.registry import build_loss
from tests.sharded.inputs import Inputs, alone, parts, random_inputs, worst

STEPS = 3


def of_pairs(inputs: Inputs, pairs: slice) -> Inputs:
    """Consecutive pairs of a padded batch."""

    def of(values: torch.Tensor) -> torch.Tensor:
        return values.unflatten(0, (2, -1))[:, pairs].flatten(0, 1)

    return replace(inputs, **{name: of(getattr(inputs, name)) for name in ("hidden", "labels", "ref_hidden")})


def step(
    inputs: Inputs, head: LMHead, ref_head: LMHead, objective: object, path: str | None = None
) -> dict[str, torch.Tensor]:
    hidden = inputs.hidden.clone().requires_grad_()
    reference = {"ref_hidden": inputs.ref_hidden, "ref_head": ref_head}
    loss, _ = fused_spo_loss(hidden, head, inputs.labels, loss=objective, **reference, reduction="sum", path=path)
    loss.backward()
    return {"loss": loss.detach(), "hidden": hidden.grad, "weight": head.weight.grad}


def replicas(counts: tuple[int, int], vocab: dist.ProcessGroup, across: dist.ProcessGroup) -> dict[str, float]:
    """Errors of β-DPO, whose β, filter and moving moments are of all pairs, step by step.

    In float64: its moments magnify a rounding of float32 to 3e-6, more or less by the instructions that a CPU has.
    """
    ours, theirs = (build_loss("beta_dpo", filtered=0.4) for _ in range(2))
    mine, errors = parts(sum(counts), counts)[dist.get_rank(across)], {}
    for number in range(STEPS):
        inputs = random_inputs(40 + number, pairs=sum(counts), dtype=torch.float64)
        rows = parts(len(inputs.weight), (2, 1))[dist.get_rank(vocab)]
        groups = {"vocab_group": vocab}
        found = step(of_pairs(inputs, mine), inputs.head(rows, **groups), inputs.ref_head(rows, **groups), ours)
        for name in ("loss", "weight"):
            dist.all_reduce(found[name], group=across)
        with alone():
            expected = step(inputs, inputs.head(), inputs.ref_head(), theirs)
        expected["weight"] = expected["weight"][rows]
        expected["hidden"] = expected["hidden"].unflatten(0, (2, -1))[:, mine].flatten(0, 1)
        errors |= {f"{name}, {number}": value for name, value in worst(found, expected).items()}
    return errors
