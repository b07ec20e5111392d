"""Hashes of models and data: what numbers depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from spo_kernels.data import Example


def model_hash(model: Any) -> str:
    """SHA-256 of every parameter and buffer, and of the configurations without where they were loaded from."""
    digest = hashlib.sha256()
    settings = model.config.to_dict()
    # Scale and rank of an adapter stand there, not in its weights.
    adapters = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    for each in (settings, *adapters.values()):
        for key in ("_name_or_path", "base_model_name_or_path"):
            each.pop(key, None)
    if adapters:
        settings["adapters"] = {n: {k: _ordered(v) for k, v in each.items()} for n, each in adapters.items()}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _ordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def data_hash(examples: Iterable[Example]) -> str:
    """SHA-256 of the token ids, with their boundaries, and of the inputs."""
    digest = hashlib.sha256()
    for example in examples:
        for ids in (example.prompt, *example.responses):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.tobytes())
        digest.update(repr(sorted(example.inputs.items())).encode())
        if example.scored:
            digest.update(repr(example.scored).encode())
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> Any:
    """The tensor's memory, for hashing."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
