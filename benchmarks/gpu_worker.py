"""One provider's process: every shape and phase, one JSON line each as soon as it is known."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .gpu_measure import Stopwatch, errors, make_problem, peak_bytes, sample
from .gpu_providers import FLOOR_KINDS, BareProducts, all_providers
from .gpu_settings import FLOORS, PHASES, TILES, GpuJob, key
from .inputs import Problem
from .settings import Setting
from .variant import Skip, Step

Row = dict[str, Any]


def work(job: GpuJob) -> Iterator[Row]:
    """Rows of all shapes; a failure costs its own rows only."""
    until = time.monotonic() + job.seconds
    measure = floor_rows if job.provider == "floor" else provider_rows
    for setting in job.shapes:
        shape = {"provider": job.provider, "shape": key(setting)}
        if time.monotonic() > until:
            yield shape | {"phase": "all", "status": "skipped", "reason": f"over its {job.seconds:.0f} s"}
            continue
        try:
            for row in measure(job, setting, until):
                yield shape | row
        except Skip as skip:
            yield shape | {"phase": "all", "status": "skipped", "reason": str(skip)}
        except ImportError as error:
            yield shape | {"phase": "all", "status": "skipped", "reason": f"not installed: {error}"}
        except torch.OutOfMemoryError:
            yield shape | {"phase": "all", "status": "out of memory", "reason": "allocating its inputs"}
        except Exception as error:
            yield shape | {"phase": "all", "status": "failed", "reason": first_line(error)}
        release()


def floor_rows(job: GpuJob, setting: Setting, until: float) -> Iterator[Row]:
    """The bare products: the fastest tile for the logits, then 1 to 4 of them in that tile."""
    device = torch.device(job.device)
    problem = make_problem(setting, device)
    clock = Stopwatch(device)
    times = {}
    for tile in TILES:
        try:
            bare = BareProducts(problem, tile, gradients=False)
        except torch.OutOfMemoryError:
            continue
        bare.run("l")
        times[tile] = min(clock(lambda bare=bare: bare.run("l")) for _ in range(5))
        del bare
    best = min(times, key=times.__getitem__)
    bare = BareProducts(problem, best)
    flops = 2.0 * setting.rows * setting.hidden * setting.vocab
    for phase, counts in FLOORS.items():
        for count in counts:
            kinds = FLOOR_KINDS[count]
            bare.run(kinds)
            found = sample(
                lambda kinds=kinds: bare.run(kinds),
                lambda: bare.run("l"),
                lambda: None,
                clock,
                repeats=job.repeats,
                seconds=job.sample_seconds,
            ).summary()
            row = {"provider": f"floor-{count}", "phase": phase, "status": "ok", "tile": best, **found}
            yield row | {"tflops": count * flops / found["ms"] / 1e9}


def provider_rows(job: GpuJob, setting: Setting, until: float) -> Iterator[Row]:
    """Forward, then forward and backward with a frozen and a trained head."""
    device = torch.device(job.device)
    variant = all_providers(dry=job.device == "cpu")[job.provider]
    problem = make_problem(setting, device)
    bare = BareProducts(problem, job.tiles.get(key(setting), TILES[0]), gradients=False)
    clock = Stopwatch(device)
    for phase in PHASES:
        if time.monotonic() > until:
            yield {"phase": phase, "status": "skipped", "reason": f"over its {job.seconds:.0f} s"}
            continue
        problem.weight.requires_grad_(phase == "trained")
        step: Step | None = None
        try:
            step = variant.build(problem)
            run = step.tokens if phase == "forward" else step.run
            if run is None:
                yield {"phase": phase, "status": "skipped", "reason": "it has no forward without gradients"}
                continue
            yield {"phase": phase, **measured(run, step, problem, bare, clock, job, phase)}
        except torch.OutOfMemoryError as error:
            yield {"phase": phase, "status": "out of memory", "reason": first_line(error)}
        step = None
        problem.clear()
        release()


def measured(
    run: Callable[[], object],
    step: Step,
    problem: Problem,
    bare: BareProducts,
    clock: Stopwatch,
    job: GpuJob,
    phase: str,
) -> Row:
    device = torch.device(job.device)
    start = time.monotonic()
    run()  # compiles
    if device.type == "cuda":
        torch.cuda.synchronize()
    first = time.monotonic() - start
    problem.clear()
    run()
    # a graph's memory was allocated when it was captured
    extra = None if job.provider.endswith("-graph") else peak_bytes(run, problem.clear, device)
    timing = sample(
        run,
        lambda: bare.run("l"),
        problem.clear,
        clock,
        repeats=job.repeats,
        seconds=job.sample_seconds,
    )
    row: Row = {"status": "ok", "first_s": first, "extra_bytes": extra, **timing.summary()}
    if phase == "trained":
        row["errors"] = errors(problem, step)
    return row


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def main() -> None:
    job = GpuJob.load(Path(sys.argv[1]))
    with Path(sys.argv[2]).open("a") as out:
        for row in work(job):
            out.write(json.dumps(row) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
