"""Command line: `python -m benchmarks.training`."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..launch import ROOT
from ..machine import describe_machine, load, machine_line
from ..rounds import say
from ..run import positive
from . import data, table
from .providers import PROVIDERS
from .rounds import Row, floors, measure, rows_of
from .settings import LAYOUTS, TUNINGS, Job, Shape


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description="Whole training steps of several trainers, in turns: tokens/s, peak memory, loss of each step.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS), help="trainers")
    made.add_argument("--data", nargs="+", choices=data.NAMES, default=["gsm8k", "tldr"], help="preference pairs")
    made.add_argument("--tuning", nargs="+", choices=TUNINGS, default=list(TUNINGS), help="what is trained")
    made.add_argument(
        "--layouts", nargs="+", choices=LAYOUTS, default=["shared"], help="of the trainers that have them"
    )
    made.add_argument(
        "--gsm8k",
        type=Path,
        metavar="FOLDER",
        default=ROOT / "../shared/data/gsm8k",
        help="folder of preferences.jsonl (prompt, chosen, rejected) and sft.jsonl (prompt, completion)",
    )
    for name, text in (
        ("steps", "timed steps of each trainer"),
        ("warmups", "steps before them"),
        ("batch", "pairs in a step"),
        ("threads", "of each process"),
    ):
        made.add_argument(f"--{name}", type=positive, default=getattr(Job, name), help=text)
    for name, value in asdict(Shape()).items():
        made.add_argument(f"--{name}", type=positive, default=value, help="of the model")
    made.add_argument("--learning-rate", type=float, default=Job.learning_rate, help="of AdamW, constant")
    made.add_argument("--workspace-mib", type=positive, help="of this library's trainers (default: their own)")
    made.add_argument("--gradient-checkpointing", action="store_true", help="as TRL has it by default")
    made.add_argument("--timeout", type=float, default=900.0, help="seconds that one answer of a process may take")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    made.add_argument("--plot", type=Path, metavar="FILE", help="also draw a picture")
    made.add_argument("--read", type=Path, nargs="+", metavar="FILE", help="earlier --json files instead of measuring")
    return made


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser().parse_args(arguments)
    report = joined(options.read) if options.read else run(options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{machine_line(report['machine'])} (load at the end {report['machine']['load_1min_end']})")
    print(f"setting: {report['setting']}\n")
    print(table.render(report["rows"]))
    print(f"\n{table.LEGEND}\n")
    print(table.render_phases(report["rows"]))
    print(f"\n{table.PHASES_LEGEND}")
    if options.plot:
        table.draw(report, options.plot)
    return report


def joined(files: list[Path]) -> dict[str, Any]:
    """The rows of all files, with the setting and the machine of the first.

    Raises:
        ValueError: The files are of different settings.
    """
    reports = [json.loads(file.read_text()) for file in files]
    settings = {report["setting"] for report in reports}
    if len(settings) > 1:
        raise ValueError(f"--read: files of one setting belong together, got {'; '.join(sorted(settings))}")
    return reports[0] | {"rows": [row for report in reports for row in report["rows"]]}


def run(options: argparse.Namespace) -> dict[str, Any]:
    shape = Shape(**{name: getattr(options, name) for name in asdict(Shape())})
    facts = describe_machine(options.threads)
    with tempfile.TemporaryDirectory(prefix="spo-training-") as name:
        rows = measure_all(options, shape, Path(name))
    facts["load_1min_end"] = load()
    checkpointing = "with" if options.gradient_checkpointing else "without"
    setting = (
        f"Llama, V = {shape.vocabulary}, H = {shape.hidden}, {shape.layers} layers, float32; DPO, reference "
        f"precomputed, AdamW; {options.batch} pairs a step, {options.warmups} + {options.steps} steps, "
        f"{checkpointing} gradient checkpointing"
    )
    return {"setting": setting, "shape": asdict(shape), "machine": facts, "rows": rows}


def measure_all(options: argparse.Namespace, shape: Shape, folder: Path) -> list[Row]:
    say("model and tokenizer")
    tokenizer = data.build_model(folder / "model", options.gsm8k, shape)
    rows: list[Row] = []
    found: dict[tuple[str, str], int | None] = {}
    for name in options.data:
        try:
            pairs = data.make_pairs(name, options.batch * (options.warmups + options.steps), options.gsm8k, tokenizer)
        except data.NoData as error:
            rows += [
                {
                    **{"data": name, "tuning": tuning, "provider": provider, "layout": layout},
                    **{"status": "skipped", "reason": str(error)},
                }
                for tuning in options.tuning
                for provider, layout in trainers(options)
            ]
            continue
        data.write_pairs(folder / name, pairs, options.batch)
        for tuning in options.tuning:
            say(f"{name}, {tuning}")
            jobs = [job_of(options, *trainer, name, tuning, folder) for trainer in trainers(options)]
            missing = [job for job in jobs if (PROVIDERS[job.provider].floor, tuning) not in found]
            found |= floors(missing, folder, options.timeout)
            runners = measure(jobs, folder, options.timeout)
            rows += rows_of(name, runners, data.tokens_of_steps(pairs, options.batch, tokenizer), found)
    return rows


def trainers(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Providers, each with the layouts that it is measured with."""
    return [(name, layout) for name in options.providers for layout in layouts_of(name, options.layouts)]


def layouts_of(provider: str, asked: list[str]) -> list[str]:
    return asked if PROVIDERS[provider].lays else ["padded"]


def job_of(options: argparse.Namespace, provider: str, layout: str, name: str, tuning: str, folder: Path) -> Job:
    settings = ("steps", "warmups", "batch", "threads", "learning_rate", "workspace_mib", "gradient_checkpointing")
    return Job(
        provider,
        tuning,
        model=str(folder / "model"),
        pairs=str(folder / name),
        output=str(folder / f"{name}-{tuning}-{provider}-{layout}"),
        layout=layout,
        **{setting: getattr(options, setting) for setting in settings},
    )


if __name__ == "__main__":
    main()
