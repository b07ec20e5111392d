"""From options to the preference objective, and what it needs."""

from __future__ import annotations

import json
from typing import Any

import torch

from spo_kernels.losses import Objective, PairLogps, build_loss
from spo_kernels.train.config import TrainConfig
from spo_kernels.train.errors import TrainError

_SPO_OPTIONS = ("spo_weight", "spo_penalty", "spo_value", "spo_epsilon", "spo_normalization")


def build_objective(config: TrainConfig) -> Objective | None:
    """The objective of a preference run, or None for sft; a TrainError lists the valid names."""
    if config.stage == "sft":
        return None
    given = {name.removeprefix("spo_"): getattr(config, name) for name in _SPO_OPTIONS}
    fields = {"base": config.base_loss, **given}
    fields = {name: value for name, value in fields.items() if value is not None}
    if config.spo_inner_steps:
        if config.loss != "spo":
            raise TrainError(f"--spo-inner-steps is for --loss spo, got --loss {config.loss}")
        if fields.setdefault("value", "input") != "input":
            raise TrainError(
                f"--spo-inner-steps computes the hinge's value; --spo-value {config.spo_value} names another"
            )
    if config.loss != "spo" and fields:
        raise TrainError(f"--loss {config.loss} takes no --base-loss or --spo- options, got {', '.join(fields)}")
    if config.beta is not None:
        fields["beta"] = config.beta
    for pair in config.loss_arg:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise TrainError(f"--loss-arg must be KEY=VALUE, got {pair!r}")
        fields[key] = _value(value)
    try:
        objective = build_loss(config.loss, **fields)
    except (ValueError, TypeError) as error:
        raise TrainError(f"--loss {config.loss}: {error}") from error
    if config.spo_inner_steps and not needs_value(objective):
        raise TrainError("--spo-inner-steps needs --spo-penalty hinge: the gradient of nll has no value in it")
    return objective


def needs_reference(objective: Objective) -> bool:
    """Whether the objective refuses to work without reference log-probs; asked of any callable by trying."""
    return not _works(objective, reference=False)


def needs_value(objective: Objective) -> bool:
    """Whether the objective wants spo_value for each pair, as spo's hinge with value="input" does."""
    return not _works(objective, value=False)


def _works(objective: Objective, reference: bool = True, value: bool = True) -> bool:
    one, length = torch.zeros(1), torch.ones(1, dtype=torch.int64)
    ref = one if reference else None
    pairs = PairLogps(
        chosen=one,
        rejected=one,
        ref_chosen=ref,
        ref_rejected=ref,
        chosen_lengths=length,
        rejected_lengths=length,
        sft_value=one if value else None,
    )
    try:
        objective(pairs)
    except (ValueError, TypeError):
        return False
    return True


def _value(text: str) -> Any:
    """A JSON number, boolean or null; anything else is a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
