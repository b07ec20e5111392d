"""Rows of the GPU benchmark as markdown, one table per shape and phase."""

from __future__ import annotations

from typing import Any

from .gpu_settings import FLOORS, PHASES

Row = dict[str, Any]
MIB = 2**20

LEGEND = """\
ms: median, 20th and 80th percentile, cold L2 cache, launches included. GE: ms over the ms of one bare bf16
`[N, H] x [H, V]` product timed beside each step. rate: share of that product's rate, counting only the products that
nothing can do without (forward 1, frozen 2, trained 3). x floor: ms over the bare products of floor-1, -2 or -4.
MiB: the allocator's peak over what was there before, gradients included. Errors against float64 on peaked inputs:
worst token and worst 512-token sum (nats) of the first 1024 rows; relative error of dH and dW where N <= 2048."""


def number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def render(report: Row) -> str:
    """The whole report."""
    lines = ["# GPU benchmark", "", *[f"- {name}: {value}" for name, value in report["machine"].items()], ""]
    lines += [report["paper"], ""]
    if report.get("kernels"):
        lines += [report["kernels"], ""]
    rows = report["rows"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    for shape in shapes:
        for phase in PHASES:
            lines += [f"## {shape}, {phase}", "", *table(rows, shape, phase), ""]
    if report.get("sweep"):
        lines += ["## Workspace of ours-triton", "", *sweep_table(report["sweep"]), ""]
    return "\n".join([*lines, LEGEND, ""])


def table(rows: list[Row], shape: str, phase: str) -> list[str]:
    """One table: measured rows by time, then those that gave none with their reasons."""
    mine = [row for row in rows if row["shape"] == shape and row["phase"] in (phase, "all")]
    floor = next((r for r in mine if r["provider"] == f"floor-{FLOORS[phase][-1]}" and r["status"] == "ok"), None)
    heads = ["provider", "ms", "p20", "p80", "GE", "rate", "x floor", "MiB", "token", "sum512", "dH", "dW", "first s"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    good = sorted((row for row in mine if row["status"] == "ok"), key=lambda row: row["ms"])
    for row in good:
        errors = row.get("errors") or {}
        extra = row.get("extra_bytes")
        is_floor = row["provider"].startswith("floor")
        rate = None if is_floor and phase == "trained" else PHASES[phase] / row["ge"]
        cells = [row["provider"], *[number(row[name], ".3f") for name in ("ms", "ms_p20", "ms_p80")]]
        cells += [number(row["ge"], ".2f"), number(rate, ".0%"), number(floor and row["ms"] / floor["ms"], ".2f")]
        cells += [number(None if extra is None else extra / MIB, ".0f")]
        cells += [number(errors.get(name), ".1e") for name in ("token", "sum512", "dh", "dw")]
        lines.append("| " + " | ".join([*cells, number(row.get("first_s"), ".1f")]) + " |")
    for row in mine:
        if row["status"] != "ok":
            lines.append(f"| {row['provider']} | {row['status']}: {row['reason']} |" + " |" * (len(heads) - 2))
    return lines


def sweep_table(rows: list[Row]) -> list[str]:
    """Time and memory of one shape against the byte budget."""
    lines = ["| shape | workspace MiB | forward ms | trained ms | trained MiB |", "|---|---|---|---|---|"]
    for row in rows:
        budget = "default" if row["workspace_bytes"] is None else f"{row['workspace_bytes'] / MIB:.0f}"
        cells = [number(row.get(name), ".2f") for name in ("forward_ms", "trained_ms")]
        extra = row.get("extra_bytes")
        memory = number(None if extra is None else extra / MIB, ".0f")
        lines.append("| " + " | ".join([row["shape"], budget, *cells, memory]) + " |")
    return lines
