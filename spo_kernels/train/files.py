"""Files and folders that are either whole or absent, whatever kills the process and however full the disk is.

What is being written has a hidden name with the process in it, `.NAME.PID.tmp`, and what is being removed
`.NAME.PID.old`; `sweep` removes what kills have left of both.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from spo_kernels.train.errors import StorageError

# torch.save reports a full disk as RuntimeError.
FAILURES = (OSError, RuntimeError, SafetensorError)
# The process is missing in names that versions before 0.3 gave.
_LEFTOVER = re.compile(r"\..+\.\d+\.(tmp|old)|\.checkpoint-\d+\.(tmp|old)|\.(final|metrics\.jsonl)\.tmp")


@contextmanager
def writing(what: object, after: str = "") -> Iterator[None]:
    """Turns whatever a failed write raises into a StorageError that begins with `what`."""
    try:
        yield
    except FAILURES as error:
        raise StorageError(f"{what}: can't be written ({str(error) or type(error).__name__}){after}") from error


@contextmanager
def whole(path: Path, folder: bool = False, after: str = "") -> Iterator[Path]:
    """A path beside `path` to write a file or a folder at; at the end it is flushed and becomes `path`.

    A file replaces one that is there, a folder only an empty one. An error leaves nothing behind.

    Raises:
        StorageError: It can't be written; `after` ends the message.
    """
    with _staged(path, folder, after) as temporary:
        yield temporary
        _flush_all(temporary)
        os.replace(temporary, path)
        _flush(path.parent)


@contextmanager
def whole_files(folder: Path, name: str) -> Iterator[Path]:
    """A folder to write in; at the end all in it is flushed and then moves into `folder`, over what is there."""
    with _staged(folder / name, True, "") as temporary:
        yield temporary
        _flush_all(temporary)
        for file in sorted(temporary.iterdir()):
            # A folder, such as a tokenizer's additional_chat_templates, replaces only an empty one.
            if (folder / file.name).is_dir():
                remove(folder / file.name)
            os.replace(file, folder / file.name)
        _flush(folder)


@contextmanager
def _staged(path: Path, folder: bool, after: str) -> Iterator[Path]:
    temporary = _hidden(path, "tmp")
    try:
        with writing(path, after):
            if folder:
                temporary.mkdir()
            yield temporary
    finally:
        _delete(temporary)


def remove(path: Path) -> None:
    """A folder, renamed first: a kill in the middle never leaves a half under the name of a whole."""
    doomed = _hidden(path, "old")
    with writing(path):
        path.rename(doomed)
    _delete(doomed)


def set_aside(path: Path) -> Path:
    """Rename to `NAME.incomplete`, or with a number where that is taken; returns the new name."""
    names = (path.with_name(f"{path.name}.incomplete{n}") for n in ("", *(f"-{i}" for i in range(2, 1000))))
    new = next(name for name in names if not name.exists())
    with writing(path):
        path.rename(new)
    return new


def sweep(folder: Path) -> None:
    """Remove what killed processes have left; only for who holds the folder's lock."""
    if folder.is_dir():
        for path in folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                _delete(path)


def _hidden(path: Path, ending: str) -> Path:
    hidden = path.with_name(f".{path.name}.{os.getpid()}.{ending}")
    _delete(hidden)
    return hidden


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _flush_all(path: Path) -> None:
    for part in [*path.rglob("*"), path]:
        _flush(part)


def _flush(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
