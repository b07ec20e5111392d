"""From nothing to a preference-trained model: data, base model, SFT, SPO, before and after, on a CPU in minutes.

    python -m examples.demo --output-dir demo-output

Half of the SFT demonstrations contain a slip, so the SFT model makes slips too. The preference data say which of two
solutions is the right one. SPO trains on them from the SFT model. So do others, for comparison: plain DPO, at the same
learning rate and at one that suits it, and SFT on the chosen solutions alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from arithmetic.model import save_base
from arithmetic.records import read_jsonl
from arithmetic.task import PROBLEMS

from . import cost, plots
from .data import Files, Heldout, write_data
from .evaluate import Scores, evaluate
from .report import describe_scores
from .train import SECOND_STAGES, TrainingFailed, train_second, train_sft

RESULTS = "demo.json"  # also the mark of a folder that the demo may empty
FOLDERS = ("data", "base", "sft", *SECOND_STAGES)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description=(__doc__ or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--output-dir", type=Path, default=Path("demo-output"), help="folder for all that is written")
    made.add_argument("--seed", type=int, default=0, help="of data, model, training and sampling")
    made.add_argument("--threads", type=positive, default=min(2, os.cpu_count() or 1), help="CPU threads of every step")
    made.add_argument("--demonstrations", type=positive, default=6000, help="SFT records")
    made.add_argument("--sloppiness", type=float, default=0.5, help="share of SFT records with a slip in them")
    made.add_argument("--pairs", type=positive, default=3000, help="preference pairs")
    made.add_argument("--heldout", type=positive, default=300, help="problems to evaluate on")
    made.add_argument("--sft-steps", type=positive, default=400, help="optimizer steps of the first stage")
    made.add_argument("--second-steps", type=positive, default=120, help="optimizer steps of each second stage")
    made.add_argument(
        "--second-stages", nargs="+", default=list(SECOND_STAGES), choices=list(SECOND_STAGES), help="which to run"
    )
    made.add_argument(
        "--cost-vocab", type=positive, default=32768, help="vocabulary of the loss whose cost is measured"
    )
    made.add_argument("--cost-tokens", type=positive, default=512, help="tokens per sequence of that loss")
    return made


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def main(arguments: list[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(arguments)
    if options.demonstrations + options.pairs + options.heldout > PROBLEMS:
        made.error(f"--demonstrations, --pairs and --heldout need different problems, and there are only {PROBLEMS}")
    # The processes that the demo starts read the variable.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    try:
        prepare_output(options.output_dir)
        run(options)
    except (TrainingFailed, cost.MeasuringFailed, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def prepare_output(output: Path) -> None:
    """An empty folder, or one that an earlier demo wrote, emptied."""
    if output.exists() and any(output.iterdir()) and not (output / RESULTS).exists():
        raise FileExistsError(f"{output} is not empty, and this demo did not write it; give another --output-dir")
    for name in FOLDERS:
        shutil.rmtree(output / name, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / RESULTS).write_text("{}\n")


def run(options: argparse.Namespace) -> None:
    output, files, started = options.output_dir, Files(options.output_dir / "data"), time.perf_counter()
    with step("data, tokenizer and base model"):
        heldout = make_inputs(options, files)
    scores = {"base": score(options, "base", heldout)}
    with step(f"SFT on demonstrations, {options.sloppiness:.0%} of them with a slip"):
        train_sft(output / "base", output / "sft", files, options.sft_steps, options.seed)
        scores["sft"] = score(options, "sft", heldout)
    for name in options.second_stages:
        with step(f"second stage: {SECOND_STAGES[name].label}"):
            train_second(name, output / "sft", output / name, files, options.second_steps, options.seed)
            scores[name] = score(options, name, heldout)
    with step("time and memory of the loss"):
        costs = cost.measure(tokens=options.cost_tokens, vocab=options.cost_vocab, threads=options.threads)
    with step("plots"):
        drawn = plots.draw_all(output, scores, costs)
    results = {"scores": {k: asdict(v) for k, v in scores.items()}, **asdict(costs)}
    (output / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{describe_scores(scores, options.heldout)}\n\n{costs.describe()}\n")
    print(f"plots: {' '.join(map(str, drawn))}")
    print(f"models, data, metrics.jsonl: {output}/   figures: {output / RESULTS}")
    print(f"{time.perf_counter() - started:.0f} s in all")


def make_inputs(options: argparse.Namespace, files: Files) -> Heldout:
    """Write data, tokenizer and base model, and show one pair."""
    heldout = write_data(
        files,
        demonstrations=options.demonstrations,
        pairs=options.pairs,
        heldout=options.heldout,
        sloppiness=options.sloppiness,
        seed=options.seed,
    )
    texts = [text for record in read_jsonl(files.sft) for text in record.values()]
    parameters = save_base(options.output_dir / "base", texts, options.seed)
    pair = heldout.pairs[0]
    print(f"{options.demonstrations} demonstrations, {options.pairs} pairs, {options.heldout} problems held out")
    print(f"base model: {parameters / 1e6:.1f} M parameters\n\nprompt:   {pair['prompt']}", end="")
    print(f"chosen:   {_indent(pair['chosen'])}\nrejected: {_indent(pair['rejected'])}")
    return heldout


def _indent(text: str) -> str:
    return text.replace("\n", "\n" + 10 * " ")


def score(options: argparse.Namespace, name: str, heldout: Heldout) -> Scores:
    return evaluate(options.output_dir / name, heldout.problems, heldout.pairs, options.seed)


@contextmanager
def step(title: str) -> Iterator[None]:
    """Announce a step, and say how long it took."""
    print(f"\n== {title}", flush=True)
    started = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
