"""Runs of `spo-train`, as a user starts them: each a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .data import Files


@dataclass(frozen=True)
class Stage:
    """One training run: its label in tables, its learning rate, the rest of its options."""

    label: str
    rate: float
    options: str

    @property
    def is_preference(self) -> bool:
        return "--stage preference" in self.options


SFT = Stage("SFT", 2e-3, "--stage sft --batch-size 32 --warmup-steps 20")

# The SPO penalty is on the summed log-prob, the unit of DPO's margin: as a mean over tokens it would be 18 times
# smaller here. Right answers (sampled) by learning rate, one run each; another seed, or other rounding, shifts them by
# up to ten points:
# SPO  52 % at 3e-5, 66 % at 1e-4, 74 % at 2e-4, 79 % at 4e-4
# DPO  43 % at 1e-5, 45 % at 3e-5, 42 % at 1e-4, 33 % at 2e-4: so it also runs at the rate that suits it
BATCHES = "--batch-size 16 --warmup-steps 20"
DPO_OPTIONS = f"--stage preference --loss dpo --beta 0.1 {BATCHES}"
SPO_OPTIONS = f"--stage preference --loss spo --beta 0.1 --spo-weight 1 --spo-normalization sum {BATCHES}"
SECOND_STAGES = {
    "spo": Stage("SPO", 2e-4, SPO_OPTIONS),
    "dpo": Stage("DPO", 2e-4, DPO_OPTIONS),
    "dpo-low-rate": Stage("DPO, low rate", 3e-5, DPO_OPTIONS),
    "sft-chosen": Stage("SFT on chosen", 2e-4, f"--stage sft {BATCHES}"),
}


class TrainingFailed(Exception):
    """spo-train ended with another exit code than 0."""


def train_sft(base: Path, output: Path, files: Files, steps: int, seed: int) -> None:
    """First stage: the base model learns the task from the demonstrations."""
    spo_train(SFT, base, output, files.sft, files.heldout_sft, steps, seed)


def train_second(name: str, sft: Path, output: Path, files: Files, steps: int, seed: int) -> None:
    """A second stage, by preferences or by the chosen solutions alone."""
    stage = SECOND_STAGES[name]
    if stage.is_preference:
        spo_train(stage, sft, output, files.preferences, files.heldout_preferences, steps, seed)
    else:
        spo_train(stage, sft, output, files.chosen, files.heldout_sft, steps, seed)


def spo_train(stage: Stage, model: Path, output: Path, data: Path, heldout: Path, steps: int, seed: int) -> None:
    command = ["--model", str(model), "--dataset", str(data), "--eval-dataset", str(heldout)]
    command += ["--output-dir", str(output), *stage.options.split(), "--learning-rate", str(stage.rate)]
    # Ten evaluations; no checkpoints, for a run of seconds.
    command += ["--max-steps", str(steps), "--eval-steps", str(max(1, steps // 10)), "--save-steps", "0"]
    command += ["--seed", str(seed), *([] if sys.stderr.isatty() else ["--quiet"])]
    print("$ spo-train", shlex.join(command), flush=True)
    # Everything is local: nothing may wait for a network.
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    code = subprocess.run([sys.executable, "-m", "spo_kernels.train", *command], env=environment).returncode
    if code:
        raise TrainingFailed(f"spo-train into {output} failed with exit code {code}")
