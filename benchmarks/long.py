"""Peak memory against sequence length: one process per variant and length, one point each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from .launch import launch
from .machine import describe_machine
from .rounds import Launch, Plan, attempt, progress, say
from .settings import Job, Setting
from .table import MIB

DEFAULT_VARIANTS = "naive,trl-512x4096,liger-dpo,cce,ours-*"
DEFAULT_LENGTHS = "256,512,1024,2048,4096"


def measure(
    setting: Setting, plan: Plan, names: list[str], lengths: list[int], start: Launch = launch
) -> dict[str, Any]:
    """One pair-level call per (variant, length). A variant that fails at one length is not tried at longer ones."""
    points: list[dict[str, Any]] = []
    for name in names:
        for tokens in sorted(lengths):
            shape = replace(setting, tokens=tokens)
            job = Job(
                shape,
                name,
                phases=("memory",),
                limit_bytes=plan.limit_bytes,
                workspace_bytes=plan.workspace_bytes,
            )
            result = attempt(job, plan, start)
            points.append(as_point(shape, result))
            say(f"T={tokens}  {progress(result)}")
            if result["status"] != "ok":
                break
    return {
        "setting": vars(setting),
        "machine": describe_machine(setting.threads),
        "limit_mib": plan.limit_bytes / MIB if plan.limit_bytes else None,
        "points": points,
    }


def as_point(shape: Setting, result: dict[str, Any]) -> dict[str, Any]:
    point = {key: result.get(key) for key in ("variant", "status", "reason")} | {"tokens": shape.tokens}
    if result["status"] == "ok":
        extra = result["memory"]["extra"]
        point["extra_mib"] = extra / MIB
        point["beyond_gradients_mib"] = (extra - shape.gradient_bytes) / MIB
        point["process_mib"] = result["memory"]["process"] / MIB
        point["method"] = result["memory"]["method"]
    return point


def render(report: dict[str, Any]) -> str:
    """Variants down, lengths across: MiB beyond inputs, dH and dW."""
    lengths = sorted({point["tokens"] for point in report["points"]})
    names = list(dict.fromkeys(point["variant"] for point in report["points"]))
    cells = {(point["variant"], point["tokens"]): point for point in report["points"]}
    lines = ["peak MiB beyond inputs, dH and dW, by response tokens per sequence"]
    lines.append("variant".ljust(20) + "".join(f"{tokens:>10}" for tokens in lengths))
    for name in names:
        line, note = name.ljust(20), ""
        for tokens in lengths:
            point = cells.get((name, tokens))
            if point is None:
                line += f"{'-':>10}"
            elif point["status"] == "ok":
                line += f"{point['beyond_gradients_mib']:>10.0f}"
            else:
                line += f"{point['status']:>10}"
                note = f"  {point['reason']}"
        lines.append(line + note)
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """The same as a picture. A cross marks the first length at which a variant did not run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    setting = Setting(**report["setting"])
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name in dict.fromkeys(point["variant"] for point in report["points"]):
        mine = [point for point in report["points"] if point["variant"] == name]
        done = [point for point in mine if point["status"] == "ok"]
        if not done:
            continue
        # A call may need less than the noise of RSS: keep it on the logarithmic axis.
        heights = [max(1.0, point["beyond_gradients_mib"]) for point in done]
        (line,) = axes.plot([point["tokens"] for point in done], heights, marker="o", label=name)
        for point in mine[len(done) :]:
            axes.plot([point["tokens"]], [heights[-1]], marker="x", markersize=10, color=line.get_color())
    if any(point["status"] != "ok" for point in report["points"]):
        axes.plot([], [], "kx", markersize=10, label="did not run")
    axes.set(xscale="log", yscale="log", xlabel="response tokens per sequence")
    axes.set_ylabel("peak MiB beyond inputs, dH, dW")
    lengths = sorted({point["tokens"] for point in report["points"]})
    axes.set_xticks(lengths, [str(tokens) for tokens in lengths], minor=False)
    axes.minorticks_off()
    head = "frozen" if setting.frozen else "trained"
    axes.set_title(f"{setting.pairs} pair(s), H={setting.hidden}, V={setting.vocab}, {setting.dtype}, head {head}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
