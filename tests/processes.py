"""Start one process per rank, and wait no longer than their own watchdog takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def found_by(module: str, world: int, folder: Path, watchdog: float) -> Any:
    """What `python -m module RANK WORLD folder` left in folder/found."""
    # the loopback: a machine's own name may resolve to nothing, or slowly
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(world), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    messages = [process.communicate(timeout=watchdog + 30)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, "\n".join(messages)
    return torch.load(folder / "found")
