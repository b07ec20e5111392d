"""A run's parts of the data, with the reference's log-probs that belong to them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from spo_kernels.data import Example
from spo_kernels.integrations.preference_model import ADAPTERS_OFF
from spo_kernels.losses import Objective
from spo_kernels.losses.needs import needs_reference
from spo_kernels.losses.pairs import token_subsets_of
from spo_kernels.train.batches import collate
from spo_kernels.train.config import TrainConfig
from spo_kernels.train.forwards import forwards_of
from spo_kernels.train.mismatched import MismatchedExamples, MismatchedPairs
from spo_kernels.train.model import check_fits, check_layout, load_model
from spo_kernels.train.objective import mismatched_inputs
from spo_kernels.train.output import CACHE_FOLDER
from spo_kernels.train.reference import model_hash, reference_logps
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


@dataclass(frozen=True)
class Reference:
    """The model that a run compares with: the one that it begins with, or --ref-model."""

    config: TrainConfig
    accelerator: Accelerator
    warn: Callable[[str], None]
    model: nn.Module
    content: str  # its `model_hash`

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        accelerator: Accelerator,
        warn: Callable[[str], None],
        start: nn.Module,
        start_content: str,
        examples: list[Sequence[Example]],
    ) -> Reference:
        """`start` is the model that is trained, with its hash; examples must fit --ref-model too."""
        if config.ref_model is None:
            return cls(config, accelerator, warn, start, start_content)
        model = load_model(config.ref_model, config, accelerator.device, trained=False)
        check_layout(model, config)
        check_fits(model, examples, config.ref_model)
        return cls(config, accelerator, warn, model, model_hash(model))

    def online(self) -> nn.Module | str:
        """What the policy asks in every step: the model apart, or the adapted one without its adapters."""
        if self.config.ref_model is not None:
            return self.model
        return ADAPTERS_OFF if self.config.lora_r else copy.deepcopy(self.model)

    def logps(self, examples: Sequence[Example], *, of_tokens: bool = False, ld_alpha: float | None = None) -> Tensor:
        """Computed now, or found in the cache; see `reference_logps`."""
        config = self.config
        folder = Path(config.cache_dir).expanduser() if config.cache_dir else Path(config.output_dir) / CACHE_FOLDER
        return reference_logps(
            self.model,
            examples,
            self.accelerator,
            folder,
            self.warn,
            self.content,
            forwards_of(config, [self.model], [examples]),
            config.quiet,
            ld_alpha,
            of_tokens,
            config.layout,
            workspace_bytes=config.workspace_bytes,
            backend=config.backend,
        )


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
