"""Time and memory of the loss against the eager path with full logits, each in a process of its own.

The shape is a real head's, not the demo model's: at a vocabulary of 512 there is nothing to save. The measuring is
that of `benchmarks`, whose `python -m benchmarks.run` compares many more alternatives, more carefully.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.launch import launch
from benchmarks.settings import Job, Setting
from benchmarks.table import summarize
from spo_kernels import backend_info

EAGER = "naive"
# Tiles of the bare product that `benchmarks` times beside each step: given here, so that it need not search.
LAYOUTS = {kind: (0, 4096) for kind in ("logits", "dH", "dW")}
TIMEOUT = 120.0  # seconds per process


class MeasuringFailed(Exception):
    """A measuring process died or could not run."""


@dataclass(frozen=True)
class Cost:
    """One forward and backward of the loss."""

    milliseconds: float
    mebibytes: float  # peak beyond inputs and gradients


def fused_variant() -> str:
    """The library's own CPU backend, or its torch backend where the extension was not built."""
    return "ours-cpp" if backend_info()["cpp"].available else "ours-torch"


def measure(setting: Setting, variant: str) -> Cost:
    """Memory of one step after a warm-up, and the median time of five."""
    result = launch(Job(setting, variant, phases=("memory", "time"), layouts=LAYOUTS), TIMEOUT)
    if result["status"] != "ok":
        raise MeasuringFailed(f"measuring {variant} {result['status']}: {result['reason']}")
    row = summarize(setting, variant, "", [result])
    return Cost(row["ms"], max(0.0, row["beyond_gradients_mib"]))


def compare(setting: Setting) -> tuple[Cost, Cost]:
    """Costs of the eager and of the fused loss."""
    return measure(setting, EAGER), measure(setting, fused_variant())


def describe(setting: Setting, eager: Cost, fused: Cost) -> str:
    """The two costs as a small table."""
    lines = [f"The loss alone, forward and backward: {setting.describe()}", f"{'':<24}{'ms':>8}{'MiB':>8}"]
    for name, cost in (("eager, full logits", eager), (f"fused ({fused_variant()[5:]} backend)", fused)):
        lines.append(f"{name:<24}{cost.milliseconds:>8.0f}{cost.mebibytes:>8.0f}")
    faster = eager.milliseconds / fused.milliseconds
    smaller = eager.mebibytes / max(fused.mebibytes, 1.0)
    lines.append(f"{'eager / fused':<24}{faster:>7.2f}x{smaller:>7.1f}x")
    lines.append("MiB: peak beyond inputs and gradients")
    return "\n".join(lines)
