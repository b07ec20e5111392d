"""Time and memory of a step, in this process."""

from __future__ import annotations

import ctypes
import gc
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Memory:
    """Bytes. `extra`: peak over what was resident before the step; `process`: peak of the process's whole life."""

    extra: int
    before: int
    process: int
    method: str  # "reset", or "lifetime" where the kernel's peak can't be reset: `extra` is then an upper bound


def status_bytes(field: str) -> int:
    """A `Vm...` line of /proc/self/status, in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"{STATUS} has no {field}")


def peak_bytes() -> int:
    """Peak RSS of this process since it began, or since `reset_peak`.

    VmHWM, not getrusage, where there is a choice: ru_maxrss survives exec, so a worker would start with its
    parent's peak. Linux counts it in kilobytes.
    """
    try:
        return status_bytes("VmHWM")
    except OSError:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak() -> bool:
    """Set the kernel's VmHWM back to the present RSS; False where that is not possible."""
    try:
        CLEAR_REFS.write_text("5")
        return status_bytes("VmHWM") - status_bytes("VmRSS") < (8 << 20)
    except (OSError, ValueError):
        return False


def release_freed_memory() -> None:
    """Hand freed heap pages back, so that a later peak can't hide in them."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_of(run: Callable[[], object], clear: Callable[[], None]) -> Memory:
    """Peak memory of one `run()`, after a warm-up run that the caller has made."""
    clear()
    release_freed_memory()
    until_now = peak_bytes()
    method = "reset" if reset_peak() else "lifetime"
    before = resident_bytes()
    run()
    peak = peak_bytes()
    clear()
    return Memory(max(0, peak - before), before, max(until_now, peak), method)


def resident_bytes() -> int:
    """Present RSS, or the peak where /proc is missing."""
    try:
        return status_bytes("VmRSS")
    except OSError:
        return peak_bytes()


def timed(run: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def samples(
    run: Callable[[], object], clear: Callable[[], None], product: Callable[[], object], repeats: int
) -> list[tuple[float, float]]:
    """(milliseconds of the step, of one bare product beside it), `repeats` times.

    The product runs before and after each step, and the mean of the two is what the step is divided by: both
    then see the same load of a shared machine.
    """
    steps, bare = [], [timed(product)]
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            clear()
            steps.append(timed(run))
            bare.append(timed(product))
    finally:
        gc.enable()
        clear()
    return [(step, (bare[i] + bare[i + 1]) / 2) for i, step in enumerate(steps)]
