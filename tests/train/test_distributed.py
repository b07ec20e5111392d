"""Two processes compute what one process computes on the same global batch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import ENVIRONMENT, assert_close_weights, assert_same_weights, read_metrics

OPTIONS = ("--quiet", "--max-steps", 4, "--learning-rate", 1e-2, "--logging-steps", 1, "--eval-fraction", 0.3)


PROGRAM = ("-m", "spo_kernels.train")
# `accelerate launch --cpu --num_processes 2` starts one process unless there is an MPI; torchrun sets the
# same variables that accelerate reads.
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
LAUNCH = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1")
LAUNCH += ("--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1")


def launch(cwd: Path, launcher: tuple[str, ...], *options: Any) -> None:
    command = [sys.executable, *launcher, *PROGRAM, *map(str, options)]
    environment = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr.decode()


# inner steps are averaged over processes; alpha_dpo_code has running statistics over the pairs of all of them
RUNS: dict[str, tuple[Any, ...]] = {
    "spo": (),
    "inner": ("--spo-penalty", "hinge", "--spo-inner-steps", 2, "--spo-inner-lr", 0.02, "--diagnostics"),
    "state": ("--loss", "alpha_dpo_code", "--beta", 1.0),
    "sft": ("--stage", "sft"),
}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(tmp_path: Path, model_dir: Path, pairs_file: Path, sft_file: Path, name: str) -> None:
    data = sft_file if name == "sft" else pairs_file
    options = ("--model", model_dir, "--dataset", data, *RUNS[name], *OPTIONS, "--save-steps", 2)
    launch(tmp_path, LAUNCH, *options, "--output-dir", "one", "--batch-size", 4, "--grad-accum", 2)
    launch(tmp_path, TWO, *options, "--output-dir", "two", "--batch-size", 2, "--grad-accum", 2)
    identity = json.loads((tmp_path / "two" / "checkpoint-4" / "checkpoint.json").read_text())["identity"]
    assert identity["number of processes"] == 2
    assert_close_weights(tmp_path / "one", tmp_path / "two", atol=3e-4)
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [(r["split"], r["step"]) for r in one] == [(r["split"], r["step"]) for r in two]
    for a, b in zip(one, two, strict=True):
        # in an evaluation each process takes inner steps on its own batches, of other pairs
        if name != "inner" or a["split"] == "train":
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        for key in (k for k in a if k.startswith("diagnostics/") and "fell" not in k):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-3)
        # Adam hides a wrong scale of the loss; the norm shows it.
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=1e-3)
    if name in ("spo", "state"):
        check_resume(tmp_path, options)


def check_resume(folder: Path, options: tuple[Any, ...]) -> None:
    """From the checkpoint in the middle, two processes end with the same bits again."""
    (folder / "again").mkdir()
    for name in ("args.json", "metrics.jsonl"):
        shutil.copy(folder / "two" / name, folder / "again" / name)
    shutil.copytree(folder / "two" / "checkpoint-2", folder / "again" / "checkpoint-2")
    launch(folder, TWO, *options, "--output-dir", "again", "--batch-size", 2, "--grad-accum", 2, "--resume")
    assert_same_weights(folder / "two", folder / "again")
    assert len(read_metrics(folder / "two")) == len(read_metrics(folder / "again"))
