"""Rows to a Markdown table and a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from .phases import PHASES
from .providers import name_of
from .rounds import Row

COLUMNS: dict[str, Callable[[Row], str]] = {
    "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
    "pairs/s": lambda row: f"{row['pairs_per_second']:.2f}",
    "step s": lambda row: f"{median(row['seconds']):.2f}",
    "x TRL": lambda row: optional(row, "speed_ratio", ".2f"),
    "floor MiB": lambda row: f"{row['floor_mib']:.0f}",
    "above floor MiB": lambda row: f"{row['above_floor_mib']:.0f}",
    "/ TRL": lambda row: optional(row, "memory_ratio", ".2f"),
    "loss, first": lambda row: f"{row['losses'][0]:.5f}",
    "last": lambda row: f"{row['losses'][-1]:.5f}",
    "worst from TRL": lambda row: optional(row, "loss_difference", ".0e"),
}


def optional(row: Row, key: str, spec: str) -> str:
    return format(row[key], spec) if key in row else "-"


def render(rows: list[Row]) -> str:
    heads = ["data", "tuning", "trainer", *COLUMNS]
    lines = [heads, ["---"] * 3 + ["---:"] * len(COLUMNS)]
    for row in rows:
        names = [row["data"], row["tuning"], name_of(row["provider"], row["layout"])]
        if row["status"] == "ok":
            cells = [cell(row) for cell in COLUMNS.values()]
        else:
            cells = [f"{row['status']}: {row['reason']}", *[""] * (len(COLUMNS) - 1)]
        lines.append([*names, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render_phases(rows: list[Row]) -> str:
    """Seconds of each part of a step."""
    lines = [["data", "tuning", "trainer", *PHASES], ["---"] * 3 + ["---:"] * len(PHASES)]
    for row in rows:
        if "phases" in row:
            names = [row["data"], row["tuning"], name_of(row["provider"], row["layout"])]
            lines.append([*names, *(f"{row['phases'][name]:.2f}" for name in PHASES)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


LEGEND = """\
Tokens of prompt and response of both responses, without padding; tokens/s, pairs/s: medians over the steps. x TRL:
median over the steps of TRL's seconds over this trainer's, on the same batch in the same round. Above floor: peak RSS
during the timed steps, less the RSS of a process with the same imports, parameters, gradients and optimizer state.
Worst from TRL: largest difference of a step's loss."""

PHASES_LEGEND = """\
Seconds of a step, medians. Head: both of its passes, and the loss. Optimizer: clipping too. Data: everything else,
logging too."""


def draw(report: dict[str, Any], path: Path) -> None:
    """Tokens/s and memory above the floor, a group of bars for each data set and tuning."""
    import matplotlib

    matplotlib.use("Agg")
    # an SVG keeps its numbers as text, and the same figures give the same file
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "spo"})
    from matplotlib import pyplot

    rows = [row for row in report["rows"] if row["status"] == "ok"]
    groups = list(dict.fromkeys((row["data"], row["tuning"]) for row in rows))
    names = list(dict.fromkeys((row["provider"], row["layout"]) for row in rows))
    width = 0.8 / max(1, len(names))
    figure, both = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, key, title in zip(
        both, ("tokens_per_second", "above_floor_mib"), ("tokens/s", "peak MiB above the floor"), strict=True
    ):
        for i, name in enumerate(names):
            mine = {(row["data"], row["tuning"]): row[key] for row in rows if (row["provider"], row["layout"]) == name}
            places = [j + (i - (len(names) - 1) / 2) * width for j, group in enumerate(groups) if group in mine]
            bars = axes.bar(places, [mine[group] for group in groups if group in mine], width, label=label(*name))
            axes.bar_label(bars, fmt="%.0f", fontsize=7)
        axes.set_xticks(range(len(groups)), [f"{data}\n{tuning}" for data, tuning in groups])
        axes.set_title(title)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    both[0].legend()
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def label(provider: str, layout: str) -> str:
    short = {"trl": "TRL DPOTrainer", "trl_patched": "TRL, patch_trl()", "trl_cce": "TRL, CCE's head"}
    return short.get(provider) or name_of(provider, layout)
