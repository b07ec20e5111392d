"""Time and memory of the loss against the eager path with full logits, as `python -m benchmarks.run` measures them.

The shape is a real head's, not the demo model's: at a vocabulary of 512 there is nothing to save. The same command
with fewer options compares many more alternatives, more carefully.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo_kernels import backend_info

ROOT = Path(__file__).resolve().parents[2]
EAGER = "naive"
PAIRS, WIDTH = 2, 512
# A tile of the bare product that is timed beside each step: given here, so that the command need not search.
ONCE = ["--rounds", "1", "--repeats", "5", "--no-accuracy", "--floor-tile", "0x4096", "--timeout", "120"]


class MeasuringFailed(Exception):
    """A measuring process died or could not run."""


@dataclass(frozen=True)
class Cost:
    """One forward and backward of the loss."""

    milliseconds: float
    mebibytes: float  # peak beyond inputs and gradients


@dataclass(frozen=True)
class Costs:
    """The eager and the fused loss at one shape."""

    eager: Cost
    fused: Cost
    backend: str
    shape: str

    def describe(self) -> str:
        """The two costs as a small table."""
        lines = [f"The loss alone, forward and backward: {self.shape}", f"{'':<24}{'ms':>8}{'MiB':>8}"]
        for name, cost in (("eager, full logits", self.eager), (f"fused ({self.backend} backend)", self.fused)):
            lines.append(f"{name:<24}{cost.milliseconds:>8.0f}{cost.mebibytes:>8.0f}")
        faster = self.eager.milliseconds / self.fused.milliseconds
        smaller = self.eager.mebibytes / max(self.fused.mebibytes, 1.0)
        lines.append(f"{'eager / fused':<24}{faster:>7.2f}x{smaller:>7.1f}x")
        lines.append("MiB: peak beyond inputs and gradients")
        return "\n".join(lines)


def measure(*, tokens: int, vocab: int, threads: int) -> Costs:
    """Memory of one step after a warm-up, and the median time of five, each loss in a process of its own.

    Raises:
        MeasuringFailed: One of them did not run.
    """
    # the library's own CPU backend, or its torch backend where the extension was not built
    backend = "cpp" if backend_info()["cpp"].available else "torch"
    shape = {"pairs": PAIRS, "tokens": tokens, "hidden": WIDTH, "vocab": vocab, "threads": threads}
    options = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    rows = run_benchmark([*options, *ONCE, "--variants", f"{EAGER},ours-{backend}"])
    return Costs(
        eager=cost_of(rows[EAGER]),
        fused=cost_of(rows[f"ours-{backend}"]),
        backend=backend,
        shape=f"{PAIRS} pairs x 2 x {tokens} tokens, H={WIDTH}, V={vocab}, float32, DPO",
    )


def run_benchmark(options: list[str]) -> dict[str, dict[str, Any]]:
    """The rows of `python -m benchmarks.run` by variant."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "benchmarks.run", *options, "--json", str(report)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode or not report.exists():
            last = (done.stderr.strip().splitlines() or [""])[-1]
            raise MeasuringFailed(f"measuring ended with exit code {done.returncode}: {last}")
        return {row["variant"]: row for row in json.loads(report.read_text())["rows"]}


def cost_of(row: dict[str, Any]) -> Cost:
    if row["status"] != "ok":
        raise MeasuringFailed(f"measuring {row['variant']} {row['status']}: {row['reason']}")
    return Cost(row["ms"], max(0.0, row["beyond_gradients_mib"]))
