"""Checkpoints that are either complete or absent, and resume bit for bit.

A checkpoint is written into a hidden temporary folder, flushed to disk and renamed: a kill at any moment
leaves the earlier ones intact. checkpoint.json lists size and SHA-256 of the other files. Nothing is
unpickled: tensors are safetensors, the rest is read with `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spo_kernels.train.errors import TrainError

FORMAT = 2
WEIGHTS, STATE, MANIFEST = "model.safetensors", "state.pt", "checkpoint.json"
# Key of the identity that may change, with a warning: versions and threads decide the order of sums.
SOFTWARE = "software"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete, verified checkpoint."""

    path: Path
    step: int
    identity: dict[str, Any]

    def weights(self) -> dict[str, Tensor]:
        try:
            return load_file(self.path / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise _damaged(self.path / WEIGHTS, str(error)) from error

    def state(self) -> dict[str, Any]:
        try:
            return torch.load(self.path / STATE, map_location="cpu", weights_only=True)
        # Torn zip archives and forbidden pickles raise many types.
        except Exception as error:
            raise _damaged(self.path / STATE, str(error)) from error


def save_checkpoint(
    output: Path,
    step: int,
    weights: dict[str, Tensor],
    state: dict[str, Any],
    identity: dict[str, Any],
    keep: int,
) -> None:
    """Write OUTPUT/checkpoint-STEP as a whole, then remove all but the newest `keep` (0: none)."""
    final = output / f"checkpoint-{step}"
    temporary = output / f".{final.name}.tmp"
    if final.exists():
        raise TrainError(f"{final} exists already and is not overwritten")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file(weights, temporary / WEIGHTS)
        torch.save(state, temporary / STATE)
        files = {name: _describe(temporary / name) for name in (WEIGHTS, STATE)}
        manifest = {"format": FORMAT, "step": step, "files": files, "identity": identity}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2))
        for name in (WEIGHTS, STATE, MANIFEST):
            _flush(temporary / name)
        _flush(temporary)
        temporary.rename(final)
        _flush(output)
    # torch.save reports a full disk as RuntimeError.
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise TrainError(f"{final}: can't be written ({error}); earlier checkpoints are intact") from error
    if keep:
        for _, old in sorted(_numbered(output))[:-keep]:
            _remove(old)


def newest_checkpoint(output: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest complete checkpoint, verified; a damaged one is an error, never skipped silently."""
    for step, path in sorted(_numbered(output), reverse=True):
        if not (path / MANIFEST).exists():
            warn(f"{path} is incomplete (no {MANIFEST}) and is passed over")
            continue
        return _verify(path, step)
    return None


def capture_rng() -> dict[str, Any]:
    """Random state of this process, in types that a weights-only load accepts."""
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, without duplicates of tied weights: trained parameters and all saved buffers."""
    saved = model.state_dict().keys()
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    weights |= {name: b for name, b in model.named_buffers() if name in saved}
    return {name: tensor.contiguous() for name, tensor in weights.items()}


@torch.no_grad()
def restore_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    own = trained_weights(model)
    if own.keys() != weights.keys():
        raise TrainError(f"{path}: holds other weights than this model has: {sorted(own.keys() ^ weights.keys())[:3]}")
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in weights.items():
        if tensors[name].shape != tensor.shape:
            raise TrainError(f"{path}: {name} is {tuple(tensor.shape)}, the model's is {tuple(tensors[name].shape)}")
        tensors[name].copy_(tensor)


def check_identity(
    checkpoint: Checkpoint, identity: dict[str, Any], may_change: Iterable[str], warn: Callable[[str], None]
) -> None:
    """Refuse to go on with other settings, data or model than the run began with."""
    old, new = checkpoint.identity.get(SOFTWARE), identity.get(SOFTWARE)
    if old != new:
        warn(f"resumed with {new} a run that began with {old}: it will not end with the same bits")
    ignored = {SOFTWARE, *may_change}
    # Options first: a changed --seed changes the data too, and is what the user can see.
    for name in sorted(checkpoint.identity.keys() | identity.keys(), key=lambda n: (" " in n, n)):
        old, new = checkpoint.identity.get(name), identity.get(name)
        if name not in ignored and old != new:
            what = name if " " in name else "--" + name.replace("_", "-")
            raise TrainError(f"{checkpoint.path}: {what} was {old!r} and is now {new!r}; resume with the old one")


def _verify(path: Path, step: int) -> Checkpoint:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, identity = manifest["files"], manifest["identity"]
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path / MANIFEST, str(error)) from error
    if version != FORMAT or manifest.get("step") != step:
        raise _damaged(path / MANIFEST, f"format {version!r}, step {manifest.get('step')!r}")
    for name, expected in files.items():
        try:
            found = _describe(path / name)
        except OSError as error:
            raise _damaged(path / name, error.strerror or str(error)) from error
        if found["bytes"] != expected["bytes"]:
            raise _damaged(path / name, f"{found['bytes']} bytes instead of {expected['bytes']}")
        if found != expected:
            raise _damaged(path / name, "its checksum differs")
    return Checkpoint(path, step, identity)


def _damaged(file: Path, reason: str) -> TrainError:
    return TrainError(f"{file}: damaged checkpoint ({reason}); remove {file.parent} to resume from the one before")


def _numbered(output: Path) -> list[tuple[int, Path]]:
    if not output.is_dir():
        return []
    return [(int(m[1]), p) for p in output.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]


def _describe(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Rename first: a kill in the middle never leaves half a checkpoint under a complete one's name."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
