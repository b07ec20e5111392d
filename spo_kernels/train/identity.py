"""What a resumed run must share with the one that it goes on with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers
from accelerate import Accelerator

import spo_kernels
from spo_kernels.data import Example
from spo_kernels.train.checkpoint import SOFTWARE, Checkpoint, check_identity
from spo_kernels.train.config import RESUME_MAY_CHANGE, TrainConfig
from spo_kernels.train.content import data_hash, model_hash
from spo_kernels.train.processes import SHARDED


def identity_of(
    config: TrainConfig, examples: list[Sequence[Example]], model: Any, accelerator: Accelerator
) -> dict[str, Any]:
    """Everything that a resumed run must share with the one that it goes on with."""
    # As it will be read back from JSON.
    settings = json.loads(json.dumps(asdict(config)))
    return {
        **settings,
        "number of processes": accelerator.num_processes,
        SOFTWARE: (
            f"spo_kernels {spo_kernels.__version__}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}, {torch.get_num_threads()} threads"
            f"{', FSDP2' if accelerator.distributed_type == SHARDED else ''}"
        ),
        "mixed precision": accelerator.mixed_precision,
        "data content": [data_hash(part) for part in examples],
        "model content": model_hash(model),
    }


def planned_steps(identity: dict[str, Any], records: int) -> int:
    """Optimizer steps of a run on that many records."""
    per_step = identity["batch_size"] * identity["grad_accum"] * identity["number of processes"]
    return identity["max_steps"] or math.ceil(identity["epochs"] * records / per_step)


def check_resumed(
    checkpoint: Checkpoint,
    identity: dict[str, Any],
    config: TrainConfig,
    examples: Sequence[Example],
    warn: Callable[[str], None],
) -> None:
    """The same run, except that one which is finished may go on for longer."""
    longer = {"max_steps", "epochs"}
    check_identity(checkpoint, identity, RESUME_MAY_CHANGE | longer, warn)
    now = planned_steps(identity, len(examples))
    try:
        before = planned_steps(checkpoint.identity, len(examples))
    # Not numbers, in a manifest that was edited.
    except (TypeError, ValueError, OverflowError):
        before = -1
    if before != now and (checkpoint.step != before or now < before):
        check_identity(checkpoint, identity, RESUME_MAY_CHANGE, lambda _: None)
    if before < now:
        warn(
            f"the run was finished after {before} steps and goes on to {now}; its learning rate is the one that "
            f"--schedule {config.schedule} has at step {before} of {now}"
        )
