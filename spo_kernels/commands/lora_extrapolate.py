"""Extrapolating LoRA adapters exactly.

An adapter's weights are a product, `ΔW = s B A`, and extrapolating B and A apart is not extrapolating ΔW. But

    ΔW_2 + α (ΔW_2 - ΔW_1) = (1 + α) s_2 B_2 A_2 - α s_1 B_1 A_1 = [(1 + α) s_2 B_2 | -α s_1 B_1] [A_2 ; A_1],

an adapter of rank r_1 + r_2 with scale 1: exact, up to rounding B once. The rank grows by a round's rank every round;
merging into the base (`merge_and_unload`) ends that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spo_kernels.train.errors import TrainError

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
# Settings that change what the tensors mean, with the value for which ΔW = s B A on an unchanged base.
PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal"),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "trainable_token_indices": (None, [], {}),
    "use_qalora": (None, False),
    "lora_bias": (None, False),
    "target_parameters": (None, []),
}
SAME = ("base_model_name_or_path", "fan_in_fan_out", "task_type")


def extrapolate_adapter(earlier: Path, later: Path, alpha: float, folder: Path) -> None:
    """Write the adapter with `ΔW = ΔW_later + alpha (ΔW_later - ΔW_earlier)` into `folder`.

    Raises:
        TrainError: Not plain LoRA adapters of the same modules of the same base; the message says why.
    """
    configs = [_config(path) for path in (earlier, later)]
    for key in SAME:
        if configs[0].get(key) != configs[1].get(key):
            raise TrainError(
                f"{key} is {configs[0].get(key)!r} in {earlier / ADAPTER_CONFIG} and {configs[1].get(key)!r} in "
                f"{later / ADAPTER_CONFIG}: adapters of different models can't be extrapolated"
            )
    old, new = _tensors(earlier), _tensors(later)
    for name in sorted(old.keys() ^ new.keys()):
        raise TrainError(f"{name} is in {(earlier if name in old else later) / ADAPTER} only")
    # both adapters' factors carry their own scale, and the new one's is 1
    factors = (-alpha * _scale(configs[0]), (1.0 + alpha) * _scale(configs[1]))
    result = {name: _joined(name, new[name], old[name], *factors) for name in new}
    rank = configs[0]["r"] + configs[1]["r"]
    config = {**configs[1], "r": rank, "lora_alpha": rank, "use_rslora": False}
    save_file(result, folder / ADAPTER, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _joined(name: str, new: Tensor, old: Tensor, old_factor: float, new_factor: float) -> Tensor:
    """`[A_2 ; A_1]`, or `[new_factor B_2 | old_factor B_1]`."""
    if new.dtype != old.dtype:
        raise TrainError(f"{name} is {old.dtype} in --from and {new.dtype} in --to")
    down = name.endswith("lora_A.weight")
    if not (down or name.endswith("lora_B.weight")) or new.ndim != 2:
        raise TrainError(
            f"{name}: only lora_A and lora_B of linear layers can be extrapolated; merge the adapters first"
        )
    if old.ndim != 2 or old.shape[int(down)] != new.shape[int(down)]:
        raise TrainError(f"{name} is {list(old.shape)} in --from and {list(new.shape)} in --to")
    if down:
        return torch.cat([new, old], dim=0)
    wide = torch.float64 if new.dtype == torch.float64 else torch.float32
    return torch.cat([new_factor * new.to(wide), old_factor * old.to(wide)], dim=1).to(new.dtype)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text())
        kind, rank, scale = config.get("peft_type"), config.get("r"), config.get("lora_alpha")
    except (OSError, ValueError, AttributeError) as error:
        raise TrainError(f"{path}: not an adapter's configuration: {error}") from error
    if kind != "LORA" or not isinstance(rank, int) or rank < 1 or not isinstance(scale, int | float):
        raise TrainError(f"{path}: a {kind} adapter with r = {rank!r}; only LoRA can be extrapolated: merge it first")
    for key, plain in PLAIN.items():
        if config.get(key) not in plain:
            raise TrainError(
                f"{path}: {key} = {config[key]!r}: its change of the weights is not a plain product of two factors; "
                "merge the adapters into their bases and extrapolate the models"
            )
    return config


def _scale(config: dict[str, Any]) -> float:
    return config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])


def _tensors(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / ADAPTER)
    except (OSError, SafetensorError) as error:
        raise TrainError(f"{folder / ADAPTER}: not a readable safetensors file: {error}") from error
