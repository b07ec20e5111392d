"""The two stages of a seed: an SFT model with its pairs, then one method from it. Each runs in a worker process."""

from __future__ import annotations

import argparse
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arithmetic.answers import MAX_NEW_TOKENS

from . import task, worker
from .methods import Method

SFT_OPTIONS = "--stage sft --batch-size 32 --warmup-steps 20 --learning-rate 2e-3"


def prepare(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The SFT model of a seed, its pairs and its score."""
    folder = options.output_dir / f"seed-{seed}"
    facts: dict[str, float] = {}
    if options.model is None:
        size = task.Size(options.demonstrations, options.pairs, options.heldout)
        parts = task.write_base(folder, size, seed)
        arguments = ["--model", folder / "base", "--dataset", folder / "sft.jsonl", "--max-steps", options.sft_steps]
        worker.train(folder / "sft", [*arguments, *SFT_OPTIONS.split(), "--seed", seed])
        facts = task.write_pairs(folder, parts, seed)
    model = folder / "sft" if options.model is None else options.model
    return {"seed": seed, **facts, "accuracy": worker.accuracy(model, questions(options, folder))}


def second_stage(options: argparse.Namespace, seed: int, rate: float, method: Method) -> dict[str, Any]:
    """Train one method from the SFT model, and score it."""
    folder = options.output_dir / f"seed-{seed}"
    builtin = options.model is None
    model = folder / "sft" if builtin else options.model
    data = str(folder / "pairs.jsonl") if builtin else options.dataset
    held_out = ["--eval-dataset", folder / "heldout.jsonl"] if builtin else ["--eval-fraction", options.eval_fraction]
    arguments = ["--model", model, "--dataset", data, "--seed", seed, *held_out, *method.options]
    arguments += ["--split", options.split, "--diagnostics", "--cache-dir", folder / "cache"]
    arguments += ["--learning-rate", rate, "--max-steps", options.steps]
    began = time.perf_counter()
    output = folder / f"{method.name}-{rate:g}"
    worker.train(output, [*arguments, *shlex.split(options.train_options)])
    seconds = time.perf_counter() - began
    return {**asdict(worker.score(output, questions(options, folder))), "seconds": seconds}


def questions(options: argparse.Namespace, folder: Path) -> worker.Questions:
    if options.model is None:
        return worker.Questions(folder / "questions.jsonl", task.ANSWER_PATTERN, MAX_NEW_TOKENS)
    return worker.Questions(options.questions, options.answer_pattern, options.max_new_tokens)
