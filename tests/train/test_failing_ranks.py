"""What only the main process finds out ends all processes, with one sentence: none waits for it until it is killed."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from .conftest import ENVIRONMENT, pair, write_jsonl

# Several runs one after the other, since starting processes takes the time; prints their exit statuses.
PROGRAM = """
import json, sys
from spo_kernels.train import cli, loop
from spo_kernels.train.errors import StorageError
from tests.train.conftest import reset_accelerator

def full(*arguments):
    raise StorageError("no space for a checkpoint")

loop.save_checkpoint = full
for arguments in json.loads(sys.argv[1]):
    print(cli.main(arguments), flush=True)
    reset_accelerator()
"""


def two_processes(folder: Path, runs: list[list[Any]]) -> list[tuple[list[str], str]]:
    """(exit statuses, standard error) of each process; both are killed where one has not ended in time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", PROGRAM, json.dumps([[str(option) for option in run] for run in runs])]
    processes = [
        subprocess.Popen(
            command,
            cwd=folder,
            env={**shared, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(out.split(), error) for out, error in outputs]


def test_one_sentence_ends_both(tmp_path: Path, model_dir: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", [pair(i) for i in range(8)])
    bad = write_jsonl(tmp_path / "bad.jsonl", [pair(0), {"prompt": "x"}])
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes").write_text("")
    common = ["--quiet", "--model", model_dir, "--max-steps", 2, "--batch-size", 1, "--save-steps", 1]
    runs = [
        [*common, "--dataset", bad, "--output-dir", "data"],
        [*common, "--dataset", good, "--output-dir", "used"],
        [*common, "--dataset", good, "--output-dir", "disk"],
        # nothing fails: they leave their group, and end
        [*common, "--dataset", good, "--output-dir", "good", "--save-steps", 0],
    ]
    (main, said), (other, silent) = two_processes(tmp_path, runs)
    assert main == other == ["2", "2", "2", "0"], said + silent
    lines = [line for line in said.splitlines() if line.startswith("spo-train: error: ")]
    assert f"{bad}:2: no column 'chosen'" in lines[0]
    assert "--output-dir used is not empty" in lines[1]
    assert "no space for a checkpoint; step 1 is kept in disk/rescued-disk-" in lines[2]
    assert len(lines) == 3 and "error" not in silent
