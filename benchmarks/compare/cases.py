"""What is compared: each path of the library as a call that can be repeated.

The worker imports this file beside another commit's tree, so it uses only what both commits have: positional hidden,
weight and labels, and keywords that did not change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = ("float32", "bfloat16")
BETA = 0.1
TOLERANCE = 2.0**-8  # of the certified sparse backward
LOGPROB = ("logprob forward", "logprob frozen", "logprob trained")
LOSS = ("loss two_pass", "loss packed", "loss factorised", "loss certified")
SMALL = "small call"
# (B, T, H, V) of the small call: one pair of 2 x 8 tokens
SMALL_SHAPE = (1, 8, 64, 512)


@dataclass(frozen=True)
class Case:
    """One path at one dtype; `small` is the call whose time is all overhead."""

    way: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.way}, {self.dtype}"

    @property
    def small(self) -> bool:
        return self.way == SMALL


def all_cases() -> list[Case]:
    return [*(Case(way, dtype) for dtype in DTYPES for way in (*LOGPROB, *LOSS)), Case(SMALL, "float32")]


@dataclass
class Call:
    """A case bound to its inputs."""

    hidden: Tensor  # [2B, T, H]
    weight: Tensor  # [V, H]
    function: Callable[[], Tensor]
    upstream: Tensor | None = None

    def run(self) -> Tensor:
        """Forward and, where there is something to differentiate, backward."""
        self.hidden.grad = self.weight.grad = None
        value = self.function()
        if value.requires_grad:
            value.backward(self.upstream)
        return value

    def results(self) -> dict[str, Tensor]:
        """What two commits must agree on: the value and the gradients."""
        value = self.run().detach()
        grads = {"hidden.grad": self.hidden.grad, "weight.grad": self.weight.grad}
        return {"value": value} | {name: grad for name, grad in grads.items() if grad is not None}


def build(case: Case, inputs: dict[str, Tensor], backend: str, workspace_bytes: int | None) -> Call:
    """The library's call."""
    from spo_kernels import Sparsity, fused_spo_loss, linear_logprob

    hidden, weight, labels = leaves(case, inputs)
    options = {"backend": backend, "workspace_bytes": workspace_bytes}
    if case.way in LOGPROB:
        upstream = torch.linspace(-1.0, 1.0, labels.numel()).view(labels.shape)
        return Call(hidden, weight, lambda: linear_logprob(hidden, weight, labels, **options), upstream)
    reference = torch.zeros(len(labels))
    choice: dict[str, object] = {"path": case.way.partition(" ")[2]}
    if case.way == "loss certified":
        choice = {"sparsity": Sparsity("certified", TOLERANCE)}
    elif case.small:
        choice = {}
        options = {"backend": backend}
    return Call(
        hidden,
        weight,
        lambda: fused_spo_loss(hidden, weight, labels, loss="dpo", ref_logps=reference, **choice, **options)[0],
    )


def build_eager(case: Case, inputs: dict[str, Tensor]) -> Call:
    """The same loss through full logits."""
    hidden, weight, labels = leaves(case, inputs)

    def loss() -> Tensor:
        logp = (hidden @ weight.t()).float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        chosen, rejected = logp.sum(-1).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    return Call(hidden, weight, loss)


def leaves(case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and weight that require gradients where the case wants them, and labels."""
    trained = case.way not in ("logprob forward", "logprob frozen")
    hidden = inputs["hidden"].clone().requires_grad_(case.way != "logprob forward")
    return hidden, inputs["weight"].clone().requires_grad_(trained), inputs["labels"]
