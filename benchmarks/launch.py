"""Start worker processes, one at a time, and collect what they found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .settings import Job

ROOT = Path(__file__).resolve().parents[1]


def launch(job: Job, timeout: float) -> dict[str, Any]:
    """Run one job in a fresh process. A process that dies or hangs gives a failed result, not an exception."""
    with tempfile.TemporaryDirectory(prefix="spo-bench-") as folder:
        job_path, result_path = Path(folder) / "job.json", Path(folder) / "result.json"
        job.save(job_path)
        command = [sys.executable, "-m", "benchmarks.worker", str(job_path), str(result_path)]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=thread_environment(job.setting.threads),
                timeout=timeout,
                capture_output=True,
                text=True,
            )
            death = None if done.returncode == 0 else describe_exit(done.returncode, done.stderr)
        except subprocess.TimeoutExpired:
            death = f"no result within {timeout:g} s"
        empty = {"variant": job.variant, "status": "failed", "reason": "left no result"}
        result: dict[str, Any] = json.loads(result_path.read_text()) if result_path.exists() else empty
    if death is not None:
        result["status"], result["reason"] = "failed", death
    return result


def thread_environment(threads: int) -> dict[str, str]:
    """The worker's environment: the thread count also reaches libraries that read it before torch does."""
    env = dict(os.environ)
    if threads:
        env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(threads)
    return env


def describe_exit(code: int, stderr: str) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = stderr.strip().splitlines()
    return f"exit code {code}: {lines[-1][:160] if lines else ''}"
