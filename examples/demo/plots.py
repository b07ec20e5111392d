"""The demo's plots, from metrics.jsonl and the scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from arithmetic.records import read_jsonl

from .cost import Costs
from .evaluate import Scores
from .report import label
from .train import SECOND_STAGES

matplotlib.use("Agg")

COLORS = {
    "base": "#b0b0b0",
    "sft": "#606060",
    "spo": "#1b6ca8",
    "dpo": "#d95f02",
    "dpo-low-rate": "#f0a860",
    "sft-chosen": "#4d9a51",
}
STYLE: Any = {  # rc_context wants literal keys
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 11,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 140,
}


def draw_all(output: Path, scores: dict[str, Scores], costs: Costs) -> list[Path]:
    """Write every plot into ``output``; returns their paths."""
    methods = [name for name in scores if name in SECOND_STAGES and SECOND_STAGES[name].is_preference]
    with pyplot.rc_context(STYLE):
        figures = {
            "training.png": draw_training(output, methods),
            "logps.png": draw_logps(output, methods, scores["sft"]),
            "answers.png": draw_answers(scores),
            "head_cost.png": draw_costs(costs),
        }
        for name, figure in figures.items():
            figure.savefig(output / name)
            pyplot.close(figure)
    return [output / name for name in figures]


def curve(run: Path, split: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric in a run's metrics.jsonl."""
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if line["split"] == split and name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]


def draw_training(output: Path, methods: list[str]) -> Figure:
    """First stage: loss. Second stage: margin and accuracy of the implicit reward on held-out pairs."""
    figure, (loss, margin, accuracy) = pyplot.subplots(1, 3, figsize=(12, 3.6))
    loss.plot(*curve(output / "sft", "train", "loss"), color=COLORS["sft"], label="demonstrations, some wrong")
    loss.plot(*curve(output / "sft", "eval", "loss"), "o-", color="#c0392b", ms=4, label="held out, all right")
    loss.set(yscale="log", xlabel="SFT step", title="SFT: loss, nats per token")
    loss.legend()
    for method in methods:
        style = {"color": COLORS[method], "ms": 4, "label": label(method)}
        margin.plot(*curve(output / method, "eval", "rewards/margins"), "o-", **style)
        # At step 0 all rewards are 0, and no pair has a positive margin.
        steps, shares = curve(output / method, "eval", "rewards/accuracies")
        accuracy.plot(steps[1:], shares[1:], "o-", **style)
    margin.set(title="Held-out reward margin, chosen minus rejected", xlabel="step of the second stage")
    accuracy.set(
        title="Held-out pairs with a positive reward margin", xlabel="step of the second stage", ylim=(0, 1.03)
    )
    accuracy.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    margin.legend()
    accuracy.legend()
    return figure


def draw_logps(output: Path, methods: list[str], sft: Scores) -> Figure:
    """Log-probs of held-out solutions along the second stage."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.8))
    for axes, side, title in zip(panels, ("chosen", "rejected"), ("right (chosen)", "wrong (rejected)"), strict=True):
        for method in methods:
            line = curve(output / method, "eval", f"logps/{side}")
            axes.plot(*line, "o-", color=COLORS[method], ms=4, label=label(method))
        axes.axhline(getattr(sft, side), color=COLORS["sft"], ls="--", lw=1, zorder=1, label="the SFT model")
        axes.set(title=f"log p of the {title} solution", xlabel="step of the second stage", ylabel="nats per solution")
        axes.legend()
    return figure


def draw_answers(scores: dict[str, Scores]) -> Figure:
    """Right answers of each model, greedy and sampled."""
    figure, axes = pyplot.subplots(figsize=(8.5, 3.8))
    for i, (name, score) in enumerate(scores.items()):
        _bar(axes, i - 0.2, score.right_greedy, f"{score.right_greedy:.0%}", 0.38, color=COLORS[name])
        _bar(axes, i + 0.2, score.right_sampled, f"{score.right_sampled:.0%}", 0.38, color=COLORS[name], alpha=0.5)
    axes.bar([0], [0], color="#808080", label="greedy")
    axes.bar([0], [0], color="#808080", alpha=0.5, label="sampled")
    axes.set(ylim=(0, 1.2), title="Right answers on held-out problems")
    axes.set_xticks(range(len(scores)), [label(name) for name in scores])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper left", ncols=2)
    return figure


def draw_costs(costs: Costs) -> Figure:
    """Memory and time of the loss, eager and fused."""
    figure, (memory, time) = pyplot.subplots(1, 2, figsize=(7.5, 3.6))
    for i, (name, cost) in enumerate((("sft", costs.eager), ("spo", costs.fused))):
        _bar(memory, i, cost.mebibytes, f"{cost.mebibytes:,.0f} MiB", 0.55, color=COLORS[name])
        _bar(time, i, cost.milliseconds, f"{cost.milliseconds:,.0f} ms", 0.55, color=COLORS[name])
    memory.set(title="Peak memory beyond inputs and gradients", ylabel="MiB")
    time.set(title="Forward and backward", ylabel="ms")
    for axes in (memory, time):
        axes.set_xticks([0, 1], ["eager, full logits", "fused"])
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.12)
    return figure


def _bar(axes: Axes, place: float, height: float, text: str, width: float, **style: Any) -> None:
    axes.bar_label(axes.bar(place, height, width, **style), [text], padding=2, fontsize=9)
