"""Runs of spo-train, one after the other, in each process of one launch: imports are paid once.

torchrun ... -m tests.train.ranks FILE, whose JSON is a list of {"arguments": [...], "continues": folder or null}: with
a folder, the run resumes from that finished run's checkpoint in the middle. With "killed": N, process 1 is killed in
step N; "sharded" says whether it is FSDP2 or DDP.
"""

import faulthandler
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from spo_kernels.train.cli import main
from spo_kernels.train.loop import Trainer

# Seconds until every process says where it stands and ends; alone on two cores all runs take 20.
WATCHDOG = 240


def continue_from(finished: Path, output: Path) -> None:
    """As `finished` was after step 2."""
    if torch.distributed.get_rank() == 0:
        output.mkdir()
        for name in ("args.json", "metrics.jsonl"):
            shutil.copy(finished / name, output / name)
        shutil.copytree(finished / "checkpoint-2", output / "checkpoint-2")
    torch.distributed.barrier()


def kill_in(number: int) -> None:
    step = Trainer._optimizer_step

    def killed(self: Trainer) -> Any:
        if self.step == number - 1 and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    Trainer._optimizer_step = killed  # type: ignore[method-assign]


def run(job: dict[str, Any]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    arguments: list[str] = job["arguments"]
    if job["continues"] is not None:
        continue_from(Path(job["continues"]), Path(arguments[arguments.index("--output-dir") + 1]))
    if "sharded" in job:
        os.environ["ACCELERATE_USE_FSDP"] = str(job["sharded"]).lower()
    if job.get("killed"):
        kill_in(job["killed"])
    status = main(arguments)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(WATCHDOG, exit=True)
    # A group that was destroyed cannot be made again from the same launch's store.
    PartialState.destroy_process_group = lambda *_: None
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
    torch.distributed.destroy_process_group()
