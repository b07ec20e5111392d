"""What an objective sees of a batch of preference pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from spo_kernels.arguments import check_choice

# What a pair's loss depends on, from the narrowest: only the difference of its two log-probabilities; a sum of one
# term per response; both log-probabilities of the pair; other pairs of the batch.
Coupling = Literal["margin", "sequence", "pair", "batch"]

# what an objective may ask for of every token
TOKEN_OUTPUTS = ("logp", "entropy", "log_sum_p2", "kl")

# the per-pair inputs that are drawn in the step for an objective with `token_subsets`
PILOTS = ("chosen_pilot", "rejected_pilot")


@dataclass(frozen=True)
class PairLogps:
    """Sequence quantities of B pairs; every tensor is `[B]`.

    Attributes:
        chosen, rejected: log πθ(y|x) in nats, summed over response tokens; differentiable.
        ref_chosen, ref_rejected: The same under the reference, detached; None without a reference.
        chosen_lengths, rejected_lengths: Response tokens that count, int64.
        inputs: Further numbers of each pair by name, detached `[B]`, such as ODPO's "offset".
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None
    ref_rejected: Tensor | None
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def reference(self, needed_by: str) -> tuple[Tensor, Tensor]:
        """Reference log-probabilities of chosen and rejected.

        Raises:
            ValueError: The batch has no reference; the message names `needed_by`.
        """
        if self.ref_chosen is None or self.ref_rejected is None:
            raise ValueError(
                f"{needed_by} needs a reference: pass ref_logps, or ref_hidden with ref_head; "
                "or use an objective that needs none"
            )
        return self.ref_chosen, self.ref_rejected

    def input(self, name: str, needed_by: str) -> Tensor:
        """The per-pair input of that name, `[B]`.

        Raises:
            ValueError: It was not given; the message names `needed_by`.
        """
        if name not in self.inputs:
            raise ValueError(f"{needed_by} needs pair_inputs[{name!r}], a tensor of one value per pair")
        return self.inputs[name]


@dataclass(frozen=True)
class PairInputs:
    """What is known of B pairs before the policy's log-probabilities: everything in `PairLogps` but those.

    `reference` and `lengths` are `[2B]`, chosen first; `named` is `PairLogps.inputs`.
    """

    reference: Tensor | None
    lengths: Tensor
    named: Mapping[str, Tensor] = field(default_factory=dict)

    def pairs(self, sums: Tensor, start: int = 0, stop: int | None = None) -> PairLogps:
        """Pairs start..stop, whose log-probabilities `sums` are chosen first."""
        chosen, rejected = sums.chunk(2)
        reference = None if self.reference is None else _chunk(self.reference)
        lengths, named = _chunk(self.lengths), self.named
        if (start, stop) not in ((0, None), (0, len(lengths[0]))):
            part = slice(start, stop)
            reference = None if reference is None else (reference[0][part], reference[1][part])
            lengths = (lengths[0][part], lengths[1][part])
            named = {name: values[part] for name, values in named.items()}
        ref_chosen, ref_rejected = (None, None) if reference is None else reference
        return PairLogps(chosen, rejected, ref_chosen, ref_rejected, *lengths, named)


def _chunk(both: Tensor) -> tuple[Tensor, Tensor]:
    chosen, rejected = both.view(2, -1).unbind()
    return chosen, rejected


class Objective(Protocol):
    """Any callable from `PairLogps` to one loss per pair.

    An objective may also have `coupling`, which declares what a pair's loss depends on ("batch" if absent) and lets a
    trained head cost three products instead of four. What is logged as rewards of chosen and rejected is what its
    method `rewards(pairs)` gives, or else log-ratios multiplied by its `beta` (1 if absent).

    With `token_outputs`, names from "logp", "entropy", "log_sum_p2" (see `linear_logprob`) and "kl" (see `linear_kl`),
    it finds their unweighted sums over each response's tokens among the per-pair inputs: "chosen_logp",
    "rejected_logp" and so on. All but "kl" are detached. A trained head then costs three products where pairs fit the
    workspace with their logits, and with "kl" always four.
    """

    def __call__(self, pairs: PairLogps) -> Tensor:
        """Losses `[B]`, before reduction over pairs."""
        ...


def pair_losses(objective: Objective, pairs: PairLogps) -> Tensor:
    """`objective(pairs)`, checked to be one loss per pair that depends on the log-probabilities.

    Raises:
        ValueError: It is something else; or the objective reads a reference, and there is none.
    """
    losses = objective(pairs) if torch.compiler.is_compiling() else _called(objective, pairs)
    if not isinstance(losses, Tensor) or losses.shape != pairs.chosen.shape:
        came = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"the objective must return one loss per pair, shape {list(pairs.chosen.shape)}; got {came}")
    if torch.is_grad_enabled() and pairs.chosen.requires_grad and not losses.requires_grad:
        raise ValueError("the objective gave losses that do not depend on pairs.chosen and pairs.rejected: detached?")
    return losses


def _called(objective: Objective, pairs: PairLogps) -> Tensor:
    try:
        return objective(pairs)
    except TypeError as error:
        if pairs.ref_chosen is not None:
            raise
        raise ValueError(
            f"the objective failed where there is no reference ({error}): if it reads one, pass ref_logps, or "
            "ref_hidden with ref_head"
        ) from error


def implicit_rewards(objective: Objective, pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """Rewards `[B]` of chosen and rejected as TRL logs them, without gradient: `beta * (log πθ - log πref)`,
    `beta * log πθ` without a reference, or what the objective's own `rewards` gives.
    """
    if hasattr(objective, "rewards"):
        chosen, rejected = objective.rewards(pairs)
        return chosen.detach(), rejected.detach()
    beta = getattr(objective, "beta", 1.0)
    chosen, rejected = pairs.chosen, pairs.rejected
    if pairs.ref_chosen is not None and pairs.ref_rejected is not None:
        chosen, rejected = chosen - pairs.ref_chosen, rejected - pairs.ref_rejected
    return beta * chosen.detach(), beta * rejected.detach()


def coupling_of(objective: Objective) -> Coupling:
    """What the objective declares; nothing declared counts as "batch"."""
    return getattr(objective, "coupling", "batch")


def token_outputs_of(objective: Objective) -> tuple[str, ...]:
    """What the objective declares to need of every token; see `Objective`.

    Raises:
        ValueError: It declares something else.
    """
    names: tuple[str, ...] = getattr(objective, "token_outputs", ())
    for name in names:
        check_choice("a name in the objective's token_outputs", name, TOKEN_OUTPUTS)
    return names


def token_subsets_of(objective: Objective) -> tuple[float, float] | None:
    """What shares of the responses' tokens the objective wants drawn for pilots, see `SGDPO`; None for most."""
    return getattr(objective, "token_subsets", None)


def by_side(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sequence sums `[2B]`, chosen first, as per-pair inputs: "logp" becomes "chosen_logp" and "rejected_logp"."""
    sides = ("chosen", "rejected")
    return {
        f"{side}_{name}": half for name, both in sums.items() for side, half in zip(sides, both.chunk(2), strict=True)
    }
