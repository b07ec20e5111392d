"""What is trained, and the job that one worker process gets."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TUNINGS = ("full", "lora")
LAYOUTS = ("padded", "packed", "shared")
BETA = 0.1
LORA = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0}
MAX_LENGTH = 1024


@dataclass(frozen=True)
class Shape:
    """A Llama with an untied head: 45.6 M parameters."""

    vocabulary: int = 32768
    hidden: int = 512
    intermediate: int = 1280
    layers: int = 4
    heads: int = 8


@dataclass(frozen=True)
class Job:
    """One trainer on one data set: `warmups` steps, then `steps` that count."""

    provider: str
    tuning: str
    model: str  # folder with the tokenizer
    pairs: str  # folder of `data.write_pairs`
    output: str
    layout: str = "padded"
    steps: int = 4
    warmups: int = 1
    batch: int = 4
    threads: int = 2
    learning_rate: float = 1e-4
    workspace_mib: int | None = None  # of this library's trainers; None: their default
    gradient_checkpointing: bool = False

    @property
    def all_steps(self) -> int:
        return self.warmups + self.steps

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(path: Path) -> Job:
        fields: dict[str, Any] = json.loads(path.read_text())
        return Job(**fields)
