"""200,000 short preference pairs to token ids: CPU seconds, and memory beyond the data.

python -m benchmarks.encoding [--pairs 200000] [--chat] [--tokenizer NAME] [--processes 1]
    [--limit-seconds 60 --limit-gib 1]

Pairs of made-up words are written to a file of JSON lines, which `encode` reads. The tokenizer is a byte-level BPE
trained on such words, unless another is named.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .machine import describe_machine, machine_line
from .measure import peak_bytes, release_freed_memory, reset_peak, resident_bytes

GIB = 2**30
SYLLABLES = [c + v for c in ("b", "d", "k", "l", "m", "n", "p", "r", "s", "t") for v in "aeiou"]
# As Zephyr's, with a token of its own for each role.
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.encoding",
        description="Encode generated preference pairs; prints CPU seconds and memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--pairs", type=int, default=200_000, help="records to encode")
    made.add_argument("--chat", action="store_true", help="chat messages, through a template, instead of strings")
    made.add_argument("--tokenizer", help="of transformers: hub id or folder")
    made.add_argument("--processes", type=int, default=1, help="processes that encode")
    made.add_argument("--limit-seconds", type=float, help="exit with status 1 where more CPU time is spent")
    made.add_argument("--limit-gib", type=float, help="exit with status 1 where more memory is taken")
    return made


def sentences(rng: random.Random) -> Iterator[str]:
    """Endless sentences of words that are drawn by rank, as words of a language are."""
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(5000)]
    weights = [1 / rank for rank in range(10, len(words) + 10)]
    while True:
        drawn = iter(rng.choices(words, weights, k=100_000))
        for first in drawn:
            rest = [word for word, _ in zip(drawn, range(rng.randint(4, 12)), strict=False)]
            yield " ".join([first.capitalize(), *rest]) + rng.choice(".!?")


def records(pairs: int, chat: bool) -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    said = sentences(rng)
    for _ in range(pairs):
        prompt, *replies = (" ".join(next(said) for _ in range(rng.randint(1, 4))) for _ in range(3))
        if chat:
            user, *turns = (
                [{"role": role, "content": text}]
                for role, text in zip(("user", "assistant", "assistant"), (prompt, *replies), strict=True)
            )
            yield {"prompt": user, "chosen": turns[0], "rejected": turns[1]}
        else:
            yield {"prompt": f"Question: {prompt}\nAnswer:", "chosen": f" {replies[0]}", "rejected": f" {replies[1]}"}


def build_tokenizer() -> Any:
    """Of made-up words, with a chat template."""
    said = sentences(random.Random(1))
    tokenizer = train_tokenizer((next(said) for _ in range(10_000)), 4000, ("<|user|>", "<|assistant|>", "<|end|>"))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocabulary: int, roles: tuple[str, ...] = ()) -> Any:
    """Byte-level BPE with token ids 0 `<pad>` and 1 `</s>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "</s>", *roles],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", additional_special_tokens=list(roles)
    )


def measure(data: Path, tokenizer: Any, processes: int) -> dict[str, float]:
    """CPU seconds of this process and of those that it starts; bytes beyond those resident before."""
    import datasets

    from spo_kernels.data import Encoding, encode, read_records

    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = data.parent
    release_freed_memory()
    reset_peak()
    before, start, cpu = resident_bytes(), time.perf_counter(), cpu_seconds()
    examples = encode(read_records(str(data)), tokenizer, Encoding(), print, processes)
    return {
        "wall": time.perf_counter() - start,
        "cpu": cpu_seconds() - cpu,
        "extra": peak_bytes() - before,
        "tokens": sum(len(column.values) for column in id_columns(examples)),
    }


def id_columns(examples: Any) -> Iterator[Any]:
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        yield from examples.dataset.data.column(name).chunks


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main(arguments: list[str] | None = None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    chosen = parser().parse_args(arguments)
    if chosen.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(chosen.tokenizer)
    else:
        tokenizer = build_tokenizer()
    with tempfile.TemporaryDirectory(prefix="spo-bench-") as folder:
        data = Path(folder) / "pairs.jsonl"
        with data.open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in records(chosen.pairs, chosen.chat))
        size = data.stat().st_size
        figures = measure(data, tokenizer, chosen.processes)
    print(machine_line(describe_machine(0)))
    form = "messages" if chosen.chat else "strings"
    print(f"{chosen.pairs} pairs of {form}, {size / 1e6:.0f} MB, {figures['tokens'] / 1e6:.1f} million tokens")
    print(
        f"{figures['cpu']:.1f} s of CPU, {figures['wall']:.1f} s on the clock, "
        f"peak RSS {figures['extra'] / GIB:.3f} GiB above the one before"
    )
    over = [chosen.limit_seconds and figures["cpu"] > chosen.limit_seconds]
    over.append(chosen.limit_gib and figures["extra"] > chosen.limit_gib * GIB)
    if any(over):
        print("over the limit")
    return int(any(over))


if __name__ == "__main__":
    sys.exit(main())
