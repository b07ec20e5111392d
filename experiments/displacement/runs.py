"""The two stages of a seed: an SFT model with its pairs, then one method from it. Each runs in a worker process.

What a stage gave stands in its folder as result.json, from where it is read when the command is resumed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spo_kernels.train.files import whole

from . import task_arithmetic, task_gsm8k, task_own, worker
from .methods import Method

RESULT = "result.json"


@dataclass(frozen=True)
class Task:
    """How an SFT model comes to be, what second stages from it are given, and options that were not set."""

    prepare: Callable[[argparse.Namespace, Path, int], dict[str, Any]]
    start: Callable[[argparse.Namespace, Path], worker.Start]
    defaults: dict[str, Any]


TASKS = {
    # Its SFT stops short of full marks.
    "arithmetic": Task(
        task_arithmetic.prepare,
        task_arithmetic.start,
        {"sft_steps": 290, "steps": 125, "train_options": "--batch-size 16 --warmup-steps 10"},
    ),
    "gsm8k": Task(
        task_gsm8k.prepare,
        task_gsm8k.start,
        {"sft_steps": 150, "steps": 40, "train_options": "--batch-size 8 --warmup-steps 5"},
    ),
    "own": Task(
        task_own.prepare,
        task_own.start,
        {"sft_steps": 0, "steps": 125, "train_options": "--batch-size 16 --warmup-steps 10"},
    ),
}


def prepare(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The SFT model of a seed, its pairs and its answers."""
    folder = options.output_dir / f"seed-{seed}"
    task = TASKS[options.task]

    def make() -> dict[str, Any]:
        began = time.perf_counter()
        facts = task.prepare(options, folder, seed)
        start = task.start(options, folder)
        seconds = time.perf_counter() - began
        answers = start.questions and worker.answer(start.model, start.questions, folder)
        return {"seed": seed, "commit": options.commit, **facts, "seconds": seconds, **(answers or {})}

    return _once(folder, make)


def second_stage(options: argparse.Namespace, seed: int, rate: float, method: Method) -> dict[str, Any]:
    """Train one method from the SFT model, and score it."""
    folder = options.output_dir / f"seed-{seed}"
    output = folder / f"{method.name}-{rate:g}"
    start = TASKS[options.task].start(options, folder)
    arguments = ["--model", start.model, *start.data, "--seed", seed, *method.options]
    arguments += ["--diagnostics", "--cache-dir", folder / "cache"]
    arguments += ["--learning-rate", rate, "--max-steps", options.steps]

    def make() -> dict[str, Any]:
        began = time.perf_counter()
        worker.train(output, [*arguments, *shlex.split(options.train_options)])
        seconds = time.perf_counter() - began
        answers = start.questions and worker.answer(output, start.questions, output)
        named = {"seed": seed, "commit": options.commit, "learning rate": rate, "method": method.name}
        return {**named, **asdict(worker.score(output)), "seconds": seconds, **(answers or {})}

    return _once(output, make)


def _once(folder: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns, now or in an earlier part of the command; what was left unfinished then is begun anew."""
    path = folder / RESULT
    if not path.exists():
        shutil.rmtree(folder, ignore_errors=True)
        result = make()
        folder.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
    return json.loads(path.read_text())
