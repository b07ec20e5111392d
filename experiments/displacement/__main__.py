"""What preference objectives do to accuracy and to the likelihood of chosen responses, alone and inside SPO.

    python -m experiments.displacement                                      # arithmetic, see task_arithmetic.py
    python -m experiments.displacement --seeds 1 --objectives dpo simpo     # a look in minutes
    python -m experiments.displacement --task gsm8k --data ../shared/data/gsm8k      # see task_gsm8k.py
    python -m experiments.displacement --model SFT_MODEL --dataset pairs.jsonl --questions questions.jsonl \\
        --answer-pattern '#### (-?[\\d,]+)' --train-options '--bf16 --lora-r 16 --batch-size 4 --grad-accum 8'

SPO is a reconstruction, not verified against its paper: see `spo_kernels/losses/reconstructed/spo.py`. With --model,
--dataset is preference data as spo-train takes it, the model is the SFT model, and questions are JSON lines with a
prompt (a string or messages) and its answer; without them no answers are scored. A seed then orders the data and holds
prompts out. `experiments/real_model.py` makes such a model and data.
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

from . import report, task_arithmetic, worker
from .methods import OBJECTIVES, table
from .runs import TASKS, prepare, second_stage

LAST_MATCH = r"-?\d[\d,]*(?:\.\d+)?"
# What a resumed command may say otherwise.
FREE = ("output_dir", "resume", "processes", "commit")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.displacement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, default=Path("experiments/output/displacement"))
    parser.add_argument("--resume", action="store_true", help="go on in an --output-dir that the same command left")
    parser.add_argument("--task", choices=("arithmetic", "gsm8k"), default="arithmetic", help="without --model")
    parser.add_argument("--seeds", type=int, default=3, help="runs of everything, with seeds 0, 1, ... (default: 3)")
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES), metavar="NAME")
    parser.add_argument("--no-ablation", action="store_true", help="leave out SPO's other forms around DPO")
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=[5e-5], help="of second stages (default: 5e-5)"
    )
    parser.add_argument("--steps", type=int, help=f"optimizer steps of second stages ({_defaults('steps')})")
    parser.add_argument("--train-options", help=f"more options of spo-train ({_defaults('train_options')})")
    parser.add_argument("--sft-steps", type=int, help=f"optimizer steps of the SFT model ({_defaults('sft_steps')})")
    parser.add_argument("--eval-fraction", type=float, default=0.1, help="share of prompts held out (default: 0.1)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each (default: 1)")
    parser.add_argument("--render", type=Path, help="only make table and figure again, from this results.json")
    arithmetic = parser.add_argument_group("--task arithmetic")
    arithmetic.add_argument("--demonstrations", type=int, default=task_arithmetic.Size.demonstrations)
    arithmetic.add_argument("--pairs", type=int, default=task_arithmetic.Size.pairs)
    arithmetic.add_argument("--heldout", type=int, default=task_arithmetic.Size.heldout, help="questions and pairs")
    gsm8k = parser.add_argument_group("--task gsm8k")
    gsm8k.add_argument("--data", type=Path, help="folder of sft.jsonl and preferences.jsonl")
    own = parser.add_argument_group("your own model and data")
    own.add_argument("--model", help="SFT model: hub id or folder")
    own.add_argument("--dataset", help="preference data, as spo-train takes it")
    own.add_argument("--split", default="train", help="of a hub data set")
    own.add_argument("--questions", type=Path, help="JSON lines with prompt and answer")
    own.add_argument("--answer-pattern", default=LAST_MATCH, help="its last match is the answer (default: a number)")
    own.add_argument("--max-new-tokens", type=int, default=512)
    own.add_argument("--answer-batch", type=int, default=50, help="questions answered at a time (default: 50)")
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.dataset is None):
        parser.error("--model and --dataset go together")
    if options.model is not None:
        options.task = "own"
    if options.task == "gsm8k" and options.data is None:
        parser.error("--task gsm8k needs --data")
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    for name, value in TASKS[options.task].defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _defaults(name: str) -> str:
    return "default: " + ", ".join(f"{task} {part.defaults[name]}" for task, part in TASKS.items())


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.render is not None:
        write(json.loads(options.render.read_text()), options.render.parent)
        return 0
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    began = time.perf_counter()
    described = ["git", "describe", "--always", "--dirty"]
    options.commit = subprocess.run(described, capture_output=True, text=True).stdout.strip()
    try:
        claim(options)
        results = run_all(options, began)
    except worker.RunFailed as error:
        print(f"displacement: {error}", file=sys.stderr)
        return 1
    results = {"about": about(options, [*results["sft"], *results["runs"]]), **results}
    (options.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    write(results, options.output_dir)
    return 0


def claim(options: argparse.Namespace) -> None:
    """Refuse a folder that has something else in it than an earlier part of this command."""
    folder, path = options.output_dir, options.output_dir / "settings.json"
    settings = {name: str(value) for name, value in vars(options).items() if name not in FREE}
    if options.resume and path.exists():
        if json.loads(path.read_text()) != settings:
            raise worker.RunFailed(f"{folder} is of another command, see {path}")
    elif folder.exists() and any(folder.iterdir()):
        raise worker.RunFailed(f"{folder} is not empty; give another --output-dir, or --resume")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n")


def run_all(options: argparse.Namespace, began: float) -> dict[str, Any]:
    """Results of all SFT models and second stages."""
    methods = list(table(options.objectives, not options.no_ablation))
    seeds = range(options.seeds)
    pool = ProcessPoolExecutor(options.processes, get_context("spawn"), worker.start, (options.threads,))
    with pool:
        starts = []
        for start in pool.map(prepare, [options] * len(seeds), seeds):
            starts.append(start)
            report.say(f"SFT model, {report.line(start)}", began)
        jobs = [(seed, rate, method) for seed in seeds for rate in options.learning_rates for method in methods]
        runs = []
        for run in pool.map(second_stage, [options] * len(jobs), *zip(*jobs, strict=True)):
            runs.append(run)
            report.say(report.line(run), began)
    return {"sft": starts, "runs": runs}


def write(results: dict[str, Any], folder: Path) -> None:
    """tables.md and displacement.png; the former to the screen too."""
    text = report.markdown(results)
    (folder / "tables.md").write_text(text)
    report.draw(results, folder / "displacement.png")
    print(f"\n{text}\nwritten: {folder}/tables.md, displacement.png")


def about(options: argparse.Namespace, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What made the figures: command, commit (of each part, where it was resumed), machine, versions, time."""
    # without where the results went
    arguments = [a for a in sys.argv[1:] if a not in ("--resume", "--output-dir", str(options.output_dir))]
    seconds = [r["seconds"] + r.get("answer seconds", 0.0) for r in results]
    cpus = Path("/proc/cpuinfo")
    names = (
        {line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if line.startswith("model name")}
        if cpus.exists()
        else {platform.processor()}
    )
    return {
        "command": shlex.join(["python", "-m", "experiments.displacement", *arguments]),
        "commit": ", ".join(dict.fromkeys(r["commit"] for r in results)),
        "machine": ", ".join(sorted(names)) or platform.machine(),
        "threads": f"{options.processes} processes x {options.threads} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "minutes of one process": round(sum(seconds) / 60, 1),
        "methods": {m.name: shlex.join(m.options) for m in table(options.objectives, not options.no_ablation)},
    }


if __name__ == "__main__":
    sys.exit(main())
