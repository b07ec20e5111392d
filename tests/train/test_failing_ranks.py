"""What only the main process finds out ends all processes, with one sentence: none waits for it until it is killed."""

from pathlib import Path
from typing import Any

import pytest

from spo_kernels.train import cli, loop
from spo_kernels.train.errors import StorageError
from tests.processes import Forked, exit_codes, torchrun

from .conftest import pair, reset_accelerator, write_jsonl


def one_after_the_other(runs: list[list[str]]) -> None:
    """Prints their exit statuses."""

    def full(*arguments: Any) -> None:
        raise StorageError("no space for a checkpoint")

    loop.save_checkpoint = full
    for arguments in runs:
        print(cli.main(arguments), flush=True)
        reset_accelerator()


def two_processes(folder: Path, runs: list[list[Any]]) -> list[tuple[list[str], str]]:
    """(exit statuses, standard error) of each process; both are killed where one has not ended in time."""
    arguments = [[str(option) for option in run] for run in runs]
    ranks = [
        Forked(folder, one_after_the_other, arguments, ACCELERATE_USE_CPU="true", **variables)
        for variables in torchrun(2)
    ]
    exit_codes(ranks, 300)
    return [(out.split(), error) for out, error in (rank.written for rank in ranks)]


def test_one_sentence_ends_both(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
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
