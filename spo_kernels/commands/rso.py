"""`spo-rso`: preference pairs from scored candidates by statistical rejection sampling (RSO, arXiv 2309.06657).

Of each prompt's candidates, sampled from the SFT model and scored by a reward model, algorithm 1 accepts some as if
they had been sampled from `π(y|x) ∝ π_sft(y|x) exp(r(x, y) / β)`; these are made into pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spo_kernels.commands import call
from spo_kernels.data.messages import Row, Text, check_number, check_text
from spo_kernels.data.records import read_records
from spo_kernels.extras.rejection_sampling import rso_select
from spo_kernels.train.errors import TrainError
from spo_kernels.train.files import whole

PAIRINGS = ("first-round", "best-worst")


@dataclass(frozen=True)
class Candidates:
    """A prompt with its scored responses; texts are strings, or chat messages where the prompt is."""

    where: str
    prompt: Text
    texts: list[Text]
    rewards: list[float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--candidates",
        required=True,
        help='.jsonl, .json or .parquet file of {"prompt": ..., "candidates": [{"text": ..., "reward": ...}, ...]}',
    )
    parser.add_argument("--output", required=True, type=Path, help=".jsonl file of pairs to make")
    parser.add_argument(
        "--num-samples", type=int, default=8, help="candidates accepted per prompt; the paper's 8 of 64 (default: 8)"
    )
    parser.add_argument(
        "--beta", type=float, default=0.5, help="0 accepts the best, inf at random; in the reward's unit (default: 0.5)"
    )
    parser.add_argument(
        "--pairing",
        choices=PAIRINGS,
        default="first-round",
        help="first-round: the accepted in random pairs, the higher reward chosen; best-worst: one pair of the highest "
        "and the lowest (default: first-round)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling and pairing, per record (default: 0)")


def run(arguments: argparse.Namespace) -> None:
    """The command: reads and writes one record at a time; the output appears complete or not at all."""
    samples, beta, output = arguments.num_samples, arguments.beta, arguments.output
    if samples < 2:
        raise TrainError(f"--num-samples must be at least 2, got {samples}")
    if not beta >= 0:
        raise TrainError(f"--beta must be at least 0, got {beta}")
    if arguments.seed < 0:
        raise TrainError(f"--seed must be at least 0, got {arguments.seed}")
    if output.exists():
        raise TrainError(f"--output {output} exists already and is not overwritten")
    prompts = written = 0
    with whole(output) as temporary, temporary.open("w") as file:
        for where, row in read_records(arguments.candidates):
            record = read_candidates(where, row, samples)
            for pair in make_pairs(record, samples, beta, arguments.pairing, [arguments.seed, prompts]):
                file.write(json.dumps(pair) + "\n")
                written += 1
            prompts += 1
    most = prompts * (samples // 2 if arguments.pairing == "first-round" else 1)
    print(
        f"spo-rso: {written} pairs of {prompts} prompts; {most - written} left out: equal rewards or equal texts",
        file=sys.stderr,
    )


def make_pairs(
    record: Candidates, num_samples: int, beta: float, pairing: str, seed: list[int]
) -> Iterator[dict[str, Any]]:
    """Pairs of a record's accepted candidates; a pair without a preference is left out.

    "first-round" is the paper's first-round ranking: the accepted at random in pairs (an odd one out is not used). It
    labels a pair by a reward-ranking model; here by the candidates' rewards.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    rewards = torch.tensor(record.rewards, dtype=torch.float64)
    accepted = rso_select(rewards, num_samples, beta, generator).tolist()
    if pairing == "best-worst":
        accepted.sort(key=lambda i: record.rewards[i])
        couples = [(accepted[-1], accepted[0])]
    else:
        order = rng.permutation(accepted).tolist()
        couples = [(order[i], order[i + 1]) for i in range(0, num_samples - 1, 2)]
    for first, second in couples:
        better, worse = (first, second) if record.rewards[first] > record.rewards[second] else (second, first)
        margin = record.rewards[better] - record.rewards[worse]
        if margin > 0 and record.texts[better] != record.texts[worse]:
            yield {
                "prompt": record.prompt,
                "chosen": record.texts[better],
                "rejected": record.texts[worse],
                "chosen_reward": record.rewards[better],
                "rejected_reward": record.rewards[worse],
                "score_margin": margin,
            }


def read_candidates(where: str, row: Row, num_samples: int) -> Candidates:
    """A checked record."""
    prompt = check_text(where, row, "prompt")
    given = row.get("candidates")
    if not isinstance(given, list):
        raise TrainError(f"{where}: candidates must be a list of objects with text and reward")
    if len(given) < num_samples:
        raise TrainError(f"{where}: {len(given)} candidates, fewer than --num-samples {num_samples}")
    texts: list[Text] = []
    rewards: list[float] = []
    for i, candidate in enumerate(given):
        place = f"{where}: candidates[{i}]"
        if not isinstance(candidate, dict):
            raise TrainError(f"{place} must be an object with text and reward, got {type(candidate).__name__}")
        text = check_text(place, candidate, "text")
        if not isinstance(prompt, str) and isinstance(text, str):
            text = [{"role": "assistant", "content": text}]
        if isinstance(prompt, str) and not isinstance(text, str):
            raise TrainError(f"{place}: text is messages, but the prompt is a string")
        texts.append(text)
        rewards.append(check_number(place, candidate, "reward"))
    if not math.isfinite(max(rewards) - min(rewards)):
        raise TrainError(
            f"{where}: rewards from {min(rewards)} to {max(rewards)}: their difference is no finite number"
        )
    return Candidates(where, prompt, texts, rewards)


def main(argv: Sequence[str] | None = None) -> int:
    return call(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main())
