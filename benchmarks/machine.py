"""The machine line: figures mean nothing without it."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .launch import ROOT

PACKAGES = ("torch", "trl", "liger_kernel", "cut-cross-entropy", "triton", "transformers", "spo-kernels")


def describe_machine(threads: int) -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "memory_gib": round(memory_bytes("MemTotal") / 2**30, 1),
        "load_1min": load(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
    }


def machine_line(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number or 'absent'}" for name, number in facts["versions"].items())
    return (
        f"machine: {facts['cpu']} ({facts['capability']}), {facts['cores']} cores, {facts['threads']} threads, "
        f"{facts['memory_gib']} GiB, load {facts['load_1min']}, {facts['system']}\n"
        f"versions: python {facts['python']}, {versions}\n"
        f"commit: {facts['commit']}"
    )


def cpu_model() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    if "model name" not in named:
        return platform.machine()
    # Virtual machines often hide the model's number: family and model identify it.
    return f"{named['model name']} family {named.get('cpu family', '?')} model {named.get('model', '?')}"


def memory_bytes(field: str) -> int:
    """A line of /proc/meminfo in bytes, 0 where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":")), 0)


def load() -> float:
    return round(os.getloadavg()[0], 2)


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Short hash of HEAD, with "dirty" where tracked or new files differ from it."""
    try:
        head = git("rev-parse", "--short", "HEAD")
        dirty = git("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return head + (" (dirty)" if dirty else "")


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
