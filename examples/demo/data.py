"""The demo's data files: what is trained on, and what is held out."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from arithmetic.records import write_jsonl
from arithmetic.task import Problem, Record, preference_record, problems, sft_record


@dataclass(frozen=True)
class Files:
    """Where the data files are. No problem is in more than one of sft, preferences and held-out."""

    folder: Path

    @property
    def sft(self) -> Path:
        return self.folder / "sft.jsonl"

    @property
    def preferences(self) -> Path:
        return self.folder / "preferences.jsonl"

    @property
    def chosen(self) -> Path:
        """The preference data without the rejected solutions, as sft data."""
        return self.folder / "chosen.jsonl"

    @property
    def heldout_sft(self) -> Path:
        """The held-out problems with their right solutions, as sft data."""
        return self.folder / "heldout_sft.jsonl"

    @property
    def heldout_preferences(self) -> Path:
        return self.folder / "heldout_preferences.jsonl"


@dataclass(frozen=True)
class Heldout:
    """Problems that no training file has, and a pair of solutions for each."""

    problems: list[Problem]
    pairs: list[Record]


def write_data(files: Files, *, demonstrations: int, pairs: int, heldout: int, sloppiness: float, seed: int) -> Heldout:
    """Write all files; the same seed gives the same bytes."""
    rng = random.Random(seed)
    supply = problems(rng)
    asked = list(islice(supply, heldout))
    held = Heldout(asked, [preference_record(problem, rng) for problem in asked])
    preferences = [preference_record(problem, rng) for problem in islice(supply, pairs)]
    files.folder.mkdir(parents=True)
    write_jsonl(files.sft, (sft_record(problem, sloppiness, rng) for problem in islice(supply, demonstrations)))
    write_jsonl(files.preferences, preferences)
    write_jsonl(files.chosen, map(without_rejected, preferences))
    write_jsonl(files.heldout_preferences, held.pairs)
    write_jsonl(files.heldout_sft, map(without_rejected, held.pairs))
    return held


def without_rejected(pair: Record) -> Record:
    return {"prompt": pair["prompt"], "completion": pair["chosen"]}
