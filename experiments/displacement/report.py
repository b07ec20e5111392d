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
    "rewarded": "pairs whose margin rose",
}
SHARES = {"displaced", "preferred", "rewarded"}
GREEDY = "Accuracy: greedy answers to held-out questions."
RANKED = "Accuracy: held-out pairs ranked right, by the log-probs of whole responses; no answers are scored."


def say(text: str, began: float) -> None:
    print(f"[{time.perf_counter() - began:5.0f} s] {text}", flush=True)


def line(result: dict[str, Any]) -> str:
    """What a finished run says on the screen."""
    parts = [f"seed {result['seed']}"]
    if "method" in result:
        pairs = result["pairs"]
        parts += [f"rate {result['learning rate']:g}, {result['method']}"]
        parts += [f"ranked right {pairs['preferred']:.3f}, chosen change {pairs['chosen change']:.2f} nats"]
        parts += [f"{result['tokens_per_second']:.0f} tokens/s"]
    if "accuracy" in result:
        parts += [f"accuracy {result['accuracy']:.3f}, answers in {result['answer seconds']:.0f} s"]
    return ", ".join([*parts, f"{result['seconds']:.0f} s"])


def answered(results: dict[str, Any]) -> bool:
    """Whether questions were asked."""
    return "accuracy" in results["sft"][0]


def scores(results: dict[str, Any], runs: list[dict[str, Any]]) -> list[float]:
    """Shares of right answers, or of pairs ranked right where no questions were asked."""
    return [r["accuracy"] if answered(results) else r["pairs"]["preferred"] for r in runs]


def sft_scores(results: dict[str, Any]) -> dict[int, float]:
    """Of each seed's SFT model, likewise."""
    if answered(results):
        return {s["seed"]: s["accuracy"] for s in results["sft"]}
    return {r["seed"]: r["pairs"]["preferred before"] for r in results["runs"]}


def spread(values: list[float]) -> float:
    """Sample standard deviation over seeds; nan for one."""
    return stdev(values) if len(values) > 1 else math.nan


def cell(values: list[float], share: bool = False) -> str:
    """Mean ± standard deviation over seeds."""
    if not values:
        return ""
    factor, digits = (100, 1) if share else (1, 1)
    middle, width = factor * mean(values), factor * spread(values)
    unit = " %" if share else ""
    return f"{middle:.{digits}f}{unit}" if math.isnan(width) else f"{middle:.{digits}f} ± {width:.{digits}f}{unit}"


def of_method(results: dict[str, Any], rate: float, method: str) -> list[dict[str, Any]]:
    """Its runs at a learning rate, in order of seeds."""
    runs = (r for r in results["runs"] if r["method"] == method and r["learning rate"] == rate)
    return sorted(runs, key=lambda r: r["seed"])


def methods_of(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(r["method"] for r in results["runs"]))


def rates_of(results: dict[str, Any]) -> list[float]:
    return sorted({r["learning rate"] for r in results["runs"]})


def markdown(results: dict[str, Any]) -> str:
    """For each learning rate a table of the paper's shape, and one of every method."""
    about, seeds = results["about"], len(results["sft"])
    first = {r["seed"]: r["pairs"] for r in reversed(results["runs"])}
    ranked, likely = ([pairs[f"{name} before"] for pairs in first.values()] for name in ("preferred", "chosen"))
    lines = [f"SFT models: {cell(list(sft_scores(results).values()), True)} right; held-out pairs ranked right:"]
    lines += [f"{cell(ranked, True)}; mean log-prob of chosen responses: {cell(likely)} nats.", ""]
    for rate in rates_of(results):
        lines += [f"### Learning rate {rate:g}", "", *_pairs_table(results, rate), "", *_runs_table(results, rate), ""]
    lines += [
        f"Mean ± sample standard deviation over {seeds} seeds." if seeds > 1 else "One seed.",
        GREEDY if answered(results) else RANKED,
        "Differences to SFT: paired, seed by seed. The rest: held-out pairs, relative to the SFT model; log-probs of",
        "whole responses; lost mass: fall of the log of both responses' summed probability; a margin is that of the",
        "policy's log-probs less that of the SFT model's, so its rise is DPO's reward accuracy, for every objective.",
        "",
        *(f"* {key}: {value}" for key, value in about.items() if key != "methods"),
        *(f"* `{name}`: `spo-train {options}`" for name, options in about["methods"].items()),
        "",
    ]
    return "\n".join(lines)


def _pairs_table(results: dict[str, Any], rate: float) -> list[str]:
    """One row per objective: alone beside inside SPO."""
    heads = ["objective", "SFT", "alone", "with SPO", "alone - SFT, points", "with SPO - SFT, points"]
    heads += ["chosen change, nats", "with SPO", "chosen fell", "with SPO"]
    lines = [_row(heads), "|---" * len(heads) + "|"]
    sft = cell(list(sft_scores(results).values()), True)
    for method in methods_of(results):
        if "+" in method:
            continue
        both = [of_method(results, rate, method), of_method(results, rate, f"{method}+spo")]
        row = [method, sft, *(cell(scores(results, runs), True) for runs in both)]
        row += [cell(gains(results, runs)) for runs in both]
        for name in ("chosen change", "displaced"):
            row += [cell([r["pairs"][name] for r in runs], name in SHARES) for runs in both]
        lines.append(_row(row))
    return lines


def gains(results: dict[str, Any], runs: list[dict[str, Any]]) -> list[float]:
    """Percentage points over the SFT model of the same seed, whose spread between seeds is larger than the gains'."""
    sft = sft_scores(results)
    return [100 * (score - sft[r["seed"]]) for score, r in zip(scores(results, runs), runs, strict=True)]


def _runs_table(results: dict[str, Any], rate: float) -> list[str]:
    """One row per method, everything that is measured."""
    heads = ["method", "accuracy", "minus SFT, points", *COLUMNS.values(), "seconds"]
    lines = [_row(heads), "|---" * len(heads) + "|"]
    for method in methods_of(results):
        runs = of_method(results, rate, method)
        row = [method, cell(scores(results, runs), True), cell(gains(results, runs))]
        row += [cell([r["pairs"][name] for r in runs], name in SHARES) for name in COLUMNS]
        lines.append(_row([*row, f"{mean(r['seconds'] for r in runs):.0f}"]))
    return lines


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy and change of the chosen log-prob, per objective, alone and inside SPO; a row per learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = rates_of(results)
    figure, panels = pyplot.subplots(
        len(rates), 2, figsize=(11, 3.4 * len(rates)), layout="constrained", squeeze=False, sharex=True
    )
    for (left, right), rate in zip(panels, rates, strict=True):
        _draw_rate(results, rate, left, right)
    panels[0][0].legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _draw_rate(results: dict[str, Any], rate: float, left: Any, right: Any) -> None:
    bases = [m for m in methods_of(results) if "+" not in m and m != CONTROL]
    for suffix, label, shift, color in (("", "alone", -0.2, "#d95f02"), ("+spo", "inside SPO", 0.2, "#1b6ca8")):
        runs = [of_method(results, rate, base + suffix) for base in bases]
        accuracies = [gains(results, each) for each in runs]
        changes = [[r["pairs"]["chosen change"] for r in each] for each in runs]
        for axes, values in ((left, accuracies), (right, changes)):
            places = [i + shift for i in range(len(bases))]
            errors = None if not values or len(values[0]) < 2 else [spread(v) for v in values]
            axes.bar(places, [mean(v) for v in values], 0.38, yerr=errors, capsize=3, color=color, label=label)
    if control := of_method(results, rate, CONTROL):
        left.axhline(mean(gains(results, control)), color="#4d9a51", ls=":", lw=1.5, label="SFT on chosen")
        right.axhline(mean(r["pairs"]["chosen change"] for r in control), color="#4d9a51", ls=":", lw=1.5)
    kind = "Greedy" if answered(results) else "Preference"
    left.set(title=f"{kind} accuracy minus the SFT model's, points; rate {rate:g}")
    right.set(title=f"Change of the chosen log-prob, nats, held out; rate {rate:g}")
    left.margins(y=0.25)
    for axes in (left, right):
        axes.set_xticks(range(len(bases)), bases, fontsize=8)
        axes.axhline(0, color="#606060", lw=1)
        axes.spines[["top", "right"]].set_visible(False)
