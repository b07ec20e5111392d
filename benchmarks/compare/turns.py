"""The two workers and their turns."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ..answers import Answer, Worker
from .trees import Tree

WORKER = Path(__file__).with_name("worker.py")
SIDES = ("old", "new")


class Side(Worker):
    """A live worker process of one commit."""

    def __init__(self, name: str, tree: Tree, *, backend: str, threads: int, workspace_bytes: int | None) -> None:
        self.tree = tree
        given = {"folder": str(tree.folder), "backend": backend, "threads": threads, "workspace_bytes": workspace_bytes}
        command = [sys.executable, "-S", str(WORKER), json.dumps(given)]
        super().__init__(f"{name} ({tree.commit[:12]})", command, tree.folder, tree.environment(backend, threads))


@dataclass(frozen=True)
class Timing:
    """One case: the ratio new/old of each round, and the milliseconds behind them."""

    ratios: list[float]
    old_ms: float
    new_ms: float
    eager_ms: float | None = None

    @property
    def ratio(self) -> float:
        return median(self.ratios)


def take_turns(sides: dict[str, Side], rounds: int, repeats: int) -> Timing:
    """Old new new old, then new old old new, and so on: within a round both have the same mean place."""
    ratios: list[float] = []
    answers: dict[str, list[Answer]] = {name: [] for name in SIDES}
    for turn in range(rounds):
        first, second = SIDES if turn % 2 == 0 else SIDES[::-1]
        for name in (first, second, second, first):
            answers[name].append(sides[name].ask("time", repeats=repeats))
        old, new = (sum(answer["ms"] for answer in answers[name][-2:]) for name in SIDES)
        ratios.append(new / old)
    eager = [answer["eager_ms"] for name in SIDES for answer in answers[name] if "eager_ms" in answer]
    times = {name: median(answer["ms"] for answer in answers[name]) for name in SIDES}
    return Timing(ratios, times["old"], times["new"], median(eager) if eager else None)
