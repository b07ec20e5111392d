"""What people write first: the whole `[N, V]` logits, eager and through torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import Problem
from .variant import Step, Variant, step_from_tokens


def float_log_softmax(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """(hidden @ weight.T).float().log_softmax(-1) at the labels."""
    logits = hidden @ weight.t()
    return logits.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def build_naive(problem: Problem) -> Step:
    return step_from_tokens(problem, float_log_softmax)


def build_naive_compiled(problem: Problem) -> Step:
    return step_from_tokens(problem, torch.compile(float_log_softmax, fullgraph=True))


def build_naive_trl(problem: Problem) -> Step:
    from trl.trainer.utils import selective_log_softmax

    def token_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return selective_log_softmax(hidden @ weight.t(), labels)

    return step_from_tokens(problem, token_logps)


VARIANTS = [
    Variant("naive", "eager .float().log_softmax()", build_naive),
    Variant("naive-trl", "eager, TRL's selective_log_softmax", build_naive_trl),
    Variant("naive-compiled", "torch.compile of naive", build_naive_compiled),
]
