"""One side: answers requests, a JSON object a line, until its input ends.

Started by path, with the exported commit on PYTHONPATH: of `benchmarks` it imports only what lies in this folder.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cases import Call, Case, build, build_eager
from torch import Tensor

MAPS = Path("/proc/self/maps")


class Worker:
    """The calls of one commit, built when they are first asked for."""

    def __init__(self, folder: str, backend: str, threads: int, workspace_bytes: int | None) -> None:
        self.folder = Path(folder)
        self.backend = backend
        self.threads = threads or torch.get_num_threads()
        self.workspace_bytes = workspace_bytes
        self.case: Case | None = None
        self.call: Call | None = None
        self.eager: Call | None = None

    def start(self) -> dict[str, Any]:
        """Load the backend and make sure that everything comes from this side's folder."""
        import spo_kernels

        status = spo_kernels.backend_info()[self.backend]
        if not status.available:
            raise RuntimeError(f"backend {self.backend}: {status.detail}")
        found = [str(spo_kernels.__file__), *mapped_extensions()]
        for path in found:
            if not Path(path).resolve().is_relative_to(self.folder.resolve()):
                raise RuntimeError(f"{path} is not of {self.folder}: the sides would be compared with something else")
        if self.backend == "cpp" and MAPS.exists() and len(found) != 2:
            raise RuntimeError(f"expected one extension of {self.folder}, got {found[1:]}")
        return {"backend": status.detail}

    def prepare(self, way: str, dtype: str, inputs: str, results: str) -> dict[str, Any]:
        """Bind a case to its inputs, and leave its results in a file."""
        self.case = Case(way, dtype)
        torch.set_num_threads(1 if self.case.small else self.threads)
        tensors: dict[str, Tensor] = torch.load(inputs)
        self.call = build(self.case, tensors, self.backend, self.workspace_bytes)
        self.eager = build_eager(self.case, tensors) if self.case.small else None
        torch.save(self.call.results(), results)
        gc.collect()
        return {}

    def time(self, repeats: int) -> dict[str, Any]:
        """Milliseconds of the case, and of full logits beside it where the case is small."""
        assert self.call is not None
        found = {"ms": milliseconds(self.call, repeats)}
        if self.eager is not None:
            found["eager_ms"] = milliseconds(self.eager, repeats)
        return found


def milliseconds(call: Call, repeats: int) -> float:
    """Of the fastest call: what else runs on the machine only adds to the others."""
    # not timed: until now the other side's data stood in the caches
    call.run()
    gc.disable()
    try:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call.run()
            times.append(time.perf_counter() - start)
    finally:
        gc.enable()
    return 1e3 * min(times)


def mapped_extensions() -> list[str]:
    """Files of this library's C++ extension in this process; torch has a `_C` too."""
    if not MAPS.exists():
        return []
    mapped = {line.split(maxsplit=5)[-1] for line in MAPS.read_text().splitlines() if "/_C." in line}
    return sorted(path for path in mapped if not path.startswith(str(Path(torch.__file__).parent)))


def main() -> None:
    # what the library prints must not get between the answers
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(worker, request.pop("do"))(**request)
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
