"""Which way a pair loss with a trained head is computed, and what each way costs in products.

packed (3): whole pairs whose `[tokens, V]` logits fit the workspace together keep them until their coefficients are
known. Any objective that is separable by pair.

factorised (3): the unscaled gradients of a pair are accumulated from tiles of whole-vocabulary rows, and scaled once
when its coefficients are known. A loss that sees a pair only through `m = log π(y_w) - log π(y_l)` has
`dW = Σ_pairs c_pair (G_chosen - G_rejected)`, one unscaled gradient; other pairs have two.
Not for an objective that asks for more than log-probabilities of a pair's tokens (`token_outputs`).

A head that adds to the gradient that exists (`accumulate`) does so in the backward, out of the tile: it takes three
products where the tiles of all tokens fit together, else two passes.

two_pass (4): logits for the log-probabilities, and again for the gradients. Anything; also a sparse backward, whose
products are fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

from spo_kernels.backends.registry import load_backend
from spo_kernels.engine.early import why_not_early
from spo_kernels.engine.inputs import ModelInputs
from spo_kernels.engine.kept_space import KeptShape, KeptSpace, plan_groups
from spo_kernels.engine.logit_sums import LogitSums
from spo_kernels.losses.pairs import Coupling, Objective, coupling_of, token_outputs_of
from spo_kernels.preference.batch import PairBatch

PATHS = ("packed", "factorised", "two_pass")


@dataclass(frozen=True)
class PairProblem:
    """What the choice depends on."""

    coupling: Coupling
    whole_pairs: bool  # the objective looks at all tokens of a pair before any of their gradients is known
    pair_tokens: tuple[int, ...]  # tokens that count in each pair
    longest: int  # tokens of the longest response
    space: KeptSpace

    @property
    def tokens(self) -> int:
        """All tokens that count."""
        return sum(self.pair_tokens)

    def groups(self, rows: int) -> list[range]:
        """Consecutive pairs of at most `rows` tokens together, which no pair alone has more of."""
        groups, start, tokens = [], 0, 0
        for pair, count in enumerate(self.pair_tokens):
            if tokens + count > rows:
                groups.append(range(start, pair))
                start, tokens = pair, 0
            tokens += count
        return [*groups, range(start, len(self.pair_tokens))]

    @property
    def accumulators(self) -> int:
        """How many of the head's gradient the factorised path has."""
        unscaled = 1 if self.coupling == "margin" else 2
        # a single pair's first unscaled gradient is summed where the sum will stay
        return unscaled - (len(self.pair_tokens) == 1) + (not self.space.direct)


@dataclass(frozen=True)
class PathPlan:
    """The path taken, its cost and its shape."""

    path: str
    products: int  # in GEMM-equivalents: [tokens, H] x [H, V] each
    groups: tuple[range, ...] = ()  # packed: pairs that are handled together
    shape: KeptShape | None = None  # of three products


TWO_PASS = PathPlan("two_pass", 4)


def plan_path(batch: PairBatch, forced: str | None) -> PathPlan:
    """The path of a batch. Three products need a trained head and one loss: losses one by one have many upstreams.

    Raises:
        ValueError: `forced` names a path that cannot be taken.
    """
    policy, execution = batch.policy, batch.execution
    # an objective runs inside the forward there, where torch.compile cannot see it; and lengths must be known
    if not policy.trains_head or not batch.reduced or batch.host_lengths is None:
        return TWO_PASS
    reason = why_two_passes(policy, batch.objective)
    if execution.sparsity.mode != "exact":
        reason = "a sparse backward takes two passes"
    if reason is not None and forced in ("packed", "factorised"):
        raise ValueError(f"path = {forced!r} cannot be taken: {reason}")
    if reason is not None or batch.pairs == 0:
        return TWO_PASS
    backend, head = load_backend(execution.backend), policy.slices()
    beside = LogitSums.temporaries(head, backend) if batch.token_metrics else None
    space = KeptSpace.of(
        policy.hidden,
        head,
        backend,
        execution.workspace_bytes,
        adds_to_grad=policy.adds_to_grad,
        temporaries=beside,
    )
    lengths = batch.host_lengths
    if batch.layout.group is not None:
        # where a process has fewer tokens than another, it still takes the same way in as many steps
        lengths = batch.layout.largest(batch.lengths).tolist()
    problem = pair_problem(batch.objective, lengths, space, whole_pairs=batch.pilots is not None)
    return choose_path(problem, forced)


def why_two_passes(policy: ModelInputs, objective: Objective) -> str | None:
    """Why gradients cannot be made early, or None where they can."""
    reason = why_not_early(policy)
    if "kl" in token_outputs_of(objective):
        reason = "its objective needs kl, which has a gradient of its own"
    return reason


def pair_problem(objective: Objective, lengths: list[int], space: KeptSpace, *, whole_pairs: bool) -> PairProblem:
    """Of responses with so many tokens that count, chosen first; `whole_pairs` beside what the objective asks for."""
    chosen, rejected = lengths[: len(lengths) // 2], lengths[len(lengths) // 2 :]
    return PairProblem(
        coupling=coupling_of(objective),
        whole_pairs=whole_pairs or bool(token_outputs_of(objective)),
        pair_tokens=tuple(w + l for w, l in zip(chosen, rejected, strict=True)),  # noqa: E741
        longest=max(lengths),
        space=space,
    )


def _packed(problem: PairProblem, least_rows: int) -> PathPlan | None:
    if problem.coupling == "batch":
        return None
    tokens, largest = problem.tokens, max(problem.pair_tokens)
    found = plan_groups(problem.space, tokens, largest, problem.groups, least_rows)
    return None if found is None else PathPlan("packed", 3, tuple(found[0]), found[1])


def _factorised(problem: PairProblem, least_rows: int) -> PathPlan | None:
    if problem.coupling == "batch" or problem.whole_pairs or problem.space.together:
        return None
    space, accumulators = problem.space, problem.accumulators
    rows = min(space.wanted_rows, max(problem.longest, 1), space.rows(accumulators))
    if rows < max(min(least_rows, problem.tokens), 1):
        return None
    shape = space.shape(rows, accumulators, sum_apart=not space.direct)
    return None if shape is None else PathPlan("factorised", 3, shape=shape)


def choose_path(problem: PairProblem, forced: str | None = None) -> PathPlan:
    """The cheapest path that the workspace allows: fewest products, then tiles of the wanted size, then fewest bytes.

    Raises:
        ValueError: `forced` names a path that cannot be taken.
    """
    if forced == "two_pass":
        return TWO_PASS
    least_rows = 1 if forced else problem.space.least_rows
    packed, factorised = _packed(problem, least_rows), _factorised(problem, least_rows)
    if forced is not None:
        plan = packed if forced == "packed" else factorised
        if plan is None:
            why = "the workspace is too small"
            if problem.coupling == "batch":
                why = "its objective couples pairs of the batch"
            elif problem.whole_pairs and forced == "factorised":
                why = "its objective needs all tokens of a pair at once"
            elif problem.space.together and forced == "factorised":
                why = "a head with accumulate=True adds to weight.grad in the backward"
            elif problem.space.together:
                why = f"{why} for all tokens, as long as a head with accumulate=True has a weight.grad to add to"
            raise ValueError(f"path = {forced!r} cannot be taken: {why} (workspace_bytes = {problem.space.allowed})")
        return plan
    wanted = min(problem.space.wanted_rows, problem.tokens)
    ways = [(plan.shape.rows < wanted, plan.shape.bytes, plan) for plan in (packed, factorised) if plan and plan.shape]
    return min(ways, key=lambda way: way[:2])[2] if ways else TWO_PASS
