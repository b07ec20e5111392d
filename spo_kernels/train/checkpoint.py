"""Checkpoints that are either complete or absent, and resume bit for bit.

A checkpoint is written beside its place, flushed to disk and renamed: a kill at any moment leaves the earlier ones
intact. checkpoint.json lists size and SHA-256 of the other files. Nothing is
unpickled: tensors are safetensors, the rest is read with `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spo_kernels.train.config import as_flags
from spo_kernels.train.errors import TrainError
from spo_kernels.train.files import remove, set_aside, whole
from spo_kernels.train.sharded import collected, part_of

FORMAT = 2
WEIGHTS, STATE, MANIFEST = "model.safetensors", "state.pt", "checkpoint.json"
# Key of the identity that may change, with a warning: versions and threads decide the order of sums.
SOFTWARE = "software"
_NAME = re.compile(r"checkpoint-(0|[1-9]\d{0,17})")


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
    """Write OUTPUT/checkpoint-STEP as a whole, then remove all but the newest `keep` whole ones (0: none)."""
    final = output / f"checkpoint-{step}"
    if (final / MANIFEST).exists():
        raise TrainError(f"{final} exists already and is not overwritten")
    if os.path.lexists(final):
        set_aside(final)
    with whole(final, folder=True, after="; earlier checkpoints are intact") as temporary:
        save_file(weights, temporary / WEIGHTS)
        torch.save(state, temporary / STATE)
        files = {name: _describe(temporary / name) for name in (WEIGHTS, STATE)}
        manifest = {"format": FORMAT, "step": step, "files": files, "identity": identity}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2))
    if keep:
        for _, old in sorted(n for n in _numbered(output) if (n[1] / MANIFEST).exists())[:-keep]:
            remove(old)


def remove_checkpoints(output: Path) -> None:
    """Those of a run that has ended and keeps none."""
    for _, path in _numbered(output):
        remove(path)


def newest_checkpoint(output: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest complete checkpoint, verified; a damaged one is an error, never skipped silently.

    Incomplete ones, which a copy that was cut off leaves, are renamed.
    """
    for step, path in sorted(_numbered(output), reverse=True):
        if (path / MANIFEST).exists():
            return _verify(path, step)
        warn(f"{path} is incomplete (no {MANIFEST}) and is now called {set_aside(path).name}")
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


def trained_weights(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """What training changes, without duplicates of tied weights: trained parameters and all saved buffers.

    Of a model in parts, all processes must call this; nothing is made for those that do not `keep` it.
    """
    return {name: tensor.contiguous() for name, tensor in collected(_trained(model), keep).items()}


def _trained(model: nn.Module) -> dict[str, Tensor]:
    saved = model.state_dict().keys()
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return weights | {name: b for name, b in model.named_buffers() if name in saved}


@torch.no_grad()
def restore_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    own = _trained(model)
    if own.keys() != weights.keys():
        raise TrainError(f"{path}: holds other weights than this model has: {sorted(own.keys() ^ weights.keys())[:3]}")
    for name, tensor in weights.items():
        if own[name].shape != tensor.shape:
            raise TrainError(f"{path}: {name} is {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}")
        own[name].copy_(part_of(tensor, own[name]))


def check_identity(
    checkpoint: Checkpoint, identity: dict[str, Any], may_change: Iterable[str], warn: Callable[[str], None]
) -> None:
    """Refuse to go on with other settings, data or model than the run began with."""
    old, new = checkpoint.identity.get(SOFTWARE), identity.get(SOFTWARE)
    if old != new:
        warn(f"resumed with {new} a run that began with {old}: it will not end with the same bits")
    ignored = {SOFTWARE, *may_change}
    changed = {
        name if " " in name else as_flags([name]): (checkpoint.identity.get(name), identity.get(name))
        for name in sorted(checkpoint.identity.keys() | identity.keys())
        if name not in ignored and checkpoint.identity.get(name) != identity.get(name)
    }
    # Options where there are any: a changed --seed changes the data too, and is what the user can see.
    said = [name for name in changed if name.startswith("--")] or list(changed)
    if said:
        differences = ", ".join(f"{name} was {changed[name][0]!r} and is now {changed[name][1]!r}" for name in said)
        raise TrainError(f"{checkpoint.path}: {differences}; resume as the run began")


def _verify(path: Path, step: int) -> Checkpoint:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files, identity = manifest["files"], manifest["identity"]
        version, found_step = manifest["format"], manifest["step"]
        if not isinstance(identity, dict) or files.keys() != {WEIGHTS, STATE}:
            raise ValueError(f"expected the files {WEIGHTS} and {STATE} and an identity, got {str(files)[:80]}")
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    # RecursionError: thousands of brackets.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path / MANIFEST, f"{type(error).__name__}: {error}") from error
    if version != FORMAT or found_step != step:
        raise _damaged(path / MANIFEST, f"format {version!r}, step {found_step!r}")
    for name, (size, checksum) in expected.items():
        try:
            found = _describe(path / name)
        except OSError as error:
            raise _damaged(path / name, error.strerror or str(error)) from error
        if found["bytes"] != size:
            raise _damaged(path / name, f"{found['bytes']} bytes instead of {size}")
        if found["sha256"] != checksum:
            raise _damaged(path / name, "its checksum differs")
    return Checkpoint(path, step, identity)


@contextmanager
def reading(checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    """Its state; whatever goes wrong with what is in it is a damaged checkpoint."""
    try:
        yield checkpoint.state()
    except TrainError:
        raise
    # A structure of other keys, types or lengths raises many types, in torch too.
    except Exception as error:
        raise _damaged(checkpoint.path / STATE, f"{type(error).__name__}: {error}") from error


def _damaged(file: Path, reason: str) -> TrainError:
    return TrainError(f"{file}: damaged checkpoint ({reason}); remove {file.parent} to resume from the one before")


def _numbered(output: Path) -> list[tuple[int, Path]]:
    if not output.is_dir():
        return []
    return [(int(m[1]), p) for p in output.iterdir() if (m := _NAME.fullmatch(p.name))]


def _describe(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}
