"""One variant in one process: `python -m benchmarks.worker JOB.json RESULT.json`.

The result file is rewritten after each phase, so that a process that is killed later still leaves what it found.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import inputs
from .floor import Products, calibrate, fastest
from .inputs import Problem
from .measure import peak_of, release_freed_memory, resident_bytes, samples, timed
from .oracle import Oracle, errors
from .providers import find
from .settings import Job
from .variant import Skip, Step


def work(job: Job, path: Path) -> dict[str, Any]:
    """Run the job's phases; never raises for what the variant does. Returns what was written to `path`."""
    result: dict[str, Any] = {"variant": job.variant, "status": "failed", "reason": "died before its first step"}
    write(result, path)
    try:
        problem = prepare(job)
        step = find(job.variant, job.setting, job.layouts).build(problem)
        for phase in run_phases(job, problem, step, result):
            result["phase"] = phase
            write(result, path)
        result["status"], result["reason"] = "ok", None
    except (Skip, ImportError) as error:
        result["status"], result["reason"] = "skipped", str(error) or type(error).__name__
    except Exception as error:
        result["reason"] = first_line(error)
        result["traceback"] = traceback.format_exc()
    write(result, path)
    return result


def prepare(job: Job) -> Problem:
    if job.setting.threads:
        torch.set_num_threads(job.setting.threads)
    problem = inputs.load(job.setting, Path(job.inputs)) if job.inputs else inputs.random_problem(job.setting)
    problem.workspace_bytes = job.workspace_bytes
    return problem


def run_phases(job: Job, problem: Problem, step: Step, result: dict[str, Any]) -> Iterator[str]:
    """Generator: yields the name of each phase once its figures stand in `result`."""
    release_freed_memory()
    before = resident_bytes()
    losses: list[Tensor | None] = []
    result["first_ms"] = timed(lambda: losses.append(step.run()))
    result["loss"] = None if losses[0] is None else float(losses[0])
    for _ in range(job.warmups - 1):
        step.run()
    problem.clear()
    release_freed_memory()
    # Memory that the variant keeps between calls (caches, compiled code): the peak below does not contain it.
    result["kept_bytes"] = resident_bytes() - before
    yield "warmup"
    if "memory" in job.phases:
        result["memory"] = asdict(peak_of(step.run, problem.clear))
        yield "memory"
    if "time" in job.phases:
        layouts = job.layouts or fastest(calibrate(problem, repeats=1))
        product = Products(problem, layouts, ("logits",))
        product.run("logits")
        found = samples(step.run, problem.clear, product.logits, job.repeats)
        result["ms"], result["product_ms"] = [list(column) for column in zip(*found, strict=True)]
        del product
        yield "time"
    if "accuracy" in job.phases and job.oracle:
        result["errors"] = errors(problem, step, Oracle.load(Path(job.oracle)))
        yield "accuracy"


def first_line(error: BaseException) -> str:
    """What the table says about a failure."""
    refused = re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", str(error))
    if refused:
        return f"out of memory: an allocation of {int(refused[1]) / 2**20:.0f} MiB was refused"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def write(result: dict[str, Any], path: Path) -> None:
    """Replace the file in one move: the parent never reads half a result."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(result))
    os.replace(draft, path)


def main() -> None:
    job = Job.load(Path(sys.argv[1]))
    if job.limit_bytes:
        # Private writable memory: a variant that needs more gets an allocation error, and the machine survives.
        resource.setrlimit(resource.RLIMIT_DATA, (job.limit_bytes, job.limit_bytes))
    result = work(job, Path(sys.argv[2]))
    if "traceback" in result:
        print(result["traceback"], file=sys.stderr)


if __name__ == "__main__":
    main()
