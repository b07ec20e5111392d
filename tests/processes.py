"""Processes forked from a server, itself a fork of the test process that holds what collected tests have imported.

One server a test process, made before its first test: imports take 12 s, and threads of autograd are lost in a fork.
All that it forks have the same order of a set's elements, which ranks of torchrun have not.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
# the loopback: a machine's own name may resolve to nothing, or slowly
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")])),
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


def start_server() -> None:
    """Called between the collection of tests and the first one. `multiprocessing` would start an interpreter anew."""
    resource_tracker.ensure_running()
    address = connection.arbitrary_address("AF_UNIX")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        # the server ends when nobody holds the second end any more
        ended, alive = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(alive)
                forkserver.main(listener.detach(), ended, preload=[])
            finally:
                os._exit(0)
    os.close(ended)
    server = forkserver._forkserver
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, alive, pid


class Forked(ForkServerProcess):
    """Calls `run(*arguments)`, with variables added to this process's environment; what it writes is in files."""

    def __init__(self, folder: Path, run: Callable[..., Any], *arguments: Any, **variables: str) -> None:
        super().__init__(daemon=True)
        self._run, self._arguments = run, arguments
        self._environment = {**os.environ, **ENVIRONMENT, **variables}
        self._files = [folder / f"{kind}-{self.name}" for kind in ("stdout", "stderr")]

    def start(self) -> None:
        for path in self._files:
            path.touch()
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        for number, path in enumerate(self._files, 1):
            with path.open("w") as file:
                os.dup2(file.fileno(), number)
        torch.set_num_threads(1)
        self._run(*self._arguments)

    @property
    def written(self) -> list[str]:
        """Standard output and standard error."""
        return [path.read_text() for path in self._files]


def run_module(name: str, *arguments: Any) -> None:
    """`python -m name arguments`."""
    sys.argv = [name, *map(str, arguments)]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def exit_codes(processes: Sequence[Forked], seconds: float) -> list[int | None]:
    """Start all and wait. Those that have not ended in time are killed, and have None."""
    end = time.monotonic() + seconds
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()


def torchrun(world: int) -> list[dict[str, str]]:
    """The variables of each rank, for a meeting on a port that was free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def found_by(name: str, world: int, folder: Path, watchdog: float) -> Any:
    """What `python -m name RANK WORLD folder`, once for each rank, left in folder/found."""
    ranks = [
        Forked(folder, run_module, name, rank, world, folder, **variables)
        for rank, variables in enumerate(torchrun(world))
    ]
    codes = exit_codes(ranks, watchdog + 30)
    assert codes == [0] * world, "\n".join(rank.written[1] for rank in ranks)
    return torch.load(folder / "found")
