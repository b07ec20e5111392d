"""Command line: `python -m benchmarks.run`, the table; with `--long`, peak memory against sequence length."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from . import long, table
from .floor import Layout, name_of
from .launch import launch
from .machine import machine_line
from .providers import all_variants, select
from .rounds import Launch, Plan, compare, default_limit
from .settings import DTYPES, LOGITS, Setting

GIB = 2**30


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Time, memory and error of one DPO call (forward + backward), every variant side by side.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_shape(made, pairs=2, tokens=512, hidden=1024, vocab=32768)
    made.add_argument(
        "--logits",
        choices=LOGITS,
        default="random",
        help="distributions: spread at random (std 4), like a language model's, or flat (std 1); the last two also "
        "list the sparse backward",
    )
    made.add_argument("--variants", help="comma-separated names or shell patterns (default: all; with --long: a few)")
    made.add_argument("--list", action="store_true", help="print the variants and leave")
    made.add_argument("--rounds", type=positive, default=3, help="processes per variant, interleaved")
    made.add_argument("--repeats", type=positive, default=5, help="timed steps per process")
    made.add_argument("--no-accuracy", action="store_true", help="skip the float64 truth and the error columns")
    made.add_argument(
        "--floor-tile",
        type=layout,
        metavar="ROWSxCOLUMNS",
        help="tile of every bare product, 0 for all rows or columns (default: time several, take the fastest)",
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    made.add_argument("--timeout", type=float, default=900.0, help="seconds that one process may take")
    made.add_argument("--limit-gib", type=float, help="memory cap of one process (default: 80 %% of what is available)")
    made.add_argument("--workspace-mib", type=float, help="workspace_bytes of this library's call")
    made.add_argument("--long", action="store_true", help="peak memory against sequence length instead of the table")
    made.add_argument("--lengths", default=long.DEFAULT_LENGTHS, help="--long: response tokens per sequence")
    made.add_argument("--plot", type=Path, default=Path("memory_vs_length.png"), help="--long: where the plot goes")
    return made


def add_shape(made: argparse.ArgumentParser, **defaults: int) -> None:
    """The options that make a `Setting`."""
    made.add_argument("--pairs", type=positive, default=defaults["pairs"], help="preference pairs (B)")
    made.add_argument("--tokens", type=positive, default=defaults["tokens"], help="response tokens per sequence (T)")
    made.add_argument("--hidden", type=positive, default=defaults["hidden"], help="hidden size (H)")
    made.add_argument("--vocab", type=positive, default=defaults["vocab"], help="vocabulary size (V)")
    made.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of hidden states and head")
    made.add_argument("--frozen-head", action="store_true", help="no gradient for the head")
    made.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's choice")
    made.add_argument("--seed", type=int, default=0, help="of the inputs")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def layout(text: str) -> Layout:
    rows, cross, columns = text.partition("x")
    if not (cross and rows.isdecimal() and columns.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS, such as 0x4096, got {text!r}")
    return int(rows), int(columns)


def setting_of(options: argparse.Namespace) -> Setting:
    return Setting(
        pairs=options.pairs,
        tokens=options.tokens,
        hidden=options.hidden,
        vocab=options.vocab,
        dtype=options.dtype,
        frozen=options.frozen_head,
        threads=options.threads,
        seed=options.seed,
        logits=getattr(options, "logits", "random"),
    )


def plan_of(options: argparse.Namespace) -> Plan:
    return Plan(
        rounds=options.rounds,
        repeats=options.repeats,
        accuracy=not options.no_accuracy,
        timeout=options.timeout,
        limit_bytes=int(options.limit_gib * GIB) if options.limit_gib else default_limit(),
        workspace_bytes=int(options.workspace_mib * 2**20) if options.workspace_mib else None,
        floor_tile=options.floor_tile,
    )


def main(arguments: list[str] | None = None, start: Launch = launch) -> dict[str, Any]:
    made = parser()
    options = made.parse_args(arguments)
    setting, plan = setting_of(options), plan_of(options)
    variants = all_variants(setting)
    try:
        names = select(list(variants), options.variants or (long.DEFAULT_VARIANTS if options.long else "*"))
        lengths = sorted({positive(part) for part in options.lengths.split(",")})
    except (ValueError, argparse.ArgumentTypeError) as error:
        made.error(str(error))
    if options.list:
        print("\n".join(f"{name:<20} {variant.about}" for name, variant in variants.items()))
        return {}
    report = (
        run_long(setting, plan, names, lengths, options.plot, start)
        if options.long
        else run_table(setting, plan, names, start)
    )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return report


def run_table(setting: Setting, plan: Plan, names: list[str], start: Launch) -> dict[str, Any]:
    report = compare(setting, plan, names, start)
    facts = report["machine"]
    print(f"{machine_line(facts)} (load at the end {facts['load_1min_end']})")
    print(f"setting: {setting.describe()}; {plan.rounds} rounds x {plan.repeats} steps")
    print(f"floor: {describe_tiles(plan, report['floor_tiles_ms'])}")
    found = report["concentration"]
    print(
        f"softmax: {found['entries_above_2^-12']:.1f} entries above 2^-12 a token, "
        f"{found['mass_below_2^-12']:.2%} of the mass below"
    )
    if report["float64_loss"] is not None:
        print(f"float64 loss: {report['float64_loss']:.6f}")
    print()
    print(table.render(setting, report["rows"]))
    model = table.cost_model(report["rows"])
    if model is not None:
        print(model)
    return report


def describe_tiles(plan: Plan, times: dict[str, dict[str, float]]) -> str:
    if plan.floor_tile is not None:
        return f"{name_of(plan.floor_tile)} (rows x columns) for each product, as asked"
    chosen = {kind: min(of_kind, key=of_kind.__getitem__) for kind, of_kind in times.items()}
    tiles = ", ".join(f"{kind} {tile} ({times[kind][tile]:.0f} ms)" for kind, tile in chosen.items())
    return f"fastest tiling (rows x columns) of each product: {tiles}"


def run_long(
    setting: Setting, plan: Plan, names: list[str], lengths: list[int], plot: Path, start: Launch
) -> dict[str, Any]:
    report = long.measure(setting, plan, names, lengths, start)
    print(machine_line(report["machine"]))
    limit = f"{report['limit_mib'] / 1024:.1f} GiB" if report["limit_mib"] else "none"
    print(f"setting: {setting.describe()}, tokens {lengths}; memory cap per process {limit}\n")
    print(long.render(report))
    try:
        long.draw(report, plot)
        print(f"\nplot: {plot}")
    except ImportError as error:
        print(f"\nno plot: {error}")
    return report


if __name__ == "__main__":
    main()
