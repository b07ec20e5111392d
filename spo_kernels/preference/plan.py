"""Which way a pair loss with a trained head is computed, and what each way costs in products.

packed (3): whole pairs whose `[tokens, V]` logits fit the workspace together keep them until their coefficients are
known. Any objective that is separable by pair.

factorised (3): the unscaled gradients of a pair are accumulated from tiles of whole-vocabulary rows, and scaled once
when its coefficients are known. A loss that sees a pair only through `m = log π(y_w) - log π(y_l)` has
`dW = Σ_pairs c_pair (G_chosen - G_rejected)`, one unscaled gradient; other pairs have two.
Not for an objective that asks for more than log-probabilities of a pair's tokens (`token_outputs`).

two_pass (4): logits for the log-probabilities, and again for the gradients. Anything; also a sparse backward, whose
products are fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spo_kernels.backends.registry import load_backend
from spo_kernels.engine.logit_sums import LogitSums
from spo_kernels.engine.workspace import KeptSpace
from spo_kernels.losses.pairs import Coupling, coupling_of, token_outputs_of
from spo_kernels.preference.batch import PairBatch

PATHS = ("packed", "factorised", "two_pass")

# With fewer rows in a tile, going through the weight and its gradient again for every tile costs more than the
# product that is saved. Measured on a CPU, V = 32768, H = 1024: 450 rows lose 9 %, 1024 rows win 18 %.
MIN_ROWS = 768


@dataclass(frozen=True)
class PairProblem:
    """What the choice depends on."""

    coupling: Coupling
    whole_pairs: bool  # the objective looks at all tokens of a pair before any of their gradients is known
    pair_tokens: tuple[int, ...]  # tokens that count in each pair
    space: KeptSpace

    @property
    def tokens(self) -> int:
        """All tokens that count."""
        return sum(self.pair_tokens)

    def groups(self, rows: int) -> list[range] | None:
        """Consecutive pairs of at most `rows` tokens together; None where one pair alone has more."""
        groups, start, tokens = [], 0, 0
        for pair, count in enumerate(self.pair_tokens):
            if count > rows:
                return None
            if tokens + count > rows:
                groups.append(range(start, pair))
                start, tokens = pair, 0
            tokens += count
        return [*groups, range(start, len(self.pair_tokens))]

    @property
    def unscaled_gradients(self) -> int:
        """How many unscaled gradients a pair has on the factorised path."""
        return 1 if self.coupling == "margin" else 2


@dataclass(frozen=True)
class PathPlan:
    """The path taken, its cost and its shape."""

    path: str
    products: int  # in GEMM-equivalents: [tokens, H] x [H, V] each
    groups: tuple[range, ...] = ()  # packed: pairs that are handled together
    rows: int = 0  # factorised: tokens in a tile
    columns: int = 0  # columns of the weight in work together
    sum_apart: bool = False  # the head's gradient is summed in an accumulator of its own


TWO_PASS = PathPlan("two_pass", 4)


def plan_path(batch: PairBatch, forced: str | None) -> PathPlan:
    """The path of a batch. Three products need a trained head and one loss: losses one by one have many upstreams.

    Raises:
        ValueError: `forced` names a path that cannot be taken.
    """
    policy = batch.policy
    # an objective runs inside the forward there, where torch.compile cannot see it; and lengths must be known
    if not policy.trains_head or not batch.reduced or batch.host_lengths is None or batch.pairs == 0:
        return TWO_PASS
    names = token_outputs_of(batch.objective)
    reason = "its objective needs kl, which has a gradient of its own" if "kl" in names else None
    if policy.hidden.dtype == torch.float16:
        # a scaled loss is what brings them into it, and it comes after the forward
        reason = "unscaled gradients may lie below float16's range"
    if policy.adds_to_grad:
        reason = "a head with accumulate=True adds to weight.grad in the backward"
    if batch.execution.sparsity.mode != "exact":
        reason = "a sparse backward takes two passes"
    if reason is not None and forced in ("packed", "factorised"):
        raise ValueError(f"path = {forced!r} cannot be taken: {reason}")
    if reason is not None:
        return TWO_PASS
    backend = load_backend(batch.execution.backend)
    head = policy.slices()
    beside = LogitSums.temporaries(head, backend) if batch.token_metrics else None
    lengths = batch.host_lengths
    if batch.layout.group is not None:
        # where a process has fewer tokens than another, it still takes the same way in as many steps
        lengths = batch.layout.largest(batch.lengths).tolist()
    chosen, rejected = lengths[: batch.pairs], lengths[batch.pairs :]
    problem = PairProblem(
        coupling=coupling_of(batch.objective),
        whole_pairs=bool(names) or batch.pilots is not None,
        pair_tokens=tuple(w + l for w, l in zip(chosen, rejected, strict=True)),  # noqa: E741
        space=KeptSpace.of(policy.hidden, head, backend, batch.execution.workspace_bytes, beside),
    )
    return choose_path(problem, forced)


def _packed(problem: PairProblem, min_rows: int) -> PathPlan | None:
    groups = problem.groups(problem.space.rows(0))
    apart = not problem.space.direct and (groups is None or len(groups) > 1)
    if apart:
        groups = problem.groups(problem.space.rows(1))
    if problem.coupling == "batch" or groups is None:
        return None
    if len(groups) > 1 and problem.tokens < min_rows * len(groups):
        return None
    return PathPlan("packed", 3, groups=tuple(groups), columns=problem.space.columns, sum_apart=apart)


def _factorised(problem: PairProblem, min_rows: int) -> PathPlan | None:
    if problem.coupling == "batch" or problem.whole_pairs:
        return None
    # a single pair's first unscaled gradient is summed where the sum will stay
    in_place = len(problem.pair_tokens) == 1
    apart = not problem.space.direct
    rows = problem.space.rows(problem.unscaled_gradients - in_place + apart)
    if rows < min(min_rows, problem.tokens):
        return None
    return PathPlan("factorised", 3, rows=rows, columns=problem.space.columns, sum_apart=apart)


def choose_path(problem: PairProblem, forced: str | None = None) -> PathPlan:
    """The cheapest path that the workspace allows: fewest products, then fewest bytes.

    Raises:
        ValueError: `forced` names a path that cannot be taken.
    """
    if forced == "two_pass":
        return TWO_PASS
    min_rows = 1 if forced else MIN_ROWS
    packed, factorised = _packed(problem, min_rows), _factorised(problem, min_rows)
    if forced is not None:
        plan = packed if forced == "packed" else factorised
        if plan is None:
            why = "the workspace is too small"
            if problem.coupling == "batch":
                why = "its objective couples pairs of the batch"
            elif problem.whole_pairs and forced == "factorised":
                why = "its objective needs all tokens of a pair at once"
            raise ValueError(f"path = {forced!r} cannot be taken: {why} (workspace_bytes = {problem.space.budget})")
        return plan
    return packed or factorised or TWO_PASS
