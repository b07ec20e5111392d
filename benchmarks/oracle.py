"""Float64 truth from the same rounded inputs, tile by tile, and the errors against it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .inputs import CHUNK_BYTES, Problem
from .variant import Step, pair_loss


@dataclass(frozen=True)
class Oracle:
    """Float64 results of one problem; `dw` is None where the head is frozen."""

    loss: float
    tokens: Tensor  # [2B, T]
    dh: Tensor  # [2B, T, H]
    dw: Tensor | None  # [V, H]

    def save(self, path: Path) -> None:
        torch.save({"loss": self.loss, "tokens": self.tokens, "dh": self.dh, "dw": self.dw}, path)

    @staticmethod
    def load(path: Path) -> Oracle:
        return Oracle(**torch.load(path, mmap=True))


@torch.no_grad()
def solve(problem: Problem) -> Oracle:
    """Loss, token log-probs, dH and dW in float64; memory O(tile + VH)."""
    hidden = problem.hidden.flatten(0, 1).double()
    weight = problem.weight.double()
    labels = problem.labels.flatten().unsqueeze(-1)
    rows = max(1, CHUNK_BYTES // (8 * weight.shape[0]))
    chunks = [slice(start, start + rows) for start in range(0, hidden.shape[0], rows)]
    logps = torch.cat([(hidden[c] @ weight.t()).log_softmax(-1).gather(-1, labels[c]) for c in chunks])
    tokens = logps.view(problem.labels.shape)
    with torch.enable_grad():
        sums = tokens.sum(-1).requires_grad_(True)
        loss = pair_loss(sums, problem.setting.beta)
        (per_sequence,) = torch.autograd.grad(loss, sums)
    upstream = per_sequence.repeat_interleave(problem.setting.tokens).unsqueeze(-1)
    dh = torch.empty_like(hidden)
    dw = None if problem.setting.frozen else torch.zeros_like(weight)
    for c in chunks:
        dlogits = (hidden[c] @ weight.t()).softmax(-1).mul_(-upstream[c])
        dlogits.scatter_add_(-1, labels[c], upstream[c])
        dh[c] = dlogits @ weight
        if dw is not None:
            dw.addmm_(dlogits.t(), hidden[c])
    return Oracle(loss.item(), tokens, dh.view(problem.hidden.shape), dw)


def errors(problem: Problem, step: Step, oracle: Oracle) -> dict[str, float | None]:
    """Worst token (nats), worst sequence sum (nats), and relative Frobenius errors of dH and dW."""
    found: dict[str, float | None] = dict.fromkeys(("token", "sequence", "dh", "dw", "loss"))
    problem.clear()
    loss = step.run()
    if loss is None:
        return found
    found["loss"] = abs(float(loss) - oracle.loss)
    found["dh"] = relative(problem.hidden.grad, oracle.dh)
    found["dw"] = None if oracle.dw is None else relative(problem.weight.grad, oracle.dw)
    problem.clear()
    if step.tokens is not None:
        found["token"] = worst(step.tokens(), oracle.tokens)
    if step.sequences is not None:
        found["sequence"] = worst(step.sequences(), oracle.tokens.sum(-1))
    return found


def worst(ours: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; NaN anywhere gives NaN."""
    return (ours.double() - truth).abs().max().item()


def relative(ours: Tensor | None, truth: Tensor) -> float:
    """||ours - truth|| / ||truth||, without a float64 copy of the whole tensor."""
    if ours is None:
        return float("nan")
    pieces = list(zip(ours.flatten(0, -2).split(1024), truth.flatten(0, -2).split(1024), strict=True))
    squared = sum((a.double() - b).square().sum().item() for a, b in pieces)
    norm = sum(b.square().sum().item() for _, b in pieces)
    return (squared / norm) ** 0.5 if norm else float(squared > 0)
