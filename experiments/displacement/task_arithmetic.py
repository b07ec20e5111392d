"""Arithmetic: two-digit sums and differences worked column by column, see `arithmetic/task.py`.

An SFT model is trained on demonstrations of which a share has a slip in it, and stops before it is good at the task.
Preference pairs for other problems: chosen is the right solution, rejected a wrong one that this model itself wrote.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from arithmetic.answers import MAX_NEW_TOKENS, batches, write_solutions
from arithmetic.model import save_base
from arithmetic.records import write_jsonl
from arithmetic.task import Problem, Record, is_right, problems, sft_record, solve, solve_badly

from . import worker

SAMPLES = 8  # draws per problem in search of a wrong solution

# How an answer is read from a response, and the right one from the column "answer".
ANSWER_PATTERN = r"^A: (\d+)$"
SFT_OPTIONS = "--stage sft --batch-size 32 --warmup-steps 20 --learning-rate 2e-3"


@dataclass(frozen=True)
class Size:
    """How much data there is; no problem is in more than one part."""

    demonstrations: int = 6000
    pairs: int = 2000
    heldout: int = 500
    sloppiness: float = 0.5


def prepare(options: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """The SFT model of a seed and its pairs."""
    parts = write_base(folder, Size(options.demonstrations, options.pairs, options.heldout), seed)
    arguments = ["--model", folder / "base", "--dataset", folder / "sft.jsonl", "--max-steps", options.sft_steps]
    worker.train(folder / "sft", [*arguments, *SFT_OPTIONS.split(), "--seed", seed])
    return write_pairs(folder, parts, seed)


def start(options: argparse.Namespace, folder: Path) -> worker.Start:
    """From that model, with all of the held-out problems asked."""
    data = ["--dataset", folder / "pairs.jsonl", "--eval-dataset", folder / "heldout.jsonl"]
    return worker.Start(
        folder / "sft", data, worker.Questions(folder / "questions.jsonl", ANSWER_PATTERN, MAX_NEW_TOKENS)
    )


def write_base(folder: Path, size: Size, seed: int) -> dict[str, list[Problem]]:
    """SFT data, questions and a random model with its tokenizer; returns the problems of each part."""
    rng = random.Random(seed)
    supply = problems(rng)
    names = {"heldout": size.heldout, "pairs": size.pairs, "demonstrations": size.demonstrations}
    parts = {name: list(islice(supply, count)) for name, count in names.items()}
    folder.mkdir(parents=True)
    demonstrations = [sft_record(p, size.sloppiness, rng) for p in parts["demonstrations"]]
    write_jsonl(folder / "sft.jsonl", demonstrations)
    write_jsonl(folder / "questions.jsonl", ({"prompt": p.prompt, "answer": str(p.answer)} for p in parts["heldout"]))
    save_base(folder / "base", [text for record in demonstrations for text in record.values()], seed)
    return parts


def write_pairs(folder: Path, parts: dict[str, list[Problem]], seed: int) -> dict[str, float]:
    """Preference files from what the SFT model in `folder` writes; returns what is worth knowing about them."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft")
    model = AutoModelForCausalLM.from_pretrained(folder / "sft").eval()
    torch.manual_seed(seed)
    rng = random.Random(seed)
    facts = {}
    for name in ("pairs", "heldout"):
        wrong, right_share = _wrong_samples(model, tokenizer, parts[name])
        facts[f"{name}: share of samples that are right"] = right_share
        facts[f"{name}: share of rejected responses sampled from the model"] = sum(
            text is not None for text in wrong
        ) / len(wrong)
        records = [_pair(p, text, rng) for p, text in zip(parts[name], wrong, strict=True)]
        write_jsonl(folder / f"{name}.jsonl", records)
    return facts


def _pair(problem: Problem, wrong: str | None, rng: random.Random) -> Record:
    """A problem whose samples were all right gets a slip of the task's making."""
    rejected = solve_badly(problem, rng) if wrong is None else wrong
    return {"prompt": problem.prompt, "chosen": solve(problem), "rejected": rejected}


@torch.no_grad()
def _wrong_samples(model: object, tokenizer: object, asked: Sequence[Problem]) -> tuple[list[str | None], float]:
    """The first wrong one of each problem's samples, None where all were right; and the share that were right."""
    wrong: list[str | None] = []
    right = 0
    for batch in batches(asked):
        repeated = [p for p in batch for _ in range(SAMPLES)]
        texts = write_solutions(model, tokenizer, repeated, sample=True)
        correct = [is_right(p, text) for p, text in zip(repeated, texts, strict=True)]
        right += sum(correct)
        for start in range(0, len(texts), SAMPLES):
            draws = zip(texts[start : start + SAMPLES], correct[start : start + SAMPLES], strict=True)
            wrong.append(next((text for text, ok in draws if not ok and text.strip()), None))
    return wrong, right / (SAMPLES * len(asked))
