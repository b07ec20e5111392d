"""From options to the preference objective, and what it needs."""

from __future__ import annotations

import json
from typing import Any

from spo_kernels.losses import Objective, build_loss
from spo_kernels.losses.needs import needs_inputs, needs_reference
from spo_kernels.losses.pairs import PILOTS, coupling_of, token_outputs_of, token_subsets_of
from spo_kernels.losses.reconstructed.spo import SPO_VALUE
from spo_kernels.train.config import TrainConfig
from spo_kernels.train.errors import TrainError
from spo_kernels.train.mismatched import MISMATCHED

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
        got = ", ".join("--base-loss" if name == "base" else f"--spo-{name}" for name in fields)
        raise TrainError(f"--loss {config.loss} takes no --base-loss or --spo- options, got {got}")
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
    if config.tokens_per_batch is not None and coupling_of(objective) == "batch":
        raise TrainError(
            f"--tokens-per-batch makes forwards of different numbers of pairs, and --loss {config.loss} depends on "
            "which pairs are in a forward together: leave one of them out"
        )
    if config.spo_inner_steps and SPO_VALUE not in needs_inputs(objective):
        raise TrainError("--spo-inner-steps needs --spo-penalty hinge: the gradient of nll has no value in it")
    if config.ref_model is not None and not config.diagnostics and not needs_reference(objective):
        raise TrainError(f"--loss {config.loss} has no reference: --ref-model would not be read; leave it out")
    if "kl" in token_outputs_of(objective) and config.reference != "online":
        raise TrainError(
            f"--loss {config.loss} compares whole distributions with the reference's, not log-probs of tokens, "
            "which is what is precomputed: it needs --reference online"
        )
    return objective


def input_columns(config: TrainConfig, objective: Objective | None) -> dict[str, str]:
    """For each per-pair input that the objective reads, the column of the data that holds it.

    A column of the input's own name unless --pair-input names another.
    """
    names: list[str] = []
    if objective is not None:
        found = set(mismatched_inputs(config, objective))
        found.update(PILOTS if token_subsets_of(objective) is not None else ())
        found.update([SPO_VALUE] if config.spo_inner_steps else ())
        names = [name for name in needs_inputs(objective) if name not in found]
    columns = {name: name for name in names}
    for pair in config.pair_input:
        name, equals, column = pair.partition("=")
        if not equals or not name or not column:
            raise TrainError(f"--pair-input must be NAME=COLUMN, got {pair!r}")
        if name not in columns:
            known = ", ".join(names) or "none"
            raise TrainError(f"--pair-input {pair}: the loss reads no input {name!r}; it reads: {known}")
        columns[name] = column
    return columns


def mismatched_inputs(config: TrainConfig, objective: Objective) -> tuple[str, ...]:
    """The objective's input that is made of mismatched pairs, unless --pair-input names a column with it."""
    given = any(pair.partition("=")[0] == MISMATCHED for pair in config.pair_input)
    return (MISMATCHED,) if MISMATCHED in needs_inputs(objective) and not given else ()


def _value(text: str) -> Any:
    """A JSON number, boolean or null; anything else is a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
