"""How the records of an optimizer step are put in forwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn

from spo_kernels.data import Example
from spo_kernels.integrations.layout import layout_of
from spo_kernels.integrations.token_batches import TokenBudget, cpu_budget
from spo_kernels.losses import Objective
from spo_kernels.losses.pairs import coupling_of
from spo_kernels.train.config import TrainConfig
from spo_kernels.train.errors import TrainError
from spo_kernels.train.experts import router_loss
from spo_kernels.train.processes import SHARDED


def micro_batches(indices: Sequence[int], rank: int, world_size: int, batch_size: int) -> list[list[int]]:
    """This process's share of a step, in forwards of `batch_size`."""
    mine = list(indices[rank::world_size])
    return [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]


@dataclass(frozen=True)
class Forwards:
    """Forwards of `batch_size` records, or of as many as a budget of tokens holds.

    Attributes:
        batch_size: Records of a forward.
        budget: In the place of `batch_size`: what a forward holds, whatever the number of its records.
        most: Beside `batch_size`: what does not hold that many records is computed in several forwards.
    """

    batch_size: int
    budget: TokenBudget | None = None
    most: TokenBudget | None = None

    def of(
        self, examples: Sequence[Example], indices: Sequence[int], rank: int = 0, world_size: int = 1
    ) -> list[list[int]]:
        """A process's share of some records."""
        if self.budget is None:
            batches = micro_batches(indices, rank, world_size, self.batch_size)
            return [part for batch in batches for part in self._parts(examples, batch)]
        share = self.budget.share([examples[i].lengths for i in indices], rank, world_size)
        return [[indices[i] for i in forward] for forward in share]

    def _parts(self, examples: Sequence[Example], indices: Sequence[int]) -> list[list[int]]:
        if self.most is None:
            return [list(indices)]
        found = self.most.forwards([examples[i].lengths for i in indices])
        return [[indices[i] for i in part] for part in found]


def forwards_of(
    config: TrainConfig,
    models: Sequence[nn.Module],
    examples: Iterable[Sequence[Example]],
    *,
    split: bool = False,
) -> Forwards:
    """How the models, policy or reference or both, are given records; `split`: see `may_split`.

    Raises:
        TrainError: A record is longer than the budget.
    """
    if config.tokens_per_batch is None and not split:
        return Forwards(config.batch_size)
    lengths = [example.lengths for part in examples for example in part]
    layouts = ["padded"] if config.stage == "sft" else [layout_of(model, config.layout) for model in models]
    layout = "padded" if "padded" in layouts else layouts[0]
    if config.tokens_per_batch is None:
        return Forwards(config.batch_size, most=cpu_budget(layout, lengths))
    budget = TokenBudget(config.tokens_per_batch, layout)
    longest = max(map(budget.cost, lengths))
    if longest > budget.tokens:
        raise TrainError(
            f"--tokens-per-batch {budget.tokens} does not hold the longest record, {longest} tokens ({budget.layout} "
            "layout); raise it, or lower --max-length"
        )
    return Forwards(config.batch_size, budget)


def may_split(config: TrainConfig, objective: Objective | None, model: nn.Module, accelerator: Accelerator) -> bool:
    """Whether forwards are on a CPU and may be cut in several that give the same gradient."""
    together = accelerator.distributed_type == SHARDED or config.spo_inner_steps > 0
    coupled = objective is not None and coupling_of(objective) == "batch"
    return accelerator.device.type == "cpu" and not (together or coupled or router_loss(model) is not None)
