"""Short DDP trainings by TRL and by `FusedDPOTrainer`: `python -m tests.integrations.fused_dpo_ranks RANK FOLDER`.

The processes' environment is that of torchrun. The folder has the pairs on disk, where TRL's processes share what they
make of them; process 0 leaves there what was logged, and the weights of both.
"""

import faulthandler
import os
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist

from spo_kernels.integrations import trl
from tests.integrations.tiny import Run

WATCHDOG = 140
HINGE = {"penalty": "hinge", "value": "input"}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("gemma2", {"gradient_accumulation_steps": 2}),
    "precomputed": ("llama", {"precompute_ref_log_probs": True, "adapter": "new"}),
    "mixtral": ("mixtral", {"loss_type": ["sigmoid", "sft"]}),
}
# a run above, in forwards of different numbers of pairs
SPLIT, TOKENS = "dpo", 22
# no counterpart in TRL: the processes have to stay together
OURS: dict[str, dict[str, Any]] = {
    "inner steps": {"objective": "spo", "objective_args": HINGE, "spo_inner_steps": 1, "spo_inner_lr": 0.1},
    "statistics": {"objective": "beta_dpo"},
}


def everyone(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def outcome(run: Run) -> dict[str, Any]:
    return {"losses": run.losses, "logs": run.logs, "start": run.start, "end": run.end}


if __name__ == "__main__":
    faulthandler.dump_traceback_later(WATCHDOG, exit=True)
    torch.set_num_threads(1)
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    os.environ["TQDM_DISABLE"] = "1"
    pairs = datasets.load_from_disk(str(folder / "pairs"))
    found: dict[str, Any] = {}
    for name, (kind, settings) in RUNS.items():
        for trainer, library in (("DPO", None), ("FusedDPO", trl)):
            run = Run(trainer, kind, folder / "out", steps=6, library=library, data=pairs, **settings)
            found[f"{name} {trainer}"] = everyone(outcome(run))
    kind, settings = RUNS[SPLIT]
    run = Run("FusedDPO", kind, folder / "out", steps=6, library=trl, data=pairs, tokens_per_batch=TOKENS, **settings)
    found["split"] = everyone(outcome(run))
    for name, settings in OURS.items():
        run = Run("FusedDPO", "llama", folder / "out", steps=4, library=trl, data=pairs, **settings)
        found[name] = everyone(outcome(run))
    if rank == 0:
        torch.save(found, folder / "found")
    dist.destroy_process_group()
