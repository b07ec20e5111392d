"""The rounds: every variant in its own process, in turn, several times over."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import inputs, oracle
from .floor import KINDS, Layout, calibrate, fastest
from .launch import launch
from .machine import describe_machine, load, memory_bytes
from .measure import release_freed_memory
from .providers import all_variants
from .settings import Job, Setting
from .table import add_ratios, summarize

Launch = Callable[[Job, float], dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """How often and how carefully: `rounds` processes per variant, each with `repeats` timed steps."""

    rounds: int = 3
    repeats: int = 5
    accuracy: bool = True
    timeout: float = 900.0  # seconds per process
    limit_bytes: int | None = None
    workspace_bytes: int | None = None
    floor_tile: Layout | None = None  # of every bare product; None: time several, take the fastest


def say(text: str) -> None:
    """Progress goes to stderr: stdout holds the table alone."""
    print(text, file=sys.stderr, flush=True)


def default_limit() -> int | None:
    """Cap on a worker: 80 % of the memory that is available now."""
    available = memory_bytes("MemAvailable")
    return int(0.8 * available) if available else None


def compare(setting: Setting, plan: Plan, names: list[str], start: Launch = launch) -> dict[str, Any]:
    """Measure the named variants. Returns the report that `--json` writes."""
    facts = describe_machine(setting.threads)
    with tempfile.TemporaryDirectory(prefix="spo-bench-") as folder:
        files, truth, tiles, concentration = prepare(setting, plan, Path(folder))
        layouts = dict.fromkeys(KINDS, plan.floor_tile) if plan.floor_tile else fastest(tiles)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for turn in range(plan.rounds):
            # Alternate the direction: no variant always runs after the same neighbour.
            for name in names if turn % 2 == 0 else reversed(names):
                if results[name] and results[name][0]["status"] != "ok":
                    continue
                job = make_job(setting, plan, name, layouts, files, accuracy=plan.accuracy and turn == 0)
                results[name].append(attempt(job, plan, start))
                say(f"round {turn + 1}/{plan.rounds}  {progress(results[name][-1])}")
    abouts = {name: variant.about for name, variant in all_variants(setting, layouts).items()}
    rows = [summarize(setting, name, abouts.get(name, ""), results[name]) for name in names]
    add_ratios(setting, rows)
    facts["load_1min_end"] = load()
    return {
        "setting": vars(setting),
        "plan": vars(plan),
        "machine": facts,
        "floor_tiles_ms": tiles,
        "concentration": concentration,
        "float64_loss": truth,
        "rows": rows,
    }


def prepare(
    setting: Setting, plan: Plan, folder: Path
) -> tuple[dict[str, str], float | None, dict[str, Any], dict[str, float]]:
    """Write the inputs and the float64 truth, and time the floor's tilings unless one is given."""
    if setting.threads:
        torch.set_num_threads(setting.threads)
    say("inputs")
    problem = inputs.peaked_problem(setting)
    inputs.save(problem, folder / "inputs.pt")
    files = {"inputs": str(folder / "inputs.pt")}
    truth = None
    if plan.accuracy:
        say("float64 truth")
        solved = oracle.solve(problem)
        solved.save(folder / "oracle.pt")
        files["oracle"] = str(folder / "oracle.pt")
        truth = solved.loss
        del solved
    tiles = {}
    if plan.floor_tile is None:
        say("tilings of the bare products")
        tiles = calibrate(problem)
    concentration = inputs.concentration(problem)
    # The workers need what this process no longer does.
    del problem
    release_freed_memory()
    return files, truth, tiles, concentration


def make_job(
    setting: Setting, plan: Plan, name: str, layouts: dict[str, Layout], files: dict[str, str], *, accuracy: bool
) -> Job:
    return Job(
        setting,
        name,
        phases=("memory", "time", "accuracy") if accuracy else ("memory", "time"),
        repeats=plan.repeats,
        layouts=layouts,
        inputs=files["inputs"],
        oracle=files.get("oracle"),
        limit_bytes=plan.limit_bytes,
        workspace_bytes=plan.workspace_bytes,
    )


def attempt(job: Job, plan: Plan, start: Launch) -> dict[str, Any]:
    """One process. Whatever goes wrong with one variant, the others still run."""
    try:
        return start(job, plan.timeout)
    except Exception as error:
        return {"variant": job.variant, "status": "failed", "reason": f"{type(error).__name__}: {error}"}


def progress(result: dict[str, Any]) -> str:
    if result["status"] != "ok":
        return f"{result['variant']}: {result['status']}: {result['reason']}"
    parts = [result["variant"] + ":"]
    if "ms" in result:
        parts.append(f"{sorted(result['ms'])[len(result['ms']) // 2]:.0f} ms")
    if "memory" in result:
        parts.append(f"extra {result['memory']['extra'] / 2**20:.0f} MiB")
    return " ".join(parts)
