"""What is measured: the shape, the dtype and the threads, plus the job that one worker process gets."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOGITS = ("random", "lm", "flat")
PHASES = ("memory", "time", "accuracy")


@dataclass(frozen=True)
class Setting:
    """One pair-level call: 2 * pairs sequences of `tokens` response tokens each."""

    pairs: int = 2
    tokens: int = 512
    hidden: int = 1024
    vocab: int = 32768
    dtype: str = "float32"
    frozen: bool = False
    threads: int = 0  # 0: what torch chooses
    beta: float = 0.1
    seed: int = 0
    logits: str = "random"  # what distributions the inputs give, see `inputs`

    @property
    def rows(self) -> int:
        """N, the number of scored tokens."""
        return 2 * self.pairs * self.tokens

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def products(self) -> int:
        """Products of the floor that ratios refer to: logits, recomputed logits, dH, dW; frozen: logits, dH."""
        return 2 if self.frozen else 4

    @property
    def gradient_bytes(self) -> int:
        """Bytes of dH and, unless the head is frozen, dW."""
        entries = self.rows * self.hidden + (0 if self.frozen else self.vocab * self.hidden)
        return entries * self.torch_dtype.itemsize

    def describe(self) -> str:
        head = "frozen" if self.frozen else "trained"
        return (
            f"{self.pairs} pairs x 2 x {self.tokens} tokens (N={self.rows}), H={self.hidden}, V={self.vocab}, "
            f"{self.dtype}, head {head}, DPO beta {self.beta:g}, reference log-probs 0, {self.logits} logits"
        )


@dataclass(frozen=True)
class Job:
    """What one worker process does: one variant, some of the phases, results into a file."""

    setting: Setting
    variant: str
    phases: tuple[str, ...] = PHASES
    repeats: int = 5
    warmups: int = 1
    layouts: dict[str, tuple[int, int]] | None = None  # fastest tile per product, from `floor.calibrate`
    inputs: str | None = None  # file of `inputs.save`; None: random inputs made in the worker
    oracle: str | None = None
    limit_bytes: int | None = None  # cap on the worker's private memory
    workspace_bytes: int | None = None  # passed to this library's call

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(path: Path) -> Job:
        fields = json.loads(path.read_text())
        fields["setting"] = Setting(**fields["setting"])
        fields["phases"] = tuple(fields["phases"])
        if fields["layouts"] is not None:
            fields["layouts"] = {kind: (tile[0], tile[1]) for kind, tile in fields["layouts"].items()}
        return Job(**fields)
