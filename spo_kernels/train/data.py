"""From a run's options to its examples."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spo_kernels.data import Encoding, Example, Examples, encode, read_records
from spo_kernels.data.records import check_source
from spo_kernels.train.checkpoint import MANIFEST, Checkpoint
from spo_kernels.train.config import TrainConfig
from spo_kernels.train.errors import TrainError


def dated(config: TrainConfig, checkpoint: Checkpoint | None) -> TrainConfig:
    """With the day that chat templates print: the one on which the run began."""
    began = None if checkpoint is None else checkpoint.identity.get("template_date")
    return replace(config, template_date=config.template_date or began or datetime.date.today().isoformat())


def check_model_name(name: str) -> None:
    """Refuse what is neither a hub id nor a model's folder, before transformers asks the hub for it.

    A checkpoint is one such: it would need its run's options.
    """
    folder = Path(name).expanduser()
    # hub ids are `name` or `owner/name`
    if not folder.exists() and (name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1):
        raise TrainError(f"model {name!r}: no such folder")
    if folder.is_file():
        raise TrainError(f"model {name!r} is a file, not the folder of a model")
    if folder.is_dir() and not any(
        (folder / file).exists() for file in ("config.json", "adapter_config.json", MANIFEST)
    ):
        raise TrainError(f"model {name!r}: no config.json or adapter_config.json in this folder")
    if (folder / MANIFEST).is_file():
        raise TrainError(
            f"{name} is a checkpoint, not a model: to go on with its run, give the run's options with --output-dir "
            f"{folder.parent} --resume; the model is in {folder.parent} once that run has ended"
        )


def check_files(config: TrainConfig) -> None:
    """Refuse data files that are not there, before a model's tokenizer is looked for; raises DataError."""
    check_source(config.dataset, config.dataset_config)
    if config.eval_dataset is not None:
        check_source(config.eval_dataset)


def load_examples(
    config: TrainConfig, inputs: Mapping[str, str], tokenizer: Any, warn: Callable[[str], None]
) -> list[Sequence[Example]]:
    """[training examples], or [training, evaluation]; raises DataError."""
    encoding = Encoding(
        stage=config.stage,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        drop_overlong=config.drop_overlong,
        inputs=inputs,
        date=datetime.date.fromisoformat(config.template_date or datetime.date.today().isoformat()),
    )

    def read(source: str, split: str, subset: str | None) -> Examples:
        records = read_records(source, split, subset, config.column_names, encoding.columns)
        return encode(records, tokenizer, encoding, warn, config.dataset_processes)

    train = read(config.dataset, config.split, config.dataset_config)
    examples: list[Sequence[Example]] = [train]
    if config.eval_dataset is not None:
        same = config.eval_dataset == config.dataset
        examples.append(read(config.eval_dataset, config.eval_split, config.dataset_config if same else None))
    elif config.eval_fraction:
        examples = [*train.hold_out(config.eval_fraction, config.seed)]
    evaluated = len(examples[1]) if len(examples) > 1 else 0
    warn(f"{len(examples[0])} records to train on, {evaluated} to evaluate on")
    return examples
