"""A model folder's safetensors files, read and written piece by piece.

The format: 8 bytes, the header's length, little-endian; the header, JSON, `{name: {dtype, shape, data_offsets}}`; the
tensors' bytes. `safetensors.save_file` wants all tensors of a file in memory at once, which is what this avoids.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from spo_kernels.train.errors import TrainError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are."""

    path: Path
    dtype: str
    shape: list[int]
    start: int
    stop: int


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file: its header as it is, and its tensors in the order of their bytes."""

    name: str
    header: bytes
    names: list[str]


class WeightFiles:
    """The weights of a model folder.

    Attributes:
        folder: The folder.
        files: Its weight files.
        tensors: Every tensor by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self.files = [self._read(folder / name) for name in self._names()]

    def _names(self) -> list[str]:
        if (self.folder / SINGLE).exists():
            return [SINGLE]
        index = self.folder / INDEX
        if not index.exists():
            raise TrainError(f"{self.folder}: no {SINGLE} and no {INDEX} in it")
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            names = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise TrainError(f"{index}: not an index of weights: {error}") from error
        # a name with a folder in it would be read, and written, elsewhere
        for name in names:
            if Path(name).name != name:
                raise TrainError(f"{index}: {name!r} is not the name of a file in this folder")
        return names

    def _read(self, path: Path) -> WeightFile:
        try:
            # the library checks that header, offsets and size agree
            with safe_open(path, framework="pt"):
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = file.read(length)
        except (OSError, SafetensorError) as error:
            raise TrainError(f"{path}: not a readable safetensors file: {error}") from error
        entries: dict[str, Any] = json.loads(header)
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            if name in self.tensors:
                raise TrainError(f"{path}: {name} is in {self.tensors[name].path.name} too")
            self.tensors[name] = StoredTensor(path, entry["dtype"], entry["shape"], start, stop)
        return WeightFile(path.name, header, sorted(entries, key=lambda n: self.tensors[n].start))

    def chunks(self, name: str, size: int) -> Iterator[bytearray]:
        """A tensor's bytes, `size` (a multiple of 8) at a time; the last piece may be shorter."""
        tensor = self.tensors[name]
        with tensor.path.open("rb") as file:
            file.seek(tensor.start)
            left = tensor.stop - tensor.start
            while left:
                piece = bytearray(min(size, left))
                if file.readinto(piece) != len(piece):
                    raise TrainError(f"{tensor.path}: ends in the middle of {name}")
                left -= len(piece)
                yield piece

    def copy_index(self, folder: Path) -> None:
        """The index of shards, where there is one: files written with the same headers have the same."""
        if self.files[0].name != SINGLE:
            shutil.copyfile(self.folder / INDEX, folder / INDEX)


class WeightWriter:
    """Writes a safetensors file with the header of another: the bytes of its tensors, in that file's order."""

    def __init__(self, path: Path, like: WeightFile) -> None:
        self._file = path.open("wb")
        self._file.write(len(like.header).to_bytes(8, "little") + like.header)

    def write(self, data: Any) -> None:
        """The next bytes."""
        self._file.write(data)

    def __enter__(self) -> WeightWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
