"""A run's parts of the data, with the reference's log-probs that belong to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from spo_kernels.data import Example
from spo_kernels.losses import Objective
from spo_kernels.losses.needs import needs_reference
from spo_kernels.losses.pairs import token_subsets_of
from spo_kernels.train.batches import collate
from spo_kernels.train.config import TrainConfig
from spo_kernels.train.mismatched import MismatchedExamples, MismatchedPairs
from spo_kernels.train.objective import mismatched_inputs
from spo_kernels.train.reference import Reference
from spo_kernels.train.token_logps import TokenLogps, TokenPlaces


@dataclass(frozen=True)
class Split:
    """Examples, the reference log-probs that belong to them where they are precomputed, sums [n, 2] or those of tokens,
    the sums that diagnostics compare with, and the mismatched pairs of a KTO that asks for them.
    """

    examples: Sequence[Example]
    ref_logps: Tensor | TokenLogps | None = None
    baseline: Tensor | None = None
    mismatched: MismatchedPairs | None = None

    def batch(self, indices: list[int], device: torch.device) -> dict[str, Any]:
        """Keyword arguments of Policy.forward."""
        chosen = [self.examples[i] for i in indices]
        input_ids, labels = collate(chosen, device)
        batch: dict[str, Any] = {"input_ids": input_ids, "labels": labels}
        if isinstance(self.ref_logps, TokenLogps):
            batch["ref_logps"] = self.ref_logps.batch(indices, labels)
        elif self.ref_logps is not None:
            batch["ref_logps"] = self.ref_logps[indices].T.reshape(-1).to(device)
        inputs = {
            name: torch.tensor([e.inputs[name] for e in chosen], dtype=torch.float32, device=device)
            for name in chosen[0].inputs
        }
        return batch | {"pair_inputs": inputs} if inputs else batch

    def by_length(self, indices: Iterable[int]) -> list[int]:
        return sorted(indices, key=lambda i: self.examples[i].longest)

    def units(self, indices: list[int], per_token: bool) -> int:
        """What losses are means over: response tokens for sft, pairs otherwise."""
        return sum(self.examples[i].response_tokens for i in indices) if per_token else len(indices)


def split_with(reference: Reference, objective: Objective, part: Sequence[Example], *, precomputed: bool) -> Split:
    """A part of the data with what the run reads of the reference; `precomputed`: also for the objective."""
    config = reference.config
    of_tokens = precomputed and token_subsets_of(objective) is not None
    logps: Tensor | TokenLogps | None = None
    sums, pairs = None, None
    if config.diagnostics or (precomputed and not of_tokens):
        sums = reference.logps(part, ld_alpha=config.ld_alpha)
    if of_tokens:
        logps = TokenLogps(TokenPlaces.of(part), reference.logps(part, of_tokens=True))
    elif precomputed:
        logps = sums
    if mismatched_inputs(config, objective):
        others = MismatchedExamples(part)
        pairs = MismatchedPairs(others, reference.logps(others).flatten() if precomputed else None)
    return Split(part, logps, sums if config.diagnostics else None, pairs)


def make_splits(
    config: TrainConfig,
    objective: Objective | None,
    model: nn.Module,
    content: str,
    examples: list[Sequence[Example]],
    accelerator: Accelerator,
    warn: Callable[[str], None],
) -> tuple[list[Split], nn.Module | str | None]:
    """Every part of the data, and where the policy asks for the reference, unless its log-probs are with the data.

    `model` is the one that is trained, `content` its `model_hash`.
    """
    needed = objective is not None and needs_reference(objective)
    if objective is None or not (needed or config.diagnostics):
        return [Split(part) for part in examples], None
    reference = Reference.of(config, accelerator, warn, model, content, examples)
    online = reference.online() if needed and config.reference == "online" else None
    precomputed = needed and online is None
    return [split_with(reference, objective, part, precomputed=precomputed) for part in examples], online
