"""Command line: `python -m benchmarks.compare OLD NEW`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from .. import inputs
from ..answers import WorkerDied
from ..machine import describe_machine, load, machine_line
from ..run import add_shape, positive
from ..settings import Setting
from .cases import SMALL_SHAPE, Case, all_cases
from .differences import worst_difference
from .trees import NoCommit, export
from .turns import SIDES, Side, take_turns

SMALL_REPEATS = 200  # of a call that takes a millisecond


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Paired times and results of two commits, each with its own build, in turns.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("old", metavar="OLD", help="commit that NEW is divided by")
    made.add_argument("new", metavar="NEW", help="commit; what is not committed does not count")
    add_shape(made, pairs=2, tokens=256, hidden=512, vocab=8192)
    made.add_argument("--cases", default="*", help="shell pattern of the cases' names")
    made.add_argument("--rounds", type=positive, default=5, help="paired ratios of each case")
    made.add_argument("--repeats", type=positive, default=3, help="calls of one turn, the fastest of which counts")
    made.add_argument("--backend", default="cpp", help="tile backend of both sides")
    made.add_argument("--workspace-mib", type=float, default=256.0, help="workspace_bytes of every call but the small")
    made.add_argument("--limit", type=float, help="exit with status 1 where a median ratio is higher")
    made.add_argument("--folder", type=Path, help="keep exports and builds here (default: a temporary folder)")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    return made


def main(arguments: list[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(arguments)
    cases = [case for case in all_cases() if fnmatchcase(case.name, options.cases)]
    if not cases:
        made.error(f"--cases {options.cases!r} matches none of: {'; '.join(case.name for case in all_cases())}")
    facts = describe_machine(options.threads)
    try:
        commits, rows = run(options, cases)
    except (NoCommit, WorkerDied, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    facts["load_1min_end"] = load()
    print(render(options, facts, commits, rows))
    if options.json:
        report = {"machine": facts, "commits": commits, "options": plain(options), "rows": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    slow = [row for row in rows if options.limit and row["ratio"] > options.limit]
    return int(bool(slow) or not all(row["same"] for row in rows))


def run(options: argparse.Namespace, cases: list[Case]) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Both commits' hashes, and a row for each case."""
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spo-compare-")))
        folder = options.folder.resolve() if options.folder else work
        trees = {name: export(getattr(options, name), name, folder) for name in SIDES}
        given = {"backend": options.backend, "threads": options.threads}
        given["workspace_bytes"] = int(options.workspace_mib * 2**20)
        sides: dict[str, Side] = {}
        for name in SIDES:
            sides[name] = Side(name, trees[name], **given)
            stack.callback(sides[name].close)
            say(f"{name}: {trees[name].commit[:12]}, {sides[name].ask('start')['backend']}")
        rows = [measure(case, sides, options, work) for case in cases]
    return {name: tree.commit for name, tree in trees.items()}, rows


def measure(case: Case, sides: dict[str, Side], options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Results of both sides, then their turns."""
    given = write_inputs(case, options, work)
    files = {name: work / f"{name}.pt" for name in SIDES}
    for name, side in sides.items():
        side.ask("prepare", way=case.way, dtype=case.dtype, inputs=str(given), results=str(files[name]))
    found = worst_difference(files["old"], files["new"])
    timing = take_turns(sides, options.rounds, SMALL_REPEATS if case.small else options.repeats)
    say(f"{case.name}: {timing.ratio:.3f}")
    return {
        "case": case.name,
        **asdict(timing),
        "ratio": timing.ratio,
        "difference": found.relative,
        "differs_most": found.tensor,
        "same": found.within,
    }


def write_inputs(case: Case, options: argparse.Namespace, work: Path) -> Path:
    """Logits like a language model's, so that the sparse backward has something to leave out."""
    pairs, tokens, hidden, vocab = SMALL_SHAPE
    if not case.small:
        pairs, tokens, hidden, vocab = options.pairs, options.tokens, options.hidden, options.vocab
    path = work / f"inputs-{vocab}-{hidden}-{case.dtype}.pt"
    if not path.exists():
        if options.threads:
            torch.set_num_threads(options.threads)
        setting = Setting(pairs, tokens, hidden, vocab, case.dtype, seed=options.seed, logits="lm")
        inputs.save(inputs.peaked_problem(setting), path)
    return path


def render(
    options: argparse.Namespace, facts: dict[str, Any], commits: dict[str, str], rows: list[dict[str, Any]]
) -> str:
    """The table."""
    lines = [
        f"{machine_line(facts)} (load at the end {facts['load_1min_end']})",
        f"old {commits['old'][:12]}, new {commits['new'][:12]}, backend {options.backend}; {options.pairs} pairs x 2 x "
        f"{options.tokens} tokens, H={options.hidden}, V={options.vocab}; {options.rounds} rounds of two turns a side",
        "",
        f"{'forward + backward':<28}{'old ms':>9}{'new ms':>9}{'new/old':>9}{'min..max':>16}{'difference':>12}",
    ]
    for row in rows:
        spread = f"{min(row['ratios']):.3f}..{max(row['ratios']):.3f}"
        note = "" if row["same"] else f"  {row['differs_most']} DIFFERS"
        lines.append(
            f"{row['case']:<28}{row['old_ms']:>9.3g}{row['new_ms']:>9.3g}{row['ratio']:>9.3f}{spread:>16}"
            f"{row['difference']:>12.1e}{note}"
        )
    for row in rows:
        if row["eager_ms"] is not None:
            old, new = (row[f"{name}_ms"] / row["eager_ms"] for name in SIDES)
            shape = ", ".join(map(str, SMALL_SHAPE))
            lines.append(
                f"\n{row['case']}, (B, T, H, V) = ({shape}), one thread: full logits {row['eager_ms']:.3g} ms; "
                f"old {old:.2f}x, new {new:.2f}x of that"
            )
    lines.append("\ndifference: largest between the sides, relative to the tensor's largest element.")
    return "\n".join(lines)


def plain(options: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
