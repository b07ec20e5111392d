"""Reference log-probs of responses or of their tokens, computed once and cached on disk.

A cache file is named after a hash of everything that its numbers depend on: the reference model's
weights and configuration, the token ids, and how they are computed. So it can't go stale.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from spo_kernels import LMHead
from spo_kernels.data import Example
from spo_kernels.extras.token_weights import ld_dpo_weights
from spo_kernels.integrations.at_head import ResponseLogps
from spo_kernels.train.batches import IGNORE_INDEX, collate
from spo_kernels.train.files import whole, writing
from spo_kernels.train.forwards import Forwards
from spo_kernels.train.together import together
from spo_kernels.train.token_logps import TokenPlaces

CACHE_FORMAT = 1


def reference_logps(
    model: nn.Module,
    examples: Sequence[Example],
    accelerator: Any,
    folder: Path,
    warn: Callable[[str], None],
    content: str,
    forwards: Forwards,
    quiet: bool = True,
    ld_alpha: float | None = None,
    of_tokens: bool = False,
    layout: str = "auto",
    **kernel_options: Any,
) -> Tensor:
    """Sums of response log-probs [n, responses], or those of all tokens as `TokenPlaces` has them; float32 on the CPU.

    Cached under `content`, a `model_hash`. `ld_alpha` as in `Policy`; it has no part in log-probs of tokens.
    """
    head = LMHead.of(model)
    key = cache_key(
        model=content,
        data=data_hash(examples),
        precision=accelerator.mixed_precision,
        transform=f"{head.logit_scale} {head.logit_softcap}",
        backend=kernel_options.get("backend"),
        **({"of_tokens": True} if of_tokens else {"ld_alpha": ld_alpha}),
    )
    path = folder / f"reference-{key[:24]}.safetensors"
    places = TokenPlaces.of(examples) if of_tokens else None
    shape = (len(examples), len(examples[0].responses)) if places is None else (places.total,)
    cached = _load(path, key, shape, warn) if accelerator.is_main_process else None
    if broadcast_object_list([cached is not None])[0]:
        logps = torch.empty(shape) if cached is None else cached
        return broadcast(logps.to(accelerator.device)).cpu()
    logps = score(model, examples, accelerator, forwards, quiet, ld_alpha, places, layout, **kernel_options)
    with together(accelerator):
        if accelerator.is_main_process:
            _save(path, key, logps)
    return logps


@torch.no_grad()
def score(
    model: nn.Module,
    examples: Sequence[Example],
    accelerator: Any,
    forwards: Forwards,
    quiet: bool = True,
    ld_alpha: float | None = None,
    places: TokenPlaces | None = None,
    layout: str = "auto",
    **kernel_options: Any,
) -> Tensor:
    """As `reference_logps`; every process does its share, all get the whole."""
    model.eval()
    responses = len(examples[0].responses)
    shape = (len(examples), responses) if places is None else (places.total,)
    found = torch.zeros(shape, device=accelerator.device)
    by_length = sorted(range(len(examples)), key=lambda i: examples[i].longest)
    batches = forwards.of(examples, by_length, accelerator.process_index, accelerator.num_processes)
    for batch in tqdm(batches, desc="reference", disable=quiet or not accelerator.is_main_process):
        input_ids, labels = collate((examples[i] for i in batch), accelerator.device)
        weights = None if ld_alpha is None or places is not None else ld_dpo_weights(labels, ld_alpha, shift=True)
        call = ResponseLogps(labels, weights, layout, kernel_options, summed=places is None)
        with accelerator.autocast():
            logps = call(model, model, {"input_ids": input_ids})["logps"]
        if places is None:
            found[batch] = logps.view(responses, len(batch)).T
        else:
            found[places.select(batch).to(found.device)] = logps[labels != IGNORE_INDEX]
    # What the other processes found is 0 here.
    return accelerator.reduce(found, "sum").cpu()


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
        digest.update(_bytes(tensor))
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


def cache_key(**parts: Any) -> str:
    return hashlib.sha256(json.dumps({"format": CACHE_FORMAT, **parts}, sort_keys=True).encode()).hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """The tensor's memory, for hashing."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _load(path: Path, key: str, shape: tuple[int, ...], warn: Callable[[str], None]) -> Tensor | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata, logps = file.metadata() or {}, file.get_tensor("logps").clone()
    except (OSError, SafetensorError) as error:
        warn(f"{path}: damaged cache of reference log-probs ({error}); computing them again")
        return None
    intact = metadata.get("sha256") == hashlib.sha256(_bytes(logps)).hexdigest()
    if metadata.get("key") != key or tuple(logps.shape) != shape or not intact:
        warn(f"{path}: damaged cache of reference log-probs (checksum differs); computing them again")
        return None
    return logps


def _save(path: Path, key: str, logps: Tensor) -> None:
    metadata = {"key": key, "sha256": hashlib.sha256(_bytes(logps)).hexdigest()}
    with writing(f"reference log-probs: {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        save_file({"logps": logps.contiguous()}, temporary, metadata=metadata)
