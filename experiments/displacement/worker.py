"""Training and scoring of one model in one process: `spo-train`, then greedy answers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from spo_kernels.train.cli import main as spo_train


class RunFailed(Exception):
    """spo-train ended with another exit status than 0; it has said why."""


@dataclass(frozen=True)
class Score:
    """One model: greedy accuracy, and held-out pairs relative to the SFT model; log-probs in nats per response."""

    accuracy: float
    pairs: dict[str, float]


@dataclass(frozen=True)
class Questions:
    """A file of {prompt, answer} and how to read an answer from a response: the pattern's last match."""

    path: Path
    pattern: str
    max_new_tokens: int
    limit: int = 0
    batch_size: int = 250


def start(threads: int) -> None:
    """Once per process."""
    os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(threads)
    disable_progress_bar()


def train(output: Path, arguments: Sequence[Any]) -> None:
    """spo-train into `output`."""
    status = spo_train(["--quiet", "--save-steps", "0", "--output-dir", str(output), *map(str, arguments)])
    if status:
        raise RunFailed(f"spo-train into {output} ended with status {status}")


def score(folder: Path, questions: Questions) -> Score:
    """Answers of the model in `folder`, and the last evaluation of its run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if line["split"] == "eval"]
    pairs = {
        "chosen change": last["logps/chosen"] - first["logps/chosen"],
        "rejected change": last["logps/rejected"] - first["logps/rejected"],
        "displaced": last["diagnostics/chosen_fell/share"],
        "both fell": last["diagnostics/both_fell/share"],
        "lost mass": last["diagnostics/lost_mass/nats"],
        "preferred": last["logps/accuracies"],
    }
    return Score(accuracy(folder, questions), pairs)


@torch.no_grad()
def accuracy(folder: Path, questions: Questions) -> float:
    """Share of questions whose greedy response ends in the right answer."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = [json.loads(line) for line in questions.path.read_text().splitlines() if line.strip()]
    rows = rows[: questions.limit or None]
    reader = answer_reader(questions.pattern)
    right = 0
    for start in range(0, len(rows), questions.batch_size):
        batch = rows[start : start + questions.batch_size]
        inputs = tokenizer([r["prompt"] for r in batch], padding=True, return_tensors="pt", return_token_type_ids=False)
        written = model.generate(**inputs, max_new_tokens=questions.max_new_tokens, do_sample=False)
        texts = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(reader(text) == str(r["answer"]) for text, r in zip(texts, batch, strict=True))
    return right / len(rows)


def answer_reader(pattern: str) -> Callable[[str], str | None]:
    """From a response to its answer: the pattern's last match, without thousands separators."""
    compiled = re.compile(pattern, re.MULTILINE)

    def read(text: str) -> str | None:
        found = compiled.findall(text)
        return found[-1].replace(",", "") if found else None

    return read
