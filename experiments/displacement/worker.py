"""Training and scoring of one model in one process: `spo-train`, then greedy answers."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from statistics import mean
from threading import Thread
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from spo_kernels.train.cli import main as spo_train


class RunFailed(Exception):
    """spo-train ended with another exit status than 0; it has said why."""


@dataclass(frozen=True)
class Score:
    """One model on held-out pairs relative to the SFT model, log-probs in nats per response; speed of its training."""

    pairs: dict[str, float]
    tokens_per_second: float


@dataclass(frozen=True)
class Questions:
    """A file of {prompt, answer} and how to read an answer from a response: the pattern's last match."""

    path: Path
    pattern: str
    max_new_tokens: int
    batch_size: int = 250


@dataclass(frozen=True)
class Start:
    """What the second stages of a seed have in common: the SFT model, data as options of spo-train, and questions."""

    model: Path | str
    data: list[Any]
    questions: Questions | None  # None: no answers are scored


def start(threads: int) -> None:
    """Once per process."""
    os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(threads)
    disable_progress_bar()
    if parent := parent_process():
        Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: Any) -> None:
    """End when the command was ended: what it would write could meet what a resumed command writes."""
    parent.join()
    os._exit(1)


def train(output: Path, arguments: Sequence[Any]) -> None:
    """spo-train into `output`."""
    status = spo_train(["--quiet", "--save-steps", "0", "--output-dir", str(output), *map(str, arguments)])
    if status:
        raise RunFailed(f"spo-train into {output} ended with status {status}")


def score(folder: Path) -> Score:
    """The last evaluation of the run in `folder`."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if line["split"] == "eval"]
    pairs = {
        "chosen before": first["logps/chosen"],
        "chosen change": last["logps/chosen"] - first["logps/chosen"],
        "rejected change": last["logps/rejected"] - first["logps/rejected"],
        "displaced": last["diagnostics/chosen_fell/share"],
        "both fell": last["diagnostics/both_fell/share"],
        "lost mass": last["diagnostics/lost_mass/nats"],
        "preferred before": first["logps/accuracies"],
        "preferred": last["logps/accuracies"],
        "rewarded": last["diagnostics/margin_rose/share"],
    }
    return Score(pairs, mean(line["tokens_per_second"] for line in lines if line["split"] == "train"))


@torch.no_grad()
def answer(model: Path | str, questions: Questions, folder: Path) -> dict[str, float]:
    """Share of questions whose greedy response ends in the right answer; responses go to answers.jsonl in `folder`."""
    began = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    rows = [json.loads(line) for line in questions.path.read_text().splitlines() if line.strip()]
    reader = answer_reader(questions.pattern)
    for start in range(0, len(rows), questions.batch_size):
        batch = rows[start : start + questions.batch_size]
        inputs = _encoded(tokenizer, [row["prompt"] for row in batch])
        written = loaded.generate(**inputs, max_new_tokens=questions.max_new_tokens, do_sample=False)
        texts = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(batch, texts, strict=True):
            row.update(response=text, right=reader(text) == str(row["answer"]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"accuracy": mean(row["right"] for row in rows), "answer seconds": time.perf_counter() - began}


def _encoded(tokenizer: Any, prompts: list[Any]) -> Any:
    """Strings as they are; messages through the chat template, up to where the reply begins."""
    if isinstance(prompts[0], str):
        return tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    return tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )


def answer_reader(pattern: str) -> Callable[[str], str | None]:
    """From a response to its answer: the pattern's last match, without thousands separators and zeros for cents."""
    compiled = re.compile(pattern, re.MULTILINE)

    def read(text: str) -> str | None:
        found = compiled.findall(text)
        return re.sub(r"\.0+$", "", found[-1].replace(",", "")) if found else None

    return read
