"""The run's folder: held by a lock while the run lasts, and what is left in it at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from spo_kernels.train.checkpoint import WEIGHTS, Checkpoint, newest_checkpoint, trained_weights
from spo_kernels.train.config import TrainConfig
from spo_kernels.train.dropout import saved_configuration
from spo_kernels.train.errors import StorageError, TrainError
from spo_kernels.train.files import sweep, whole, whole_files
from spo_kernels.train.together import together

# one of them is there once a run has ended
MODELS = ("config.json", "adapter_config.json")
CACHE_FOLDER, LOCK, SETTINGS = "reference-cache", ".lock", "args.json"


@contextmanager
def claimed(
    config: TrainConfig, accelerator: Any, warn: Callable[[str], None]
) -> Iterator[tuple[Path, Checkpoint | None]]:
    """The output folder, for this run alone, and what to go on with in it. The main process looks, for all."""
    output = Path(config.output_dir).expanduser()
    lock = FileLock(output / LOCK, timeout=0)
    checkpoint: Checkpoint | None = None
    try:
        with together(accelerator):
            if accelerator.is_main_process:
                checkpoint = _claim(output, lock, config.resume, warn)
        yield output, broadcast_object_list([checkpoint])[0]
    finally:
        lock.release()


def _claim(output: Path, lock: FileLock, resume: bool, warn: Callable[[str], None]) -> Checkpoint | None:
    if os.path.lexists(output) and not output.is_dir():
        raise TrainError(f"--output-dir {output} is not a folder")
    # Before the lock, which puts a file there, and again under it.
    if not (output / LOCK).exists():
        _check_use(output, resume)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise TrainError(f"--output-dir {output} is in use by another run, which holds {output / LOCK}") from error
    except (OSError, NotImplementedError) as error:
        raise StorageError(f"--output-dir {output} can't be used: {error}") from error
    _check_use(output, resume)
    sweep(output)
    sweep(output / CACHE_FOLDER)
    checkpoint = newest_checkpoint(output, warn) if resume else None
    if resume and checkpoint is None:
        if any((output / name).exists() for name in MODELS):
            raise TrainError(
                f"--resume: {output} holds the model of a run that has ended, and no checkpoint to go on from "
                f"(--save-steps 0); --model {output} trains on from it, in another folder"
            )
        warn(f"{output} holds no complete checkpoint yet: starting again from step 0")
    return checkpoint


def _check_use(output: Path, resume: bool) -> None:
    """Refuse to mix two runs."""
    if resume and not (output / SETTINGS).exists():
        raise TrainError(f"--resume: {output} holds no run")
    used = output.is_dir() and any(p.name not in (CACHE_FOLDER, LOCK) for p in output.iterdir())
    if used and not resume:
        raise TrainError(f"--output-dir {output} is not empty; give another, or --resume to go on with that run")


def warn_of_space(model: Any, output: Path, warn: Callable[[str], None]) -> None:
    """Before hours of training, not after."""
    needed = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    free = shutil.disk_usage(output).free
    if free < needed:
        warn(f"{output}: {free / 1e6:.0f} MB are free, and the trained model alone takes {needed / 1e6:.0f} MB")


def save_model(model: Any, tokenizer: Any, output: Path, weights: dict[str, Tensor] | None = None) -> None:
    """All files of the trained model or, with a StorageError, none; `weights` are those of a model in parts."""
    try:
        with whole_files(output, "final") as temporary:
            _write_model(model, tokenizer, temporary, weights)
    except StorageError:
        raise
    # Whatever a quantised model's own code or the tokenizer raise: training must not be lost for it.
    except Exception as error:
        raise StorageError(f"{output}: the trained model can't be saved ({type(error).__name__}: {error})") from error


def _write_model(model: Any, tokenizer: Any, folder: Path, weights: dict[str, Tensor] | None) -> None:
    model.config.use_cache = True
    with saved_configuration(model):
        model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def rescue(model: Any, tokenizer: Any, output: Path, step: int, weights: dict[str, Tensor] | None = None) -> str:
    """Keep the training of a run whose output folder can't be written any more; where, as a sentence."""
    kept = output / f"checkpoint-{step}"
    if (kept / WEIGHTS).exists():
        return f"{kept} holds the whole training: once that is mended, the same command with --resume saves the model"
    ways = (("model", _write_model), ("trained weights", _write_weights))
    for place in (output, Path(tempfile.gettempdir())):
        for what, write in ways:
            folder = place / f"rescued-{output.name}-{os.getpid()}"
            with suppress(Exception):
                with whole(folder, folder=True) as temporary:
                    write(model, tokenizer, temporary, weights)
                return f"step {step} is kept in {folder} ({what})"
    return f"nothing after the newest checkpoint could be kept, not even in {tempfile.gettempdir()}"


def _write_weights(model: Any, tokenizer: Any, folder: Path, weights: dict[str, Tensor] | None) -> None:
    save_file(trained_weights(model) if weights is None else weights, folder / WEIGHTS)
