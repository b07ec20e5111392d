"""Short DDP trainings by TRL and by `FusedDPOTrainer`, and by that under FSDP2.

`python -m tests.integrations.fused_dpo_ranks RANK WORLD FOLDER`.

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
import transformers.trainer
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor

from spo_kernels.integrations import trl
from spo_kernels.train.processes import shard_on_cpu
from tests.integrations.tiny import Run

WATCHDOG = 240
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

# as TRL's trainer is given it: each decoder layer is a group, so are the embeddings, and the head with the norm
FSDP2: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}}
STATE: dict[str, Any] = {"objective": "beta_dpo", "save_strategy": "steps", "save_steps": 2}


def everyone(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def outcome(run: Run) -> dict[str, Any]:
    return {"losses": run.losses, "logs": run.logs, "start": run.start, "end": whole(run.end)}


def whole(weights: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights.items()}


def sharded(kind: str, folder: Path, **settings: Any) -> Run:
    """A run under FSDP2, for which accelerate makes its state anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    run = Run("FusedDPO", kind, folder, library=trl, data=pairs, **FSDP2, **settings)
    assert all(isinstance(parameter, DTensor) for parameter in run.trainer.model.parameters())
    return run


class OnCPU(Accelerator):
    """accelerate's, which takes settings for FSDP on a CPU too."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        super().__init__(*positional, **named)
        if named.get("fsdp_plugin") is not None:
            shard_on_cpu(self.state, named["fsdp_plugin"])


if __name__ == "__main__":
    faulthandler.dump_traceback_later(WATCHDOG, exit=True)
    torch.set_num_threads(1)
    rank, folder = int(sys.argv[1]), Path(sys.argv[3])
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
    transformers.trainer.Accelerator = OnCPU
    for name, (kind, settings) in RUNS.items():
        found[f"{name} FSDP2"] = everyone(outcome(sharded(kind, folder / "out", steps=6, **settings)))
    found["bf16"] = sharded("llama", folder / "out", steps=1, bf16=True).losses
    found["whole"] = outcome(sharded("llama", folder / "state", steps=4, **STATE))
    resumed = sharded("llama", folder / "state", steps=4, resume=str(folder / "state" / "checkpoint-2"), **STATE)
    found["resumed"] = outcome(resumed)
    resumed.trainer.save_model(str(folder / "saved"))
    if rank == 0:
        torch.save(found, folder / "found")
    dist.destroy_process_group()
