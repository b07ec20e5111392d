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
    modules = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": modules, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    errors = [folder / f"stderr-{rank}" for rank in range(world)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(world), str(folder)], env=environment, stderr=path.open("w")
        )
        for rank, path in enumerate(errors)
    ]
    try:
        codes = [process.wait(timeout=watchdog + 30) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * world, "\n".join(path.read_text() for path in errors)
    return torch.load(folder / "found")
