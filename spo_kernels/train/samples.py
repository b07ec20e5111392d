"""From a row to a checked sample: one prompt and its responses, as strings or as chat messages."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spo_kernels.train.errors import TrainError
from spo_kernels.train.records import Row

Messages = list[dict[str, str]]
Text = str | Messages


@dataclass(frozen=True)
class Sample:
    """A record's text and numbers. `responses` is (completion,) for sft and (chosen, rejected) for preference;
    `inputs` are what the loss reads of a pair, by its name for them.
    """

    where: str
    prompt: Text
    responses: tuple[Text, ...]
    inputs: dict[str, float] = field(default_factory=dict)


def sft_sample(where: str, row: Row) -> Sample:
    """From columns prompt and completion, or messages (the last one is what is learnt)."""
    if "messages" not in row or "completion" in row:
        prompt, completion = check_text(where, row, "prompt"), check_text(where, row, "completion")
        _check_same_form(where, prompt=prompt, completion=completion)
        return Sample(where, prompt, (completion,))
    messages = check_text(where, row, "messages")
    if isinstance(messages, str) or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise TrainError(f"{where}: messages must be a list of at least two, the last with role 'assistant'")
    return Sample(where, messages[:-1], (messages[-1:],))


def preference_sample(where: str, row: Row, columns: Mapping[str, str] | None = None) -> Sample:
    """From columns prompt, chosen and rejected; without a prompt, it is what the other two share.

    `columns` names the columns of further numbers, see `input_columns`.
    """
    chosen, rejected = check_text(where, row, "chosen"), check_text(where, row, "rejected")
    inputs = {
        name: check_number(where, row, column, f" (the loss's input {name}; --pair-input can name another column)")
        for name, column in (columns or {}).items()
    }
    prompt = None if row.get("prompt") is None else check_text(where, row, "prompt")
    # Some hub data sets (ultrafeedback_binarized) repeat the first message as a plain prompt.
    if prompt is not None and not _begins_with(chosen, prompt):
        _check_same_form(where, prompt=prompt, chosen=chosen, rejected=rejected)
        return Sample(where, prompt, (chosen, rejected), inputs)
    _check_same_form(where, chosen=chosen, rejected=rejected)
    n = _shared_prefix(chosen, rejected)
    if n == 0:
        raise TrainError(f"{where}: no column 'prompt', and chosen and rejected do not begin with a shared prompt")
    if not chosen[n:] or not rejected[n:] or chosen == rejected:
        raise TrainError(f"{where}: no column 'prompt', and nothing is left of a response after the shared prompt")
    return Sample(where, chosen[:n], (chosen[n:], rejected[n:]), inputs)


def split_by_prompt(samples: list[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Hold out a share of the *prompts*: all records of a prompt are on the same side.

    A random split of rows would put one prompt's pairs on both sides and measure memory.
    """
    keys = [json.dumps(s.prompt, sort_keys=True) for s in samples]
    prompts = list(dict.fromkeys(keys))
    order = np.random.default_rng(seed).permutation(len(prompts))
    held_out = {prompts[i] for i in order[: round(fraction * len(prompts))]}
    train = [s for s, key in zip(samples, keys, strict=True) if key not in held_out]
    evaluation = [s for s, key in zip(samples, keys, strict=True) if key in held_out]
    if not train or not evaluation:
        raise TrainError(
            f"--eval-fraction {fraction} of {len(prompts)} different prompts leaves {len(train)} records "
            f"to train on and {len(evaluation)} to evaluate on"
        )
    return train, evaluation


def _begins_with(messages: Text, prompt: Text) -> bool:
    return not isinstance(messages, str) and messages[0]["content"] == prompt


def _shared_prefix(a: Text, b: Text) -> int:
    """Length of the common prompt: whole messages, or whole words (a response keeps its leading space)."""
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    if not isinstance(a, str) or not isinstance(b, str):
        return n
    # "= 12" and "= 13" share "= 1", but the responses are 12 and 13.
    while n > 0 and not (a[n - 1].isspace() or (a[n : n + 1].isspace() and b[n : n + 1].isspace())):
        n -= 1
    # A space belongs to the word after it, as in most tokenizers; a line break ends the prompt.
    n -= a[:n].endswith(" ")
    return n if a[:n].strip() else 0


def check_text(where: str, row: Row, column: str) -> Text:
    """The string or chat messages in a column."""
    if column not in row:
        raise TrainError(f"{where}: no column {column!r}; the record has {', '.join(map(repr, row)) or 'none'}")
    value = row[column]
    if isinstance(value, str):
        _check_string(where, column, value)
        return value
    if not isinstance(value, list):
        raise TrainError(f"{where}: {column} must be a string or a list of chat messages, got {_kind(value)}")
    if not value:
        raise TrainError(f"{where}: {column} is an empty list of messages")
    return [_message(where, f"{column}[{i}]", message) for i, message in enumerate(value)]


def _message(where: str, name: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise TrainError(f"{where}: {name} must be an object with role and content, got {_kind(message)}")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise TrainError(f"{where}: {name}.{key} must be a string, got {_kind(message.get(key))}")
        _check_string(where, f"{name}.{key}", message[key])
    return {"role": message["role"], "content": message["content"]}


def _check_string(where: str, name: str, value: str) -> None:
    if not value.strip():
        raise TrainError(f"{where}: {name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TrainError(f"{where}: {name} is not valid Unicode: {error.reason} at character {error.start}") from error


def _check_same_form(where: str, **texts: Text) -> None:
    if len({isinstance(text, str) for text in texts.values()}) > 1:
        forms = ", ".join(f"{k} is {'a string' if isinstance(v, str) else 'messages'}" for k, v in texts.items())
        raise TrainError(f"{where}: all columns must be strings, or all chat messages; here {forms}")


def check_number(where: str, row: Row, column: str, use: str = "") -> float:
    """The finite number in a column; `use` says what for."""
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TrainError(f"{where}: {column} must be a finite number{use}, got {_kind(value)}")
    return float(value)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def count_same(samples: Iterable[Sample]) -> int:
    """Pairs whose chosen and rejected responses are equal: they teach nothing."""
    return sum(len(s.responses) == 2 and s.responses[0] == s.responses[1] for s in samples)
