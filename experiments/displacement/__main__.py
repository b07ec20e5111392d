"""What preference objectives do to accuracy and to the likelihood of chosen responses, alone and inside SPO.

    python -m experiments.displacement                                      # built-in task, under half an hour
    python -m experiments.displacement --seeds 1 --objectives dpo simpo     # a look in minutes
    python -m experiments.displacement --model SFT_MODEL --dataset pairs.jsonl --questions questions.jsonl \\
        --answer-pattern '#### (-?[\\d,]+)' --train-options '--bf16 --lora-r 16 --batch-size 4 --grad-accum 8'

The built-in task is arithmetic with written working, see `task.py`. SPO is a reconstruction, not verified against its
paper: see `spo_kernels/losses/reconstructed/spo.py`. With --model, --dataset is preference data as spo-train takes it,
the model is the SFT model, and questions are JSON lines with a prompt and its answer; a seed then only orders the
data.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers

from . import report, task, worker
from .methods import OBJECTIVES, table
from .runs import prepare, second_stage

LAST_MATCH = r"-?\d[\d,]*(?:\.\d+)?"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.displacement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, default=Path("experiments/output/displacement"))
    parser.add_argument("--seeds", type=int, default=3, help="runs of everything, with seeds 0, 1, ... (default: 3)")
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES), metavar="NAME")
    parser.add_argument("--no-ablation", action="store_true", help="leave out SPO's other forms around DPO")
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=[5e-5, 2e-4], help="of second stages (default: 5e-5 2e-4)"
    )
    parser.add_argument("--steps", type=int, default=125, help="optimizer steps of second stages (default: 125)")
    parser.add_argument(
        "--train-options", default="--batch-size 16 --warmup-steps 10", help="more options of spo-train"
    )
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each (default: 1)")
    parser.add_argument("--render", type=Path, help="only make table and figure again, from this results.json")
    builtin = parser.add_argument_group("built-in task")
    builtin.add_argument("--sft-steps", type=int, default=290, help="stops short of full marks (default: 290)")
    builtin.add_argument("--demonstrations", type=int, default=task.Size.demonstrations)
    builtin.add_argument("--pairs", type=int, default=task.Size.pairs)
    builtin.add_argument("--heldout", type=int, default=task.Size.heldout, help="questions and held-out pairs")
    own = parser.add_argument_group("your own model and data, instead of the built-in task")
    own.add_argument("--model", help="SFT model: hub id or folder")
    own.add_argument("--dataset", help="preference data, as spo-train takes it")
    own.add_argument("--split", default="train", help="of a hub data set")
    own.add_argument("--eval-fraction", type=float, default=0.1, help="share of prompts held out (default: 0.1)")
    own.add_argument("--questions", type=Path, help="JSON lines with prompt and answer")
    own.add_argument("--answer-pattern", default=LAST_MATCH, help="its last match is the answer (default: a number)")
    own.add_argument("--max-new-tokens", type=int, default=512)
    options = parser.parse_args(arguments)
    given = [options.model, options.dataset, options.questions]
    if any(v is not None for v in given) and None in given:
        parser.error("--model, --dataset and --questions go together")
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.render is not None:
        write(json.loads(options.render.read_text()), options.render.parent)
        return 0
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    began = time.perf_counter()
    made_by = about(options)
    methods = list(table(options.objectives, not options.no_ablation))
    seeds = range(options.seeds)
    if options.output_dir.exists() and any(options.output_dir.iterdir()):
        print(f"displacement: {options.output_dir} is not empty; give another --output-dir", file=sys.stderr)
        return 1
    pool = ProcessPoolExecutor(options.processes, get_context("spawn"), worker.start, (options.threads,))
    try:
        with pool:
            starts = list(pool.map(prepare, [options] * len(seeds), seeds))
            report.say(f"SFT models: accuracy {[round(s['accuracy'], 3) for s in starts]}", began)
            jobs = [(seed, rate, method) for seed in seeds for rate in options.learning_rates for method in methods]
            runs = []
            results = pool.map(second_stage, [options] * len(jobs), *zip(*jobs, strict=True))
            for (seed, rate, method), result in zip(jobs, results, strict=True):
                runs.append({"seed": seed, "learning rate": rate, "method": method.name, **result})
                report.say(f"seed {seed}, rate {rate:g}, {method.name}: accuracy {result['accuracy']:.3f}", began)
    except worker.RunFailed as error:
        print(f"displacement: {error}", file=sys.stderr)
        return 1
    made_by["minutes"] = round((time.perf_counter() - began) / 60, 1)
    results = {"about": made_by, "sft": starts, "runs": runs}
    (options.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    write(results, options.output_dir)
    return 0


def write(results: dict[str, Any], folder: Path) -> None:
    """tables.md and displacement.png; the former to the screen too."""
    text = report.markdown(results)
    (folder / "tables.md").write_text(text)
    report.draw(results, folder / "displacement.png")
    print(f"\n{text}\nwritten: {folder}/tables.md, displacement.png")


def about(options: argparse.Namespace) -> dict[str, Any]:
    """What made the figures: command, commit, machine, versions."""
    # without where the results went
    arguments = [a for a in sys.argv[1:] if a not in ("--output-dir", str(options.output_dir))]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    cpus = Path("/proc/cpuinfo")
    names = (
        {line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if line.startswith("model name")}
        if cpus.exists()
        else {platform.processor()}
    )
    return {
        "command": shlex.join(["python", "-m", "experiments.displacement", *arguments]),
        "commit": commit,
        "machine": ", ".join(sorted(names)) or platform.machine(),
        "threads": f"{options.processes} processes x {options.threads} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "methods": {m.name: shlex.join(m.options) for m in table(options.objectives, not options.no_ablation)},
    }


if __name__ == "__main__":
    sys.exit(main())
