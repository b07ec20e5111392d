"""What a model answers: its own solutions of problems, many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .task import Problem

BATCH = 100
MAX_NEW_TOKENS = 40  # the longest right solution has 23


def write_solutions(model: Any, tokenizer: Any, problems: Sequence[Problem], *, sample: bool) -> list[str]:
    """The model's own solutions."""
    inputs = tokenizer([p.prompt for p in problems], padding=True, return_tensors="pt", return_token_type_ids=False)
    # top_k=0: the whole distribution, not transformers' default of the best 50
    options = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
    outputs = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **options)
    return tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def batches(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
