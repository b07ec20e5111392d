"""Which way a pair loss with a trained head is computed, and what each way costs in products.

packed (3): whole pairs whose `[tokens, V]` logits fit the workspace together keep them until their coefficients are
known. Any objective that is separable by pair.

factorised (3): the unscaled gradients of a pair are accumulated from tiles of whole-vocabulary rows, and scaled once
when its coefficients are known. A loss that sees a pair only through `m = log π(y_w) - log π(y_l)` has
`dW = Σ_pairs c_pair (G_chosen - G_rejected)`, one unscaled gradient; other pairs have two.
Not for an objective that asks for more than log-probabilities of a pair's tokens (`token_outputs`).

two_pass (4): logits for the log-probabilities, and again for the gradients. Anything.
"""

from dataclasses import dataclass

from spo_kernels.losses.pairs import Coupling

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
    direct: bool  # the weight's gradient has the accumulator's dtype, so sums can be kept in it
    vocab: int
    row_bytes: int  # workspace of a token: its tile over the whole vocabulary, its hidden state and gradient
    columns: int  # of the vocabulary, that are in work together
    column_bytes: int  # workspace of such a column: its weight row cast, its gradient before the cast
    cell_bytes: int  # workspace of such a column and one token, beside what is kept of it
    accumulator_bytes: int  # of one [V, H] accumulator
    workspace_bytes: int

    def rows(self, accumulators: int) -> int:
        """Tokens whose whole-vocabulary logits fit the workspace beside that many `[V, H]` accumulators."""
        left = self.workspace_bytes - self.columns * self.column_bytes - accumulators * self.accumulator_bytes
        return max(0, left) // (self.row_bytes + self.columns * self.cell_bytes)

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
    sum_apart: bool = False  # the weight's gradient is summed in an accumulator of its own


def _packed(problem: PairProblem, min_rows: int) -> PathPlan | None:
    groups = problem.groups(problem.rows(0))
    apart = not problem.direct and (groups is None or len(groups) > 1)
    if apart:
        groups = problem.groups(problem.rows(1))
    if problem.coupling == "batch" or groups is None:
        return None
    if len(groups) > 1 and problem.tokens < min_rows * len(groups):
        return None
    return PathPlan("packed", 3, groups=tuple(groups), columns=problem.columns, sum_apart=apart)


def _factorised(problem: PairProblem, min_rows: int) -> PathPlan | None:
    if problem.coupling == "batch" or problem.whole_pairs:
        return None
    # a single pair's first unscaled gradient is summed where the sum will stay
    in_place = len(problem.pair_tokens) == 1
    apart = not problem.direct
    rows = problem.rows(problem.unscaled_gradients - in_place + apart)
    if rows < min(min_rows, problem.tokens):
        return None
    return PathPlan("factorised", 3, rows=rows, columns=problem.columns, sum_apart=apart)


def choose_path(problem: PairProblem, forced: str | None = None) -> PathPlan:
    """The cheapest path that the workspace allows: fewest products, then fewest bytes.

    Raises:
        ValueError: `forced` names a path that cannot be taken.
    """
    two_pass = PathPlan("two_pass", 4)
    if forced == "two_pass":
        return two_pass
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
            raise ValueError(f"path = {forced!r} cannot be taken: {why} (workspace_bytes = {problem.workspace_bytes})")
        return plan
    return packed or factorised or two_pass
