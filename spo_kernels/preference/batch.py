"""A batch of preference pairs, which every way to compute its loss shares; `resolve.py` makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from spo_kernels.engine.autograd import OUTPUTS, LogprobCall
from spo_kernels.engine.inputs import Execution, ModelInputs
from spo_kernels.engine.label_layout import LabelLayout
from spo_kernels.engine.subsets import PairTokens
from spo_kernels.engine.tokens import Tokens
from spo_kernels.engine.vocab_shard import VocabShard
from spo_kernels.losses.pairs import Objective, PairInputs, PairLogps, by_side, pair_losses, token_outputs_of
from spo_kernels.losses.state import same_pairs


@dataclass(frozen=True)
class Pilots:
    """Random tokens of each response, and the reference's log-probabilities summed over them; see `SGDPO`."""

    subsets: Tensor  # labels' shape, 0 or 1
    reference: Tensor  # [2B]

    @classmethod
    def draw(
        cls, shares: tuple[float, float], tokens: PairTokens, layout: LabelLayout, model: ModelInputs, logp: Tensor
    ) -> Pilots:
        """These shares of the chosen and rejected tokens, of which the reference's `logp` (labels' shape) are known."""
        subsets = tokens.pilot_subsets(*shares)
        if model.shard is not None:
            subsets = model.shard.of_first(subsets)
        return cls(subsets, layout.sum(logp, subsets).to(model.wide))


@dataclass(frozen=True)
class PairBatch:
    """B pairs, ready to be computed; sequences are chosen first, `[2B]`."""

    objective: Objective
    layout: LabelLayout
    policy: ModelInputs
    tokens: Tokens  # that take part in the policy's products
    lengths: Tensor  # [2B] how many of them each sequence has here
    host_lengths: list[int] | None  # the same, where the host knows them; see `HostCounts`
    token_weights: Tensor | None  # labels' shape
    inputs: PairInputs  # what the objective sees beside the policy's log-probabilities
    kl: Tensor | None  # labels' shape, for an objective that asks for it
    pilots: Pilots | None  # for an objective that asks for them
    execution: Execution
    token_metrics: bool
    reduced: bool  # to one loss; else they are returned one by one
    scale: float  # by which the sum of the losses is multiplied

    @property
    def pairs(self) -> int:
        """B."""
        return self.layout.sequences // 2

    @property
    def token_outputs(self) -> tuple[str, ...]:
        """Sums over tokens that the objective asks for, without those that are known already."""
        return tuple(name for name in token_outputs_of(self.objective) if name != "kl")

    @property
    def moments(self) -> bool:
        """Whether entropy or log Σ p² are wanted of any token."""
        return self.token_metrics or any(name in OUTPUTS for name in self.token_outputs)

    def sums_of_tokens(
        self, value_of: Callable[[str], Tensor], sum_of: Callable[..., Tensor], pilots: Pilots | None
    ) -> dict[str, Tensor]:
        """What the objective asks for of every token, `value_of` its name, summed over sequences: per-pair inputs."""
        found = {name: sum_of(value_of(name)) for name in self.token_outputs}
        if pilots is not None:
            found["pilot"] = sum_of(value_of("logp"), pilots.subsets) - pilots.reference
        return by_side(found)

    def losses(self, pairs: PairLogps) -> Tensor:
        """The objective's, `[B]`; what it does across processes counts those once that have the same pairs."""
        shard = self.policy.shard
        same = shard.group if isinstance(shard, VocabShard) else None
        groups = [group for group in (same, self.layout.group) if group is not None]
        if not groups:  # torch.compile does not trace the context
            return pair_losses(self.objective, pairs)
        with same_pairs(*groups):
            return pair_losses(self.objective, pairs)

    def call(self) -> LogprobCall:
        """The policy's log-probabilities, and the outputs that objective and metrics want."""
        wanted = [name for name in self.token_outputs if name in OUTPUTS]
        outputs = (*wanted, *(("correct", "entropy", "mean_logit") if self.token_metrics else ()))
        return LogprobCall.of(self.policy, self.tokens, self.layout.shift, self.execution, outputs)
