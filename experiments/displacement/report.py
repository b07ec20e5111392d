"""The table and the figure."""

from __future__ import annotations

import math
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .methods import CONTROL

COLUMNS = {
    "chosen change": "chosen log-prob change (nats)",
    "rejected change": "rejected (nats)",
    "displaced": "pairs whose chosen fell",
    "lost mass": "lost mass (nats)",
    "preferred": "pairs ranked right",
}
SHARES = {"displaced", "preferred"}


def say(text: str, began: float) -> None:
    print(f"[{time.perf_counter() - began:5.0f} s] {text}", flush=True)


def spread(values: list[float]) -> float:
    """Sample standard deviation over seeds; nan for one."""
    return stdev(values) if len(values) > 1 else math.nan


def cell(values: list[float], share: bool) -> str:
    """Mean ± standard deviation over seeds."""
    if not values:
        return ""
    factor, digits = (100, 1) if share else (1, 1)
    middle, width = factor * mean(values), factor * spread(values)
    unit = " %" if share else ""
    return f"{middle:.{digits}f}{unit}" if math.isnan(width) else f"{middle:.{digits}f} ± {width:.{digits}f}{unit}"


def of_method(results: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """Its runs, in order of seeds."""
    return sorted((r for r in results["runs"] if r["method"] == method), key=lambda r: r["seed"])


def methods_of(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(r["method"] for r in results["runs"]))


def markdown(results: dict[str, Any]) -> str:
    """Everything as two tables: the paper's shape, then every run's means."""
    sft, about = [s["accuracy"] for s in results["sft"]], results["about"]
    heads = [
        "objective",
        "SFT",
        "objective alone",
        "with SPO",
        "chosen change, nats",
        "with SPO",
        "chosen fell",
        "with SPO",
    ]
    lines = [f"| {' | '.join(heads)} |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for method in methods_of(results):
        if "+" in method:
            continue
        alone, inside = of_method(results, method), of_method(results, f"{method}+spo")
        if method == CONTROL:
            lines.append(
                f"| SFT on chosen | {cell(sft, True)} | {cell([r['accuracy'] for r in alone], True)} | | | | | |"
            )
            continue
        row = [method, cell(sft, True)]
        row += [cell([r["accuracy"] for r in runs], True) for runs in (alone, inside)]
        for name in ("chosen change", "displaced"):
            row += [cell([r["pairs"][name] for r in runs], name in SHARES) for runs in (alone, inside)]
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", f"| run | accuracy | {' | '.join(COLUMNS.values())} | seconds |", "|---" * (len(COLUMNS) + 3) + "|"]
    for method in methods_of(results):
        runs = of_method(results, method)
        row = [method, cell([r["accuracy"] for r in runs], True)]
        row += [cell([r["pairs"][name] for r in runs if r["pairs"]], name in SHARES) for name in COLUMNS]
        lines.append(f"| {' | '.join(row)} | {mean(r['seconds'] for r in runs):.0f} |")
    lines += [
        "",
        f"Mean ± sample standard deviation over {len(sft)} seeds. Accuracy: greedy, on held-out questions.",
        "The rest: held-out pairs, relative to the SFT model.",
        "",
    ]
    lines += [f"{key}: {about[key]}" for key in ("command", "commit", "machine", "threads", "versions", "minutes")]
    lines += ["", *(f"* `{name}`: `spo-train {options}`" for name, options in about["methods"].items()), ""]
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy and change of the chosen log-prob, per objective, alone and inside SPO."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bases = [m for m in methods_of(results) if "+" not in m and m != CONTROL]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    bars = (("", "alone", -0.2, "#d95f02"), ("+spo", "inside SPO", 0.2, "#1b6ca8"))
    for suffix, label, shift, color in bars:
        for place, base in enumerate(bases):
            runs = of_method(results, base + suffix)
            style = {"color": color, "label": label if place == 0 else None, "width": 0.38, "capsize": 3}
            for axes, values in (
                (left, [100 * r["accuracy"] for r in runs]),
                (right, [r["pairs"]["chosen change"] for r in runs]),
            ):
                error = spread(values)
                axes.bar(place + shift, mean(values), yerr=None if math.isnan(error) else error, **style)
    left.axhline(100 * mean(s["accuracy"] for s in results["sft"]), color="#606060", ls="--", lw=1, label="SFT model")
    control = of_method(results, CONTROL)
    if control:
        left.axhline(100 * mean(r["accuracy"] for r in control), color="#4d9a51", ls=":", lw=1.5, label="SFT on chosen")
    right.axhline(0, color="#606060", lw=1)
    left.set(title="Greedy accuracy on held-out questions, %", ylim=(0, 100))
    right.set(title="Change of the chosen response's log-prob, nats (held out)")
    for axes in (left, right):
        axes.set_xticks(range(len(bases)), bases)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
