"""Sums over logging windows, metrics.jsonl, TensorBoard, peak memory."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from spo_kernels.extras.diagnostics import summarize
from spo_kernels.losses import PairLogps
from spo_kernels.train.files import FAILURES, whole, writing
from spo_kernels.train.metric_lines import read_lines

FILE = "metrics.jsonl"


class Window:
    """Weighted means of metrics since the last log line; sums stay on the device until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        # of each pair for the diagnostics: log-probs and baseline, chosen and rejected, and lengths; float64
        self.pairs: list[Tensor] = []
        self.units = 0
        self.tokens = 0

    def add(self, sums: dict[str, Tensor]) -> None:
        for name, value in sums.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def add_pairs(self, pair_logps: Tensor, baseline: Tensor, lengths: Tensor) -> None:
        """Log-probs [2B] of a batch's responses, those that they are compared with, and token counts."""
        device = pair_logps.device
        self.pairs.append(torch.stack([v.to(device, torch.float64) for v in (pair_logps, baseline, lengths)]))

    def count(self, units: int, tokens: int) -> None:
        """Units (of all processes) that the sums are over, and tokens processed."""
        self.units += units
        self.tokens += tokens

    def means(self, accelerator: Any) -> dict[str, float]:
        """Means over all processes."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        total = accelerator.reduce(torch.stack([self.sums[n] for n in names]), "sum")
        return dict(zip(names, (total / self.units).tolist(), strict=True))

    def diagnostics(self) -> dict[str, float]:
        """Of the pairs of all processes; nothing where none were added."""
        batches = [batch for part in gather_object([self._pairs_on_cpu()]) for batch in part]
        if not batches:
            return {}
        logps, baseline, lengths = torch.cat([b.view(3, 2, -1) for b in batches], dim=-1)
        pairs = PairLogps(*logps, *baseline, *lengths.long())
        return {f"diagnostics/{name}": value for name, value in summarize(pairs).items()}

    def state_dict(self) -> dict[str, Any]:
        """Without tokens: a resumed run counts them, like seconds, from where it starts."""
        sums = {k: v.cpu() for k, v in self.sums.items()}
        return {"sums": sums, "units": self.units, "pairs": self._pairs_on_cpu()}

    def _pairs_on_cpu(self) -> list[Tensor]:
        return [pairs.cpu() for pairs in self.pairs]

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.sums = {k: v.to(device) for k, v in state["sums"].items()}
        self.units, self.pairs = state["units"], state["pairs"]


class MetricsLog:
    """Appends lines to metrics.jsonl, and the same numbers to TensorBoard where it is installed."""

    def __init__(self, output: Path, warn: Callable[[str], None], last_step: int = -1) -> None:
        """On resume, lines after `last_step` are removed: those steps run again."""
        self.path = output / FILE
        self._warn = warn
        self._board: Any = None
        if self.path.exists():
            kept = [line for line, record in read_lines(self.path) if record["step"] <= last_step]
            with whole(self.path) as temporary:
                temporary.write_bytes(b"".join(kept))
        with self._optional():
            self._board = _tensorboard(output / "tensorboard", last_step)

    def write(self, record: dict[str, Any]) -> None:
        """One line, on disk before a checkpoint of the same step can be."""
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        with self._optional():
            if self._board is not None:
                for name, value in record.items():
                    if name not in ("step", "split"):
                        self._board.add_scalar(f"{record['split']}/{name}", value, record["step"])
                self._board.flush()

    @contextmanager
    def _optional(self) -> Iterator[None]:
        """TensorBoard's files are a copy: where they can't be written, the run goes on without."""
        try:
            yield
        except FAILURES as error:
            self._board = None
            self._warn(f"TensorBoard's files can't be written ({error}): going on with {FILE} alone")


def peak_memory_mib(device: torch.device) -> float:
    """Peak GPU memory of tensors, or peak resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _tensorboard(folder: Path, last_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=last_step + 1 if last_step >= 0 else None)
