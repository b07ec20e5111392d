"""Real preference pairs of grade-school maths, and a small model built from a configuration, SFT first.

A model of this size learns how correct solutions are written and cannot do the maths, so no answers are scored: what is
measured is which of two responses of held-out prompts it prefers, and how likely the chosen one stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from experiments.small_llama import Shape, build_model

from . import worker

SHAPE = Shape(vocabulary=2048, hidden=192, intermediate=512, layers=2, positions=512)
LIMIT = ["--max-length", SHAPE.positions, "--drop-overlong"]
SFT_OPTIONS = "--stage sft --batch-size 16 --warmup-steps 20 --learning-rate 2e-3 --schedule cosine"


def prepare(options: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """The SFT model of a seed."""
    corpus = options.data / "sft.jsonl"
    parameters = build_model(folder / "base", corpus, SHAPE, seed)
    arguments = ["--model", folder / "base", "--dataset", corpus, "--max-steps", options.sft_steps]
    worker.train(folder / "sft", [*arguments, *LIMIT, *SFT_OPTIONS.split(), "--seed", seed])
    return {"parameters": parameters}


def start(options: argparse.Namespace, folder: Path) -> worker.Start:
    """From that model, with a share of the prompts held out."""
    data = ["--dataset", options.data / "preferences.jsonl", "--eval-fraction", options.eval_fraction, *LIMIT]
    return worker.Start(folder / "sft", data, None)
