"""A file of reference log-probs, which is never stale: its name and its key are a hash of all that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spo_kernels.train.content import bytes_of
from spo_kernels.train.files import whole, writing

CACHE_FORMAT = 1


def cache_key(**parts: Any) -> str:
    """Of what the numbers depend on."""
    return hashlib.sha256(json.dumps({"format": CACHE_FORMAT, **parts}, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class LogpsFile:
    """The file of a key in a folder; it need not be there."""

    folder: Path
    key: str

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.folder / f"reference-{self.key[:24]}.safetensors"

    def load(self, shape: tuple[int, ...], warn: Callable[[str], None]) -> Tensor | None:
        """Its numbers; None where it is not there, or damaged, of which is warned."""
        path = self.path
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata, logps = file.metadata() or {}, file.get_tensor("logps").clone()
        except (OSError, SafetensorError) as error:
            warn(f"{path}: damaged cache of reference log-probs ({error}); computing them again")
            return None
        intact = metadata.get("sha256") == _checksum(logps)
        if metadata.get("key") != self.key or tuple(logps.shape) != shape or not intact:
            warn(f"{path}: damaged cache of reference log-probs (checksum differs); computing them again")
            return None
        return logps

    def save(self, logps: Tensor) -> None:
        """Write it, with its folder."""
        metadata = {"key": self.key, "sha256": _checksum(logps)}
        with writing(f"reference log-probs: {self.path}"):
            self.folder.mkdir(parents=True, exist_ok=True)
        with whole(self.path) as temporary:
            save_file({"logps": logps.contiguous()}, temporary, metadata=metadata)


def _checksum(logps: Tensor) -> str:
    return hashlib.sha256(bytes_of(logps)).hexdigest()
