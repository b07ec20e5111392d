"""Which settings of a run can't be used, alone or beside others; said before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from datetime import date

from spo_kernels.train.config import TrainConfig, as_flags
from spo_kernels.train.errors import TrainError


def checked(config: TrainConfig) -> TrainConfig:
    """The same settings; a TrainError names the first that can't be used."""
    _check_numbers(config)
    _check_choices(config)
    _check_read(config)
    _check_together(config)
    _ = config.column_names
    if config.template_date is not None:
        try:
            date.fromisoformat(config.template_date)
        except ValueError as error:
            raise TrainError(f"--template-date must be YYYY-MM-DD, got {config.template_date!r}") from error
    return config


def _check_choices(config: TrainConfig) -> None:
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        if choices and value not in (*choices, f.default):
            raise TrainError(f"{as_flags([f.name])} must be one of {', '.join(choices)}, got {value!r}")


def _check_read(config: TrainConfig) -> None:
    """An option that the run would not read is refused, not passed over."""
    given = {
        of: [f.name for f in fields(config) if f.metadata["of"] == of and getattr(config, f.name) != f.default]
        for of in ("pairs", "adapters")
    }
    if given["pairs"] and config.stage == "sft":
        raise TrainError(
            f"--stage sft has no pairs, no preference loss and no reference: {as_flags(given['pairs'])} would not be "
            "read; leave it out, or train with --stage preference"
        )
    if given["adapters"] and not config.lora_r:
        raise TrainError(f"{as_flags(given['adapters'])}: of adapters; give their rank, --lora-r, or leave it out")


def _check_together(config: TrainConfig) -> None:
    if config.eval_dataset is not None and config.eval_fraction > 0:
        raise TrainError("--eval-dataset and --eval-fraction exclude each other: give one of them")
    if config.max_prompt_length is not None and config.max_prompt_length >= config.max_length:
        raise TrainError(
            f"--max-prompt-length {config.max_prompt_length} leaves no room for a response "
            f"within --max-length {config.max_length}"
        )
    if (config.spo_inner_steps > 0) != (config.spo_inner_lr is not None):
        raise TrainError("--spo-inner-steps and --spo-inner-lr go together: give both or neither")
    if config.tokens_per_batch is not None and config.spo_inner_steps:
        raise TrainError(
            "--tokens-per-batch makes forwards of different numbers of pairs, and --spo-inner-steps takes steps on "
            "the pairs of a forward: leave one of them out"
        )
    if config.sparsity_tolerance is not None and config.sparsity == "exact":
        raise TrainError("--sparsity-tolerance needs --sparsity certified or unbiased")


def _at_least(low: float) -> tuple[Callable[[float], bool], str]:
    return (lambda x: x >= low), f"at least {low:g}"


_ABOVE_ZERO: tuple[Callable[[float], bool], str] = ((lambda x: x > 0), "above 0")
_SHARE: tuple[Callable[[float], bool], str] = ((lambda x: 0 <= x < 1), "at least 0 and below 1")
_RANGES = {
    "lora_r": _at_least(0),
    "lora_alpha": _ABOVE_ZERO,
    "lora_dropout": _SHARE,
    "eval_fraction": _SHARE,
    "max_length": _at_least(2),
    "max_prompt_length": _at_least(1),
    "dataset_processes": _at_least(1),
    "max_steps": _at_least(0),
    "epochs": _ABOVE_ZERO,
    "batch_size": _at_least(1),
    "grad_accum": _at_least(1),
    "tokens_per_batch": _at_least(1),
    "learning_rate": _at_least(0),
    "warmup_steps": _at_least(0),
    "weight_decay": _at_least(0),
    "max_grad_norm": _at_least(0),
    "seed": _at_least(0),
    "ld_alpha": _at_least(0),
    "spo_inner_steps": _at_least(0),
    "spo_inner_lr": _ABOVE_ZERO,
    "workspace_mib": _at_least(1),
    "sparsity_tolerance": ((lambda x: 0 < x < 1), "between 0 and 1"),
    "save_steps": _at_least(0),
    "keep_checkpoints": _at_least(0),
    "logging_steps": _at_least(1),
    "eval_steps": _at_least(0),
}


def _check_numbers(config: TrainConfig) -> None:
    for name, (inside, expected) in _RANGES.items():
        value = getattr(config, name)
        # `inside` is False for NaN too.
        if value is not None and not inside(value):
            raise TrainError(f"{as_flags([name])} must be {expected}, got {value}")
