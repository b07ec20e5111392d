"""What a variant is: a name and a function that turns a problem into something to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Problem

TokenLogps = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, labels -> logp [2B, T]


class Skip(Exception):
    """Raised by `build` where a variant cannot run here; the text is the reason that the table prints."""


@dataclass(frozen=True)
class Step:
    """A variant bound to a problem.

    `run` does forward and backward and returns the loss, or None for a bare product. `tokens` and `sequences`
    are called outside any timing, for the error columns.
    """

    run: Callable[[], Tensor | None]
    tokens: Callable[[], Tensor] | None = None  # [2B, T]
    sequences: Callable[[], Tensor] | None = None  # [2B]


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    about: str
    build: Callable[[Problem], Step]


def pair_loss(sequence_logps: Tensor, beta: float) -> Tensor:
    """DPO with a reference of zero: mean of -logsigmoid(beta * (chosen - rejected)). sequence_logps: [2B]."""
    chosen, rejected = sequence_logps.chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def step_from_tokens(problem: Problem, token_logps: TokenLogps) -> Step:
    """The step of a variant that gives token log-probs. They are summed in fp32, whatever their own dtype is."""

    def tokens() -> Tensor:
        return token_logps(problem.hidden, problem.weight, problem.labels)

    def run() -> Tensor:
        loss = pair_loss(tokens().float().sum(-1), problem.setting.beta)
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def detached_tokens() -> Tensor:
        return tokens()

    @torch.no_grad()
    def sequences() -> Tensor:
        return tokens().float().sum(-1)

    return Step(run, detached_tokens, sequences)
