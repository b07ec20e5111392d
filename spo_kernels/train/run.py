"""One run from settings to saved model: cheap mistakes are found before expensive work."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import get_scheduler
from transformers.utils.logging import disable_progress_bar

import spo_kernels
from spo_kernels import LMHead, backend_info
from spo_kernels.data import Example
from spo_kernels.integrations.preference_model import ADAPTERS_OFF
from spo_kernels.losses import Objective
from spo_kernels.losses.needs import needs_reference
from spo_kernels.losses.pairs import token_subsets_of
from spo_kernels.train.checkpoint import SOFTWARE, Checkpoint, check_identity
from spo_kernels.train.config import RESUME_MAY_CHANGE, TrainConfig
from spo_kernels.train.data import check_model_name, dated, load_examples
from spo_kernels.train.errors import StorageError, TrainError
from spo_kernels.train.files import whole
from spo_kernels.train.forwards import Forwards, forwards_of, may_split
from spo_kernels.train.inner import InnerSteps, build_inner
from spo_kernels.train.loop import Split, Trainer
from spo_kernels.train.lora import add_lora, check_adapters
from spo_kernels.train.mismatched import MismatchedExamples, MismatchedPairs
from spo_kernels.train.model import (
    check_against_own_logits,
    check_dtype,
    check_layout,
    freeze_unused,
    load_model,
    load_tokenizer,
)
from spo_kernels.train.objective import build_objective, input_columns, mismatched_inputs
from spo_kernels.train.output import CACHE_FOLDER, SETTINGS, claimed, rescue, save_model, warn_of_space
from spo_kernels.train.policy import Policy, SFTPolicy
from spo_kernels.train.processes import SHARDED, make_accelerator
from spo_kernels.train.reference import data_hash, model_hash, reference_logps
from spo_kernels.train.sharded import model_weights, shard
from spo_kernels.train.signals import StopSignals
from spo_kernels.train.together import lost_processes_said, together
from spo_kernels.train.token_logps import TokenLogps, TokenPlaces


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
    examples: list[Sequence[Example]] = []
    # The first process of a machine encodes, the others find what it has left in the cache.
    for encodes in (True, False):
        with together(accelerator):
            if accelerator.is_local_main_process == encodes:
                for name in filter(None, (config.model, config.ref_model)):
                    check_model_name(name)
                check_dtype(config)
                tokenizer = load_tokenizer(config.model, config)
                examples = load_examples(config, input_columns(config, objective), tokenizer, warn)
    with together(accelerator):
        model = load_model(config.model, config, accelerator.device)
        if config.gradient_checkpointing:
            _checkpoint_activations(model)
        check_adapters(model, config)
        check_layout(model, config)
        _check_fits(model, examples, config.model)
        first = examples[0][0]
        tokens = torch.tensor([*first.prompt, *first.responses[0]], dtype=torch.int64, device=accelerator.device)
        check_against_own_logits(model, tokens, config.backend)
        identity = _identity(config, examples, model, accelerator)
        if checkpoint is not None:
            _check_resumed(checkpoint, identity, config, examples[0], warn)
        if accelerator.is_main_process:
            with whole(output / SETTINGS) as temporary:
                temporary.write_text(json.dumps(asdict(config), indent=2) + "\n")

    splits, reference = _references(config, objective, model, examples, accelerator, warn, identity["model content"])
    if config.lora_r:
        model = add_lora(model, config)
    freeze_unused(model, tokens)
    if accelerator.is_main_process:
        warn_of_space(model, output, warn)
    kernels: dict[str, Any] = {"workspace_bytes": config.workspace_bytes, "backend": config.backend}
    policy: Policy | SFTPolicy
    if objective is None:
        policy = SFTPolicy(model, config.backward, **kernels)
    else:
        # DDP's hooks would miss what is added to a gradient, and autocast casts the weight
        kernels["accumulate"] = accelerator.num_processes == 1 and accelerator.mixed_precision == "no"
        policy = Policy(model, objective, reference, config.ld_alpha, config.backward, config.layout, **kernels)
    models = [model, *([reference] if isinstance(reference, nn.Module) else [])]
    forwards = forwards_of(config, models, examples, split=may_split(config, objective, model, accelerator))
    if accelerator.distributed_type == SHARDED:
        if isinstance(reference, nn.Module):
            shard(reference, accelerator.state.fsdp_plugin)
        shard(policy, accelerator.state.fsdp_plugin, methods=("log_ratios",) if objective else ())
    trainer = _trainer(config, accelerator, policy, splits, output, identity, forwards, build_inner(config, objective))
    trainer.warn = warn
    if config.warmup_steps >= trainer.max_steps:
        warn(
            f"--warmup-steps {config.warmup_steps} is no less than the run's {trainer.max_steps} steps, which end "
            "before --learning-rate is reached"
        )
    set_seed(config.seed, device_specific=True)
    return trainer, tokenizer


def _check_backend(config: TrainConfig) -> None:
    known = backend_info()
    if config.backend is None:
        return
    if config.backend not in known:
        raise TrainError(f"--backend {config.backend}: unknown; the backends are {', '.join(known)}")
    if not known[config.backend].available:
        raise TrainError(f"--backend {config.backend}: not available: {known[config.backend].detail}")


def _check_fits(model: Any, examples: list[Sequence[Example]], name: str) -> None:
    """Token ids and lengths that the model can take."""
    vocabulary = min(len(model.get_input_embeddings().weight), len(LMHead.of(model).weight))
    largest = max(int(ids.max()) for part in examples for e in part for ids in (e.prompt, *e.responses))
    if largest >= vocabulary:
        raise TrainError(f"the tokenizer produces token id {largest}, but {name} has only {vocabulary} tokens")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(e.longest for part in examples for e in part)
    if positions is not None and longest > positions:
        raise TrainError(
            f"the longest sequence has {longest} tokens, but {name} has only {positions} positions; lower --max-length"
        )


def _identity(
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


def _planned_steps(identity: dict[str, Any], records: int) -> int:
    per_step = identity["batch_size"] * identity["grad_accum"] * identity["number of processes"]
    return identity["max_steps"] or math.ceil(identity["epochs"] * records / per_step)


def _check_resumed(
    checkpoint: Checkpoint,
    identity: dict[str, Any],
    config: TrainConfig,
    examples: Sequence[Example],
    warn: Callable[[str], None],
) -> None:
    """The same run, except that one which is finished may go on for longer."""
    longer = {"max_steps", "epochs"}
    check_identity(checkpoint, identity, RESUME_MAY_CHANGE | longer, warn)
    now = _planned_steps(identity, len(examples))
    try:
        before = _planned_steps(checkpoint.identity, len(examples))
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


def _references(
    config: TrainConfig,
    objective: Objective | None,
    model: nn.Module,
    examples: list[Sequence[Example]],
    accelerator: Accelerator,
    warn: Callable[[str], None],
    own_hash: str,
) -> tuple[list[Split], nn.Module | str | None]:
    """Splits with their reference log-probs, or where the policy gets them online, or neither."""
    needed = objective is not None and needs_reference(objective)
    if objective is None or not (needed or config.diagnostics):
        return [Split(part) for part in examples], None
    other, content = model, own_hash
    if config.ref_model is not None:
        other = load_model(config.ref_model, config, accelerator.device, trained=False)
        content = model_hash(other)
        check_layout(other, config)
        _check_fits(other, examples, config.ref_model)
    reference: nn.Module | str | None = None
    if needed and config.reference == "online":
        own: nn.Module | str = ADAPTERS_OFF if config.lora_r else copy.deepcopy(model)
        reference = own if config.ref_model is None else other
    folder = Path(config.cache_dir).expanduser() if config.cache_dir else Path(config.output_dir) / CACHE_FOLDER

    def precomputed(part: Sequence[Example], of_tokens: bool = False, ld_alpha: float | None = None) -> Tensor:
        return reference_logps(
            other,
            part,
            accelerator,
            folder,
            warn,
            content,
            forwards_of(config, [other], [part]),
            config.quiet,
            ld_alpha,
            of_tokens,
            config.layout,
            workspace_bytes=config.workspace_bytes,
            backend=config.backend,
        )

    given = needed and reference is None
    of_tokens = given and token_subsets_of(objective) is not None
    mismatched = bool(mismatched_inputs(config, objective))
    splits = []
    for part in examples:
        sums = precomputed(part, ld_alpha=config.ld_alpha) if config.diagnostics or (given and not of_tokens) else None
        logps: Tensor | TokenLogps | None = sums if given else None
        if of_tokens:
            logps = TokenLogps(TokenPlaces.of(part), precomputed(part, of_tokens=True))
        pairs = None
        if mismatched:
            others = MismatchedExamples(part)
            pairs = MismatchedPairs(others, precomputed(others).flatten() if given else None)
        splits.append(Split(part, logps, sums if config.diagnostics else None, pairs))
    return splits, reference


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
    max_steps = _planned_steps(identity, len(splits[0].examples))
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
