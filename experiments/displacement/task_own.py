"""A user's SFT model and preference data, with questions where their answers can be read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import worker


def prepare(options: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """The SFT model is there."""
    return {}


def start(options: argparse.Namespace, folder: Path) -> worker.Start:
    """From the model, with a share of the prompts held out; the seed says which, and orders the data."""
    data = ["--dataset", options.dataset, "--split", options.split, "--eval-fraction", options.eval_fraction]
    questions = options.questions and worker.Questions(
        options.questions, options.answer_pattern, options.max_new_tokens, batch_size=options.answer_batch
    )
    return worker.Start(options.model, data, questions)
