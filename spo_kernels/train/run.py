"""One run from settings to saved model: cheap mistakes are found before expensive work."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import get_scheduler
from transformers.utils.logging import disable_progress_bar

from spo_kernels import backend_info
from spo_kernels.data import Example
from spo_kernels.losses import Objective
from spo_kernels.train.checkpoint import Checkpoint, remove_checkpoints
from spo_kernels.train.config import TrainConfig
from spo_kernels.train.data import check_files, check_model_name, dated, load_examples
from spo_kernels.train.errors import StorageError, TrainError
from spo_kernels.train.files import whole
from spo_kernels.train.forwards import Forwards, forwards_of, may_split
from spo_kernels.train.identity import check_resumed, identity_of, planned_steps
from spo_kernels.train.inner import InnerSteps, build_inner
from spo_kernels.train.loop import Trainer
from spo_kernels.train.lora import add_lora, check_adapters
from spo_kernels.train.model import (
    check_against_own_logits,
    check_dtype,
    check_fits,
    check_layout,
    freeze_unused,
    load_model,
    load_tokenizer,
)
from spo_kernels.train.objective import build_objective, input_columns
from spo_kernels.train.output import SETTINGS, claimed, rescue, save_model, warn_of_space
from spo_kernels.train.policy import Policy, SFTPolicy
from spo_kernels.train.processes import SHARDED, make_accelerator
from spo_kernels.train.sharded import model_weights, shard
from spo_kernels.train.signals import StopSignals
from spo_kernels.train.splits import Split, make_splits
from spo_kernels.train.together import lost_processes_said, together


def run(config: TrainConfig, stop: StopSignals | None = None) -> None:
    """Train as `config` says; raises TrainError for what the user can put right, Stopped after a signal."""
    objective = build_objective(config)
    _check_backend(config)
    accelerator = make_accelerator(config)
    if config.quiet or not accelerator.is_main_process:
        disable_progress_bar()
        datasets.disable_progress_bars()

    def warn(message: str) -> None:
        accelerator.print(f"spo-train: {message}", file=sys.stderr)

    goes_on = "the same command with --resume goes on from the newest checkpoint"
    with lost_processes_said(goes_on), claimed(config, accelerator, warn) as (output, checkpoint):
        trainer, tokenizer = _prepare(config, objective, accelerator, warn, output, checkpoint)
        trainer.stop = stop or trainer.stop
        model = accelerator.unwrap_model(trainer.policy).model
        try:
            trainer.run(checkpoint)
            weights = model_weights(model, keep=accelerator.is_main_process)
            with together(accelerator):
                if accelerator.is_main_process:
                    save_model(model, tokenizer, output, weights)
                    if not config.save_steps:
                        remove_checkpoints(output)
            warn(f"model and tokenizer are in {output}")
        except StorageError as error:
            weights = model_weights(model, keep=accelerator.is_main_process)
            with together(accelerator):
                if accelerator.is_main_process:
                    raise TrainError(f"{error}; {rescue(model, tokenizer, output, trainer.step, weights)}") from error
    # What DDP holds of the processes' group goes first: freed after it, it would wait for a thread of the group, with
    # Python's lock, which that thread may need.
    del trainer, model
    accelerator.free_memory()
    accelerator.end_training()


def _prepare(
    config: TrainConfig,
    objective: Objective | None,
    accelerator: Accelerator,
    warn: Callable[[str], None],
    output: Path,
    checkpoint: Checkpoint | None,
) -> tuple[Trainer, Any]:
    """Everything that comes before the first step; also the tokenizer."""
    # The same on all processes until the model is made (adapters), different after (dropout).
    set_seed(config.seed, deterministic=config.deterministic)
    config = dated(config, checkpoint)
    tokenizer, examples = _load_data(config, objective, accelerator, warn)
    first = examples[0][0]
    tokens = torch.tensor([*first.prompt, *first.responses[0]], dtype=torch.int64, device=accelerator.device)
    with together(accelerator):
        model = _load_start(config, accelerator, examples, tokens)
        identity = identity_of(config, examples, model, accelerator)
        if checkpoint is not None:
            check_resumed(checkpoint, identity, config, examples[0], warn)
        if accelerator.is_main_process:
            with whole(output / SETTINGS) as temporary:
                temporary.write_text(json.dumps(asdict(config), indent=2) + "\n")

    content = identity["model content"]
    splits, reference = make_splits(config, objective, model, content, examples, accelerator, warn)
    if config.lora_r:
        model = add_lora(model, config)
    freeze_unused(model, tokens)
    if accelerator.is_main_process:
        warn_of_space(model, output, warn)
    models = [model, *([reference] if isinstance(reference, nn.Module) else [])]
    forwards = forwards_of(config, models, examples, split=may_split(config, objective, model, accelerator))
    policy = _policy(config, objective, model, reference, accelerator)
    trainer = _trainer(config, accelerator, policy, splits, output, identity, forwards, build_inner(config, objective))
    trainer.warn = warn
    if config.warmup_steps >= trainer.max_steps:
        warn(
            f"--warmup-steps {config.warmup_steps} is no less than the run's {trainer.max_steps} steps, which end "
            "before --learning-rate is reached"
        )
    set_seed(config.seed, device_specific=True)
    return trainer, tokenizer


def _load_data(
    config: TrainConfig, objective: Objective | None, accelerator: Accelerator, warn: Callable[[str], None]
) -> tuple[Any, list[Sequence[Example]]]:
    """The tokenizer, and the parts of the data, encoded."""
    # The first process of a machine encodes, the others find what it has left in the cache.
    for encodes in (True, False):
        with together(accelerator):
            if accelerator.is_local_main_process == encodes:
                for name in filter(None, (config.model, config.ref_model)):
                    check_model_name(name)
                check_dtype(config)
                check_files(config)
                tokenizer = load_tokenizer(config.model, config)
                examples = load_examples(config, input_columns(config, objective), tokenizer, warn)
    return tokenizer, examples


def _load_start(
    config: TrainConfig, accelerator: Accelerator, examples: list[Sequence[Example]], tokens: Tensor
) -> nn.Module:
    """The model that the run begins with, after all that can be found wrong with it; `tokens` [T] are some of its."""
    model = load_model(config.model, config, accelerator.device)
    if config.gradient_checkpointing:
        _checkpoint_activations(model)
    check_adapters(model, config)
    check_layout(model, config)
    check_fits(model, examples, config.model)
    check_against_own_logits(model, tokens, config.backend)
    return model


def _policy(
    config: TrainConfig,
    objective: Objective | None,
    model: nn.Module,
    reference: nn.Module | str | None,
    accelerator: Accelerator,
) -> Policy | SFTPolicy:
    """Model and loss as one module, sharded where the run is."""
    kernels: dict[str, Any] = {"workspace_bytes": config.workspace_bytes, "backend": config.backend}
    policy: Policy | SFTPolicy
    if objective is None:
        policy = SFTPolicy(model, config.backward, **kernels)
    else:
        # DDP's hooks would miss what is added to a gradient, and autocast casts the weight
        kernels["accumulate"] = accelerator.num_processes == 1 and accelerator.mixed_precision == "no"
        policy = Policy(model, objective, reference, config.ld_alpha, config.backward, config.layout, **kernels)
    if accelerator.distributed_type == SHARDED:
        if isinstance(reference, nn.Module):
            shard(reference, accelerator.state.fsdp_plugin)
        shard(policy, accelerator.state.fsdp_plugin, methods=("log_ratios",) if objective else ())
    return policy


def _check_backend(config: TrainConfig) -> None:
    known = backend_info()
    if config.backend is None:
        return
    if config.backend not in known:
        raise TrainError(f"--backend {config.backend}: unknown; the backends are {', '.join(known)}")
    if not known[config.backend].available:
        raise TrainError(f"--backend {config.backend}: not available: {known[config.backend].detail}")


def _checkpoint_activations(model: Any) -> None:
    """Forwards without gradients, as a reference's are, stay as they were."""
    # transformers renamed it in 5.x; the old name warns there.
    new = getattr(model, "activation_checkpointing_enable", None)
    enable = new or model.gradient_checkpointing_enable
    try:
        # Non-reentrant: it keeps gradients flowing below frozen layers, and works under DDP.
        enable({"use_reentrant": False})
    except ValueError as error:
        raise TrainError(f"--gradient-checkpointing: {error}") from error


def _trainer(
    config: TrainConfig,
    accelerator: Accelerator,
    policy: Policy | SFTPolicy,
    splits: list[Split],
    output: Path,
    identity: dict[str, Any],
    forwards: Forwards,
    inner: InnerSteps | None,
) -> Trainer:
    parameters = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # The default loop over parameters takes 9 x the time on a CPU, and two temporaries of the largest parameter.
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, fused=True)
    max_steps = planned_steps(identity, len(splits[0].examples))
    schedule = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    scheduler = get_scheduler(schedule, optimizer, config.warmup_steps, max_steps)
    if accelerator.distributed_type == SHARDED:
        prepared, optimizer = policy, accelerator.prepare_optimizer(optimizer)
    else:
        prepared, optimizer = accelerator.prepare(policy, optimizer)
    return Trainer(
        config=config,
        accelerator=accelerator,
        policy=prepared,
        optimizer=optimizer,
        scheduler=scheduler,
        train=splits[0],
        evaluation=splits[1] if len(splits) > 1 else None,
        output=output,
        identity=identity,
        max_steps=max_steps,
        forwards=forwards,
        inner=inner,
    )
