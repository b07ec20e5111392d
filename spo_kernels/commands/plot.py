"""`spo-plot`: the curves of one or more metrics.jsonl as an image."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spo_kernels.commands import call
from spo_kernels.train.errors import TrainError
from spo_kernels.train.metric_lines import read_lines

# Titles of the panels and the metrics in them; a panel without data is left out.
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("loss",)),
    ("reward margin", ("rewards/margins",)),
    ("share of pairs with the larger reward chosen", ("rewards/accuracies",)),
    ("share of pairs whose chosen is the likelier", ("logps/accuracies",)),
    ("token accuracy", ("mean_token_accuracy",)),
    ("log-prob of the chosen response, nats", ("logps/chosen",)),
    ("log-prob of the rejected response, nats", ("logps/rejected",)),
    (
        "share of pairs whose chosen fell (dotted: both)",
        ("diagnostics/chosen_fell/share", "diagnostics/both_fell/share"),
    ),
    ("mass that left both responses, nats", ("diagnostics/lost_mass/nats",)),
    (
        "log gradient ratio |∂x_w|/|∂x_l| (dotted: 10 %, 90 %)",
        tuple(f"diagnostics/gradient_log_ratio/{q}" for q in ("p50", "p10", "p90")),
    ),
)
BUCKETS = "diagnostics/chosen_change/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("metrics", nargs="+", type=Path, help="metrics.jsonl of a run, or the run's folder")
    parser.add_argument("--output", required=True, type=Path, help="image to write: .png, .pdf or .svg")
    parser.add_argument(
        "--split", choices=("train", "eval"), help="of the data (default: eval where a run has it, else train)"
    )


def run(arguments: argparse.Namespace) -> None:
    """The command."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TrainError("plotting needs matplotlib: pip install matplotlib") from error
    runs = {path: _records(path, arguments.split) for path in arguments.metrics}
    names = _labels(list(runs))
    panels = [(title, keys) for title, keys in PANELS if any(keys[0] in r for rows in runs.values() for r in rows)]
    bucketed = any(key.startswith(BUCKETS) for rows in runs.values() for key in rows[-1])
    count = len(panels) + bucketed
    columns = min(3, count)
    rows_of_panels = math.ceil(count / columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows_of_panels), layout="constrained")
    grid = figure.subplots(rows_of_panels, columns, squeeze=False).flatten()
    for axes, (title, keys) in zip(grid, panels, strict=False):
        for index, (path, records) in enumerate(runs.items()):
            for number, key in enumerate(keys):
                steps = [r["step"] for r in records if key in r]
                values = [r[key] for r in records if key in r]
                label = names[path] if number == 0 else None
                axes.plot(steps, values, ":" if number else ".-", color=f"C{index}", label=label)
        axes.set(title=title, xlabel="step")
    if bucketed:
        _draw_buckets(grid[len(panels)], runs, names)
    for axes in grid[count:]:
        axes.set_visible(False)
    for axes in grid[:count]:
        axes.title.set_fontsize(9)
        axes.set_axisbelow(True)
        axes.grid(color="#e6e6e6")
    grid[0].legend(fontsize=8, frameon=False)
    try:
        figure.savefig(arguments.output, dpi=140)
    # matplotlib raises ValueError for an unknown ending
    except (OSError, ValueError) as error:
        raise TrainError(f"--output {arguments.output} can't be written: {error}") from error


def _draw_buckets(axes: Any, runs: dict[Path, list[dict[str, Any]]], names: dict[Path, str]) -> None:
    """The last record's change of the chosen log-prob by length of the chosen response."""
    last = {
        (path, f"C{index}"): {k.removeprefix(BUCKETS): v for k, v in rows[-1].items() if k.startswith(BUCKETS)}
        for index, (path, rows) in enumerate(runs.items())
    }
    last = {run: each for run, each in last.items() if each}
    buckets = sorted({b for each in last.values() for b in each}, key=lambda b: int(b.partition("-")[0]))
    width = 0.8 / len(last)
    for number, ((path, color), each) in enumerate(last.items()):
        places = [buckets.index(b) + (number - (len(last) - 1) / 2) * width for b in each]
        axes.bar(places, list(each.values()), width, color=color, label=names[path])
    axes.axhline(0, color="#606060", lw=1)
    axes.set_xticks(range(len(buckets)), buckets)
    axes.set(title="change of the chosen log-prob, last, nats", xlabel="tokens of the chosen response")


def _records(path: Path, split: str | None) -> list[dict[str, Any]]:
    """The lines of a split that hold numbers."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    records = [record for _, record in read_lines(file)]
    splits = {r["split"] for r in records}
    wanted = split or ("eval" if "eval" in splits else "train")
    chosen = [r for r in records if r["split"] == wanted]
    if not chosen:
        raise TrainError(f"{file}: no lines of split {wanted}; it has {', '.join(sorted(splits)) or 'none'}")
    return chosen


def _labels(paths: list[Path]) -> dict[Path, str]:
    """The run's folder; where that repeats, the path."""
    short = {path: (path if path.is_dir() else path.resolve().parent).name for path in paths}
    unique = len(set(short.values())) == len(paths)
    return short if unique else {path: str(path) for path in paths}


def main(argv: Sequence[str] | None = None) -> int:
    return call(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main())
