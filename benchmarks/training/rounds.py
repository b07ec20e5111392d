"""Every trainer in its own process, a step each in turn; then the figures of a row."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from ..answers import Answer, Worker, WorkerDied
from ..launch import ROOT, thread_environment
from ..rounds import say
from .phases import PHASES
from .providers import PROVIDERS, name_of
from .settings import Job

MIB = 2**20
BASE = "trl"
Row = dict[str, Any]


@dataclass
class Runner:
    """A worker and what it has answered so far."""

    job: Job
    folder: Path
    timeout: float

    def __post_init__(self) -> None:
        path = self.folder / f"{Path(self.job.output).name}.json"
        self.log = path.with_suffix(".log")
        self.job.save(path)
        command = [sys.executable, "-m", "benchmarks.training.worker", str(path)]
        environment = thread_environment(self.job.threads) | {
            "HF_HOME": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"
        }  # fmt: skip
        with self.log.open("w") as log:
            self.worker = Worker(self.job.provider, command, ROOT, environment, stderr=log)
        self.steps: list[Answer] = []
        self.losses: list[float] = []
        self.status: str | None = None
        self.reason: str | None = None

    def ask(self, do: str) -> Answer:
        """The answer; where the worker fails instead, this runner has its status and is closed."""
        if self.status is not None:
            return {}
        try:
            found = self.worker.ask(do, timeout=self.timeout)
        except WorkerDied as died:
            found = {"status": "failed", "reason": f"{died}: {last_line(self.log)}"}
        if "status" in found:
            self.status, self.reason = found["status"], found["reason"]
            self.worker.close()
            say(f"{self.job.provider}: {self.status}: {self.reason}")
        return found

    def step(self) -> None:
        found = self.ask("step")
        if self.status is None:
            self.steps.append(found)

    def end(self) -> None:
        self.losses = self.ask("end").get("losses", [])
        self.worker.close()


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:160] if lines else ""


def measure(jobs: list[Job], folder: Path, timeout: float) -> list[Runner]:
    """Warm-ups one after the other, then rounds of one step each, in alternating direction."""
    runners: list[Runner] = []
    try:
        for job in jobs:
            runners.append(Runner(job, folder, timeout))
            runners[-1].ask("start")
        for turn in range(jobs[0].steps):
            for runner in runners if turn % 2 == 0 else reversed(runners):
                runner.step()
            seconds = {
                name_of(r.job.provider, r.job.layout): round(r.steps[turn]["seconds"], 2)
                for r in runners
                if len(r.steps) > turn
            }
            say(f"step {turn + 1}/{jobs[0].steps}, seconds: {seconds}")
        for runner in runners:
            runner.end()
    finally:
        for runner in runners:
            runner.worker.close()
    return runners


def measure_floor(job: Job, folder: Path, timeout: float) -> int | None:
    """Bytes that are resident before a batch; None where the provider does not run."""
    runner = Runner(job, folder, timeout)
    try:
        return runner.ask("floor").get("resident")
    finally:
        runner.worker.close()


def floors(jobs: list[Job], folder: Path, timeout: float) -> dict[tuple[str, str], int | None]:
    """By (provider with these imports, tuning)."""
    found: dict[tuple[str, str], int | None] = {}
    for job in jobs:
        key = (PROVIDERS[job.provider].floor, job.tuning)
        if key not in found:
            output = str(folder / f"floor-{'-'.join(key)}")
            found[key] = measure_floor(replace(job, provider=key[0], output=output), folder, timeout)
    return found


def rows_of(
    data: str, runners: list[Runner], tokens: list[int], floors: dict[tuple[str, str], int | None]
) -> list[Row]:
    """A row each; ratios to TRL are medians over the steps, each divided by TRL's of the same batch."""
    rows = [row_of(data, runner, tokens, floors) for runner in runners]
    base = next((row for row in rows if row["provider"] == BASE and row["status"] == "ok"), None)
    for row in rows:
        if base is None or row["status"] != "ok":
            continue
        row["speed_ratio"] = median(a / b for a, b in zip(base["seconds"], row["seconds"], strict=True))
        row["memory_ratio"] = row["above_floor_mib"] / base["above_floor_mib"]
        row["loss_difference"] = max(abs(a - b) for a, b in zip(base["losses"], row["losses"], strict=True))
    return rows


def row_of(data: str, runner: Runner, tokens: list[int], floors: dict[tuple[str, str], int | None]) -> Row:
    job = runner.job
    row: Row = {"data": data, "tuning": job.tuning, "provider": job.provider, "layout": job.layout}
    row |= {"status": runner.status or "ok", "reason": runner.reason}
    if row["status"] != "ok":
        return row
    timed = tokens[job.warmups :]
    seconds = [step["seconds"] for step in runner.steps]
    peak = max(step["peak"] for step in runner.steps)
    floor = floors[PROVIDERS[job.provider].floor, job.tuning] or 0
    return row | {
        "seconds": seconds,
        "phases": {name: median(step["phases"][name] for step in runner.steps) for name in PHASES},
        "tokens": timed,
        "losses": runner.losses,
        "tokens_per_second": median(count / each for count, each in zip(timed, seconds, strict=True)),
        "pairs_per_second": median(job.batch / each for each in seconds),
        "peak_mib": peak / MIB,
        "floor_mib": floor / MIB,
        "above_floor_mib": (peak - floor) / MIB,
        "memory_method": runner.steps[0]["method"],
    }
