"""Preference pairs in the order of the steps, a tokenizer for them, and a random model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..encoding import sentences, train_tokenizer
from .settings import MAX_LENGTH, Shape

# Tokens of a prompt and of a response, from and to.
SHAPES = {"tldr": ((350, 450), (30, 60)), "ultrafeedback": ((100, 300), (200, 500))}
NAMES = ("gsm8k", *SHAPES)
Pair = dict[str, str]


class NoData(Exception):
    """A data set that this machine lacks."""


def build_model(folder: Path, gsm8k: Path, shape: Shape) -> Any:
    """Model and tokenizer as transformers loads them; returns the tokenizer."""
    from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

    said = sentences(random.Random(1))
    texts = [next(said) for _ in range(10_000)]
    texts += [row[key] for row in records(gsm8k / "sft.jsonl") for key in ("prompt", "completion")]
    tokenizer = train_tokenizer(texts, shape.vocabulary)
    tokenizer.save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return tokenizer


def make_pairs(name: str, count: int, gsm8k: Path, tokenizer: Any) -> list[Pair]:
    """`count` pairs: real ones of `preferences.jsonl`, drawn by a fixed seed, or generated.

    Raises:
        NoData: There is no such file, or it has too few pairs.
    """
    rng = random.Random(0)
    if name in SHAPES:
        return [pair for pair, _ in zip(generated(name, rng, tokenizer), range(count), strict=False)]
    path = gsm8k / "preferences.jsonl"
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in records(path)]
    if len(rows) < count:
        raise NoData(f"{path}: {count} pairs are needed, got {len(rows)}")
    return rng.sample(rows, count)


def records(path: Path) -> list[dict[str, Any]]:
    """JSON lines; nothing where there is no such file."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [json.loads(line) for line in lines if line]


def generated(name: str, rng: random.Random, tokenizer: Any) -> Iterator[Pair]:
    """Endless pairs of made-up words, with lengths drawn evenly between the shape's bounds."""
    prompt, response = SHAPES[name]
    words = (word for sentence in sentences(rng) for word in sentence.split())

    def text(low: int, high: int) -> str:
        length, found, said = rng.randint(low, high), 0, ""
        while found < length:
            word = f" {next(words)}"
            found += len(tokenizer(word)["input_ids"])
            # a word may be longer than the room between the bounds
            said += word if found <= high else ""
        return said

    while True:
        yield {"prompt": text(*prompt), "chosen": text(*response), "rejected": text(*response)}


def write_pairs(folder: Path, pairs: list[Pair], batch: int) -> None:
    """`ordered.jsonl`, to be read in order; `drawn.jsonl`, which gives the same batches in the order of `spo-train`."""
    from spo_kernels.integrations.token_batches import step_indices

    folder.mkdir()
    drawn: list[Pair] = [{}] * len(pairs)
    for step in range(len(pairs) // batch):
        places = step_indices(step, len(pairs), batch, seed=0)
        for place, pair in zip(places, pairs[step * batch :], strict=False):
            drawn[place] = pair
    for name, rows in (("ordered.jsonl", pairs), ("drawn.jsonl", drawn)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tokens_of_steps(pairs: list[Pair], batch: int, tokenizer: Any) -> list[int]:
    """Tokens of prompt and response of both responses, with the end token, no padding; one count a step."""

    def count(pair: Pair) -> int:
        lengths = {key: len(tokenizer(text)["input_ids"]) for key, text in pair.items()}
        return 2 * lengths["prompt"] + lengths["chosen"] + lengths["rejected"] + 2

    counts = [count(pair) for pair in pairs]
    return [sum(counts[i : i + batch]) for i in range(0, len(pairs), batch)]
