"""Which records make up an optimizer step, and which of these share a forward: a budget of tokens decides."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import index

import numpy as np

from spo_kernels.arguments import check_choice, check_whole

COUNTED = ("padded", "packed", "shared")
# tokens of a forward on a CPU at most, where nobody says: times and bytes with more are in docs/training-speed.md
CPU_TOKENS = 1024
# tokens of the prompt, then of each response
Lengths = Sequence[int]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def step_indices(step: int, n: int, per_step: int, seed: int) -> list[int]:
    """Records of a step: a slice of the endless stream of per-epoch permutations.

    A pure function of the step, so the data position of a resumed run is its step number; a step
    may span two epochs, so no batch is ever short.
    """
    positions = range(step * per_step, (step + 1) * per_step)
    return [int(_permutation(seed, p // n, n)[p % n]) for p in positions]


@dataclass(frozen=True)
class TokenBudget:
    """Forwards of as many records as a number of tokens holds.

    Attributes:
        tokens: What the backbone computes of a forward, at most.
        layout: How that is counted, see docs/packing.md: "shared", a record's prompt and its responses; "packed", the
            prompt for each response; "padded", all rows as long as the longest of the forward.

    Raises:
        ValueError: A value is out of range; names it.
    """

    tokens: int
    layout: str = "shared"

    def __post_init__(self) -> None:
        check_whole("tokens_per_batch", self.tokens, 1)
        check_choice("layout", self.layout, COUNTED)

    def cost(self, lengths: Lengths) -> int:
        """Tokens of a forward of this record alone."""
        prompt, *responses = lengths
        if self.layout == "padded":
            return len(responses) * (prompt + max(responses))
        return prompt * (1 if self.layout == "shared" else len(responses)) + sum(responses)

    def forwards(self, lengths: Sequence[Lengths]) -> list[list[int]]:
        """Numbers of the records of each forward: the longest that is left, and the longest that still fit beside it.

        Raises:
            ValueError: A record is longer than the budget.
        """
        costs = [self.cost(each) for each in lengths]
        # ascending; of equal ones the first is taken first
        left = sorted(range(len(costs)), key=lambda i: (costs[i], -i))
        if left and costs[left[-1]] > self.tokens:
            raise ValueError(
                f"a forward of {self.tokens} tokens does not hold the longest record, {costs[left[-1]]} tokens "
                f"({self.layout} layout)"
            )
        found: list[list[int]] = []
        while left:
            first = left.pop()
            found.append([first])
            room = self.tokens - costs[first]
            while left and room > 0:
                # beside the longest, padding makes all others as long
                every = len(left) if room >= costs[first] else 0
                fitting = every if self.layout == "padded" else bisect_right(left, room, key=costs.__getitem__)
                if not fitting:
                    break
                found[-1].append(left.pop(fitting - 1))
                room -= costs[first] if self.layout == "padded" else costs[found[-1][-1]]
        return found

    def share(self, lengths: Sequence[Lengths], rank: int = 0, world_size: int = 1) -> list[list[int]]:
        """A process's forwards. The records are dealt so that the tokens of all processes are about the same.

        Each process has one at least where there are as many records as processes.
        """
        costs = [self.cost(each) for each in lengths]
        loads = [(0, process) for process in range(world_size)]
        mine = []
        for record in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            load, process = loads[0]
            heapq.heapreplace(loads, (load + costs[record], process))
            if process == rank:
                mine.append(record)
        return [[mine[i] for i in forward] for forward in self.forwards([lengths[i] for i in mine])]


def cpu_budget(layout: str, lengths: Iterable[Lengths]) -> TokenBudget:
    """What a forward on a CPU holds where nobody says: CPU_TOKENS, or the longest record alone."""
    cost = TokenBudget(CPU_TOKENS, layout).cost
    return TokenBudget(max(CPU_TOKENS, *map(cost, lengths)), layout)


def _are_lengths(value: object) -> bool:
    """Whether they are a prompt's and at least one response's; NumPy's numbers, which are no ints, are taken too."""
    try:
        counts = [index(n) for n in value]  # type: ignore[attr-defined]
    except TypeError:
        return False
    return len(counts) >= 2 and min(counts) >= 0


class TokenBatchSampler:
    """Batches of pairs with a budget of tokens each, for a loop of one's own: `DataLoader(batch_sampler=...)`.

    An optimizer step has the same number of pairs each time, in as many batches as they need. The mean over them does
    not depend on who computes which batch: losses summed over pairs, divided by `pairs_per_step`, and times
    `world_size` where DDP averages the processes' gradients::

        sampler = TokenBatchSampler(lengths, tokens_per_batch=8192, pairs_per_step=64, steps=1000)
        loader = iter(DataLoader(records, batch_sampler=sampler, collate_fn=PairCollator(0)))
        for batches in sampler.by_step():
            for _ in batches:
                loss, metrics = policy(**next(loader))  # FusedPreferenceModel(..., reduction="sum")
                (loss * world_size / pairs_per_step).backward()
            optimizer.step()
            optimizer.zero_grad()

    Args:
        lengths: Of each record the tokens of its prompt and of its responses.
        tokens_per_batch, layout: See `TokenBudget`.
        pairs_per_step: Of all processes together, at least one for each.
        steps: Optimizer steps after which it ends.
        start: The step that it begins with: a resumed run goes on with the batches that it would have had.
        seed: Of the order; each epoch has its own.
        rank, world_size: This process among all.

    Raises:
        ValueError: A value is out of range, or a record longer than the budget; names it.
    """

    def __init__(
        self,
        lengths: Sequence[Lengths],
        tokens_per_batch: int,
        *,
        pairs_per_step: int,
        steps: int,
        start: int = 0,
        seed: int = 0,
        layout: str = "shared",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be at least 0 and below world_size {world_size}, got {rank}")
        if pairs_per_step < world_size:
            raise ValueError(f"pairs_per_step must be at least world_size {world_size}, got {pairs_per_step}")
        if not 0 <= start <= steps:
            raise ValueError(f"start must be at least 0 and at most steps {steps}, got {start}")
        if not len(lengths):
            raise ValueError("lengths must have one entry at least, got none")
        for i, each in enumerate(lengths):
            if not _are_lengths(each):
                raise ValueError(
                    f"lengths must have the tokens of the prompt and of each response for every record, such as "
                    f"(12, 40, 38); got lengths[{i}] = {each!r}"
                )
        self._budget = TokenBudget(tokens_per_batch, layout)
        self._budget.forwards([max(lengths, key=self._budget.cost)])
        self._lengths, self._per_step, self._seed = lengths, pairs_per_step, seed
        self._steps, self._process = range(start, steps), (rank, world_size)

    def batches(self, step: int) -> list[list[int]]:
        """This process's batches of a step, a pure function of its number."""
        indices = step_indices(step, len(self._lengths), self._per_step, self._seed)
        found = self._budget.share([self._lengths[i] for i in indices], *self._process)
        return [[indices[i] for i in batch] for batch in found]

    def by_step(self) -> Iterator[list[list[int]]]:
        """The batches of each step."""
        return map(self.batches, self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of all steps, one after the other."""
        return (batch for batches in self.by_step() for batch in batches)
