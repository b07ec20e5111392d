"""What a call would take, from its shapes alone: the plan, by the functions that make it for a call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from spo_kernels.backends.contract import Backend
from spo_kernels.backends.cuda_backend import CudaBackend
from spo_kernels.backends.registry import choose_backend, load_backend
from spo_kernels.engine.inputs import ModelInputs
from spo_kernels.engine.kept_space import KeptSpace
from spo_kernels.engine.workspace import plan_tiles
from spo_kernels.losses.pairs import Objective, token_subsets_of
from spo_kernels.preference.plan import TWO_PASS, PathPlan, choose_path, pair_problem, why_two_passes


@dataclass(frozen=True)
class Head:
    """A trained head, the dtype of all that a call is given, and where it is computed."""

    vocab: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    memory: int | None = None  # bytes of a GPU that is not here

    def policy(self, tokens: int) -> ModelInputs:
        """With hidden states of so many tokens, which have no values."""
        with FakeTensorMode():
            hidden, weight = (
                torch.empty(rows, self.hidden_size, dtype=self.dtype, device=self.device)
                for rows in (tokens, self.vocab)
            )
        return ModelInputs(hidden, weight, None, 1.0, None)

    def backend(self) -> Backend:
        """What would compute it; all that GPUs have take the same bytes."""
        if self.memory is not None:
            return CudaBackend(None)
        return load_backend(choose_backend(None, self.device, self.dtype))


@dataclass(frozen=True)
class Forecast:
    """A plan in bytes."""

    plan: PathPlan
    why: str | None  # gradients cannot be made early
    allowed: int  # for three products of this loss
    workspace: int  # what is taken of it; in two passes at most, with what the backward is left
    given: int  # inputs and gradients


def forecast(
    objective: Objective,
    lengths: list[int],
    head: Head,
    workspace_bytes: int | None = None,
    *,
    adds_to_grad: bool = False,
) -> Forecast:
    """The plan of one call; `lengths` are of the responses' tokens that count, chosen first.

    `adds_to_grad`: the head has `accumulate=True` and a `weight.grad`.

    Raises:
        ValueError: `workspace_bytes` is too small.
    """
    tokens, backend = sum(lengths), head.backend()
    policy = head.policy(tokens)
    hidden, weight = policy.hidden, policy.weight
    space = KeptSpace.of(
        hidden, policy.slices(), backend, workspace_bytes, adds_to_grad=adds_to_grad, memory=head.memory
    )
    problem = pair_problem(objective, lengths, space, whole_pairs=token_subsets_of(objective) is not None)
    why = why_two_passes(policy, objective)
    plan = choose_path(problem) if why is None else TWO_PASS
    if plan.shape is not None:
        taken = plan.shape.bytes
    else:
        passes = (
            plan_tiles(tokens, hidden, policy.slices(), backend, workspace_bytes, exponentials=forward)
            for forward in (True, False)
        )
        taken = hidden.nbytes + max(shape.bytes for shape in passes)
    return Forecast(plan, why, space.budget(problem.accumulators), taken, 2 * (hidden.nbytes + weight.nbytes))
