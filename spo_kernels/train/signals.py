"""SIGINT, SIGTERM and SIGHUP: the first one ends the run at a good moment, the second at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch

BEFORE_THE_FIRST_STEP = (
    "stopped before the first step of this run; the same command starts it again (with --resume once its folder exists)"
)
NAMES = tuple(name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(BaseException):
    """A signal has ended the run.

    Attributes:
        exit_code: 128 + the signal's number, as shells have it.
    """

    def __init__(self, number: int, state: str) -> None:
        super().__init__(f"{signal.Signals(number).name}: {state}" if state else "")
        self.exit_code = 128 + number


class StopSignals:
    """Between `with` and its end, a signal raises Stopped; inside `finish_first` it is noted in `received`, and
    whoever does the work looks there. A signal that is ignored, as SIGHUP under nohup, stays so.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.finish_first = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in NAMES):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            _say(f"{name}: left at once; the newest checkpoint is whole")
            os._exit(128 + number)
        self.received = number
        if not self.finish_first:
            raise Stopped(number, BEFORE_THE_FIRST_STEP)
        _say(f"{name}: finishing the step and saving; a second signal leaves at once")

    def agreed(self, accelerator: Any) -> int | None:
        """A signal that any process got: all must leave at the same step. A collective where there are several."""
        if accelerator.num_processes == 1:
            return self.received
        mine = torch.tensor([self.received or 0], device=accelerator.device)
        return int(accelerator.gather(mine).max()) or None


def _leave_children_alone() -> None:
    """A worker that encodes data is ended by SIGTERM, at once: a handler in Python would wait as long as it waits."""
    for number in (getattr(signal, name) for name in NAMES):
        if isinstance(getattr(signal.getsignal(number), "__self__", None), StopSignals):
            signal.signal(number, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_children_alone)


def _say(message: str) -> None:
    # Not print: the signal may have come in the middle of one.
    os.write(2, f"\nspo-train: {message}\n".encode())
