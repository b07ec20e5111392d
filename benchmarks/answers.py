"""A worker process that answers requests, a JSON object a line each."""

from __future__ import annotations

import json
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


class WorkerDied(Exception):
    """A worker ended before it answered; it has said why on stderr."""


class Worker:
    """A live process with requests on its stdin and answers on its stdout."""

    def __init__(self, name: str, command: list[str], cwd: Path, environment: dict[str, str], **streams: Any) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **streams
        )

    def ask(self, do: str, *, timeout: float | None = None, **request: Any) -> Answer:
        """One request and its answer; where there are other workers, they sit idle meanwhile.

        Raises:
            WorkerDied: No answer came, or none within `timeout` seconds, after which the process is killed.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        late = threading.Timer(timeout, self.process.kill) if timeout else None
        if late is not None:
            late.start()
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            if late is not None:
                late.cancel()
        if not line:
            raise WorkerDied(f"{self.name} ended with {self.process.wait()} at {do} {request}")
        answer: Answer = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        # closing flushes, and a worker that died reads no more
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.kill()
        self.process.wait()
