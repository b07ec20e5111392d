"""What fails in one process fails in all: the others would wait for it at the next collective until they are killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import gather_object
from torch.distributed import DistError

from spo_kernels.data.errors import DataError
from spo_kernels.train.errors import TrainError


@contextmanager
def together(accelerator: Any) -> Iterator[None]:
    """No process leaves this before all have ended what is inside, which must wait for no other process.

    Raises:
        TrainError, DataError: of the first process that failed, in all; only that one has something to say.
    """
    failure: Exception | None = None
    try:
        yield
    except (TrainError, DataError) as error:
        failure = error
    failed = gather_object([failure and type(failure)])
    first = next((rank for rank, kind in enumerate(failed) if kind is not None), None)
    if first is not None:
        raise failure if failure and first == accelerator.process_index else failed[first]("")


@contextmanager
def lost_processes_said(what_then: str) -> Iterator[None]:
    """A collective that fails since another process is gone ends the run with a sentence.

    Raises:
        TrainError: In each process that is left.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo has no type of its own
        if not isinstance(error, DistError) and "gloo/" not in str(error):
            raise
        raise TrainError(f"another process of this run has ended or cannot be reached; {what_then}") from error
