"""Rounds of samples to rows, rows to text."""

from __future__ import annotations

from statistics import median
from typing import Any

from .settings import Setting

# GEMM-equivalents of a path, as in spo_kernels.preference.plan, which this module must not import
PATH_PRODUCTS = {"packed": 3, "factorised": 3, "two_pass": 4}
MIB = 2**20
Row = dict[str, Any]


def summarize(setting: Setting, name: str, about: str, rounds: list[dict[str, Any]]) -> Row:
    """One row: the median of the rounds' medians, quantiles over all samples, memory's median over rounds."""
    good = [result for result in rounds if result["status"] == "ok"]
    row: Row = {"variant": name, "about": about, "status": "ok", "reason": None, "rounds": len(good)}
    if not good:
        worst = rounds[-1] if rounds else {"status": "failed", "reason": "not run"}
        return row | {"status": worst["status"], "reason": worst["reason"]}
    if len(good) < len(rounds):
        row["reason"] = next(result["reason"] for result in rounds if result["status"] != "ok")
    row |= time_columns([result for result in good if "ms" in result])
    row |= memory_columns(setting, [result for result in good if "memory" in result])
    row["loss"] = good[0].get("loss")
    row["errors"] = next((result["errors"] for result in good if "errors" in result), None)
    row["first_ms"] = good[0]["first_ms"]
    return row


def time_columns(results: list[dict[str, Any]]) -> Row:
    """ms; GE, each step divided by the bare product that ran right before it."""
    if not results:
        return {}
    every = sorted(ms for result in results for ms in result["ms"])
    ratios = [[a / b for a, b in zip(r["ms"], r["product_ms"], strict=True)] for r in results]
    return {
        "ms": median(median(result["ms"]) for result in results),
        "ms_p20": quantile(every, 0.2),
        "ms_p80": quantile(every, 0.8),
        "ms_min": every[0],
        "samples": len(every),
        "product_ms": median(median(result["product_ms"]) for result in results),
        "ge": median(median(ratio) for ratio in ratios),
    }


def memory_columns(setting: Setting, results: list[dict[str, Any]]) -> Row:
    if not results:
        return {}
    extra = median(result["memory"]["extra"] for result in results)
    return {
        "extra_mib": extra / MIB,
        "beyond_gradients_mib": (extra - setting.gradient_bytes) / MIB,
        "kept_mib": median(result["kept_bytes"] for result in results) / MIB,
        "process_mib": median(result["memory"]["process"] for result in results) / MIB,
        "memory_method": results[0]["memory"]["method"],
    }


def quantile(ordered: list[float], share: float) -> float:
    """Linear interpolation between the two nearest samples."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def add_ratios(setting: Setting, rows: list[Row]) -> None:
    """`x_floor`: GE over the floor's GE (4 products, frozen head: 2), None where the floor was not measured.

    `x_three`: over the GE of three products, which is what a loss of pairs needs.
    """
    for key, products in (("x_floor", setting.products), ("x_three", 3)):
        floor = next((row for row in rows if row["variant"] == f"floor-{products}"), None)
        base = floor.get("ge") if floor else None
        for row in rows:
            row[key] = row["ge"] / base if base and "ge" in row else None


def cost_model(rows: list[Row]) -> str | None:
    """What `preference/plan.py` predicts of this library's paths beside what was measured; None without those rows.

    Both relative to two_pass, so that the speed of a product does not matter.
    """
    prefix = "ours-cpp-"
    found = {row["variant"].removeprefix(prefix): row["ge"] for row in rows if "ge" in row}
    measured = {path: found[path] for path in PATH_PRODUCTS if path in found}
    if len(measured) < 2 or "two_pass" not in measured:
        return None
    base, expected = measured.pop("two_pass"), PATH_PRODUCTS["two_pass"]
    parts = [
        f"{path} predicted {PATH_PRODUCTS[path] / expected:.2f}, measured {ge / base:.2f}"
        for path, ge in measured.items()
    ]
    return f"cost model, time over two_pass's: {'; '.join(parts)}"


def columns(setting: Setting) -> list[tuple[str, Any]]:
    """Heading and formatter of each column."""

    def plain(key: str, digits: int) -> Any:
        return lambda row: number(row.get(key), f".{digits}f")

    def error(key: str) -> Any:
        return lambda row: number((row.get("errors") or {}).get(key), ".1e")

    def not_for_floor(key: str) -> Any:
        # The floor's outputs are allocated beforehand.
        return lambda row: "-" if row["variant"].startswith("floor") else number(row.get(key), ".0f")

    return [
        ("ms", plain("ms", 0)),
        ("min", plain("ms_min", 0)),
        ("p20", plain("ms_p20", 0)),
        ("p80", plain("ms_p80", 0)),
        ("GE", plain("ge", 2)),
        *([] if setting.frozen else [("x3prod", plain("x_three", 2))]),
        (f"x{setting.products}prod", plain("x_floor", 2)),
        ("extra", plain("extra_mib", 0)),
        ("-dH" if setting.frozen else "-dH-dW", not_for_floor("beyond_gradients_mib")),
        ("kept", not_for_floor("kept_mib")),
        ("RSS", plain("process_mib", 0)),
        ("loss", plain("loss", 6)),
        ("token", error("token")),
        (f"sum{setting.tokens}", error("sequence")),
        ("dH", error("dh")),
        ("dW", error("dw")),
    ]


def number(value: float | None, spec: str) -> str:
    if value is None:
        return "-"
    text = format(value, spec)
    # Tiny shapes run in microseconds: keep two digits of them.
    return format(value, ".2g") if spec.endswith("f") and 0 < abs(value) < 0.5 and spec != ".6f" else text


LEGEND = """\
ms: forward + backward, median of the rounds' medians; min, p20, p80 over all samples. GE: ms over the ms of one
bare [N,H] x [H,V] product timed beside it. xKprod: GE over the GE of floor-K. MiB: extra = peak above RSS before the
call (inputs resident, one warm-up made); {beyond} = extra without those outputs; kept = what the first call left
resident (caches, code; no gradients); RSS = peak of the whole process. Errors against float64 on the same inputs:
worst token and worst {tokens}-token sum in nats (token outputs summed in fp32), relative Frobenius error of dH and
dW."""


def render(setting: Setting, rows: list[Row]) -> str:
    """The table as text; rows that did not run come last in their place, with the reason."""
    shape = columns(setting)
    cells = [["variant", *[heading for heading, _ in shape]]]
    notes: dict[int, str] = {}
    for row in rows:
        if row["status"] == "ok":
            cells.append([row["variant"], *[formatter(row) for _, formatter in shape]])
            if row["reason"]:
                notes[len(cells) - 1] = f"  ({row['rounds']} rounds: {row['reason']})"
        else:
            cells.append([row["variant"]])
            notes[len(cells) - 1] = f"  {row['status']}: {row['reason']}"
    widths = [max(len(line[i]) for line in cells if len(line) > i) for i in range(len(cells[0]))]
    lines = []
    for place, line in enumerate(cells):
        padded = [line[0].ljust(widths[0])] + [
            cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=False)
        ]
        lines.append("  ".join(padded) + notes.get(place, ""))
    lines.append("")
    beyond = "-dH" if setting.frozen else "-dH-dW"
    lines.append(LEGEND.format(beyond=beyond, tokens=setting.tokens))
    return "\n".join(lines)
