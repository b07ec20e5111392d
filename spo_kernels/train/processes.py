"""The processes of a run: accelerate's, and what its settings for FSDP may be."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from torch.distributed.fsdp import MixedPrecisionPolicy

from spo_kernels.train.config import TrainConfig
from spo_kernels.train.errors import TrainError

SHARDED = DistributedType.FSDP


def make_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate's, as its launcher or torchrun have set the environment: one process, DDP or FSDP2.

    Raises:
        TrainError: Settings that cannot be, with the reason.
    """
    plugin = _plugin(config) if parse_flag_from_env("ACCELERATE_USE_FSDP") else None
    accelerator = Accelerator(
        # where there is no accelerator, processes would not find each other without
        cpu=not torch.accelerator.is_available(),
        mixed_precision="bf16" if config.bf16 else None,
        gradient_accumulation_steps=config.grad_accum,
        fsdp_plugin=plugin,
    )
    if plugin is not None:
        shard_on_cpu(accelerator.state, plugin)
    kind = accelerator.distributed_type
    if kind.value not in ("NO", "MULTI_CPU", "MULTI_GPU", SHARDED.value):
        raise TrainError(
            f"accelerate's {kind.value} is not supported; use DDP or FSDP2, or FusedDPOTrainer with DeepSpeed"
        )
    return accelerator


def shard_on_cpu(state: Any, plugin: FullyShardedDataParallelPlugin) -> None:
    """accelerate takes settings for FSDP on accelerators only; on a CPU it would use DDP and say nothing."""
    if state.distributed_type == DistributedType.MULTI_CPU:
        # each new AcceleratorState takes it from there
        state.distributed_type = PartialState().distributed_type = SHARDED
        state.fsdp_plugin = plugin
        if state.mixed_precision != "no":
            plugin.set_mixed_precision(state.mixed_precision)


def _plugin(config: TrainConfig) -> FullyShardedDataParallelPlugin:
    # sums of log-probabilities and of gradients in bfloat16, accelerate's choice, would be off
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if config.bf16 else None
    # every process looks at the whole model before it is put in parts
    plugin = FullyShardedDataParallelPlugin(mixed_precision_policy=precision, cpu_ram_efficient_loading=False)
    if plugin.fsdp_version != 2:
        raise TrainError(f"fsdp_version {plugin.fsdp_version} is not supported, only 2 is")
    if plugin.activation_checkpointing:
        raise TrainError("fsdp_activation_checkpointing gives weights other names: use --gradient-checkpointing")
    if config.spo_inner_steps:
        raise TrainError(
            "--spo-inner-steps changes weights within a step and asks autograd for their gradients, of which FSDP has "
            "put only parts in its place: use DDP"
        )
    if config.tokens_per_batch:
        raise TrainError(
            "--tokens-per-batch leaves processes with different numbers of forwards, and FSDP joins all in each: "
            "use --batch-size, or DDP"
        )
    return plugin
