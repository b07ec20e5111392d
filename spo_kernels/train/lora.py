"""Fresh LoRA adapters on the model to train."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from spo_kernels.train.adapters import check_tied
from spo_kernels.train.config import TrainConfig
from spo_kernels.train.errors import TrainError
from spo_kernels.train.model import check_head


def check_adapters(model: nn.Module, config: TrainConfig) -> None:
    """Refuse --lora-targets before the reference is computed: adapters are tried on a model without weights.

    Not on a quantised one, whose weights PEFT asks how they were made.
    """
    if not config.lora_r:
        return
    _check_targets(model, _targets(config))
    if getattr(model, "is_quantized", False):
        return
    # PEFT draws the adapters' weights
    with torch.random.fork_rng(devices=[]):
        add_lora(_without_weights(model), config)


def add_lora(model: nn.Module, config: TrainConfig) -> nn.Module:
    """Wrap the model with fresh adapters; "all-linear" is all but the head."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise TrainError("--lora-r needs the package peft: pip install peft") from error
    try:
        adapted = get_peft_model(
            model,
            LoraConfig(
                r=config.lora_r,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                target_modules=_targets(config),
                task_type="CAUSAL_LM",
            ),
        )
        check_tied(adapted, f"--lora-targets {config.lora_targets}")
        check_head(adapted)
        return adapted
    except ValueError as error:
        raise TrainError(f"--lora-targets {config.lora_targets}: {error}") from error


def _targets(config: TrainConfig) -> str | list[str]:
    """As PEFT takes them."""
    names = [name.strip() for name in config.lora_targets.split(",") if name.strip()]
    return "all-linear" if names == ["all-linear"] else names


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have shapes alone."""
    bare: dict[int, Tensor] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    bare |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    return copy.deepcopy(model, bare)


def _check_targets(model: nn.Module, targets: str | list[str]) -> None:
    """Refuse a name that no module has; beside others PEFT would leave it out."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(targets, str):
        return
    if not targets:
        raise TrainError("--lora-targets must name modules of the model, or be all-linear; it has no name")
    modules = dict(model.named_modules())
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in modules):
            kinds = (nn.Linear, Conv1D)
            linear = {name.rpartition(".")[2]: None for name, part in modules.items() if isinstance(part, kinds)}
            raise TrainError(
                f"--lora-targets {target}: {type(model).__name__} has no module of that name; its linear ones are "
                f"{', '.join(linear)}"
            )
