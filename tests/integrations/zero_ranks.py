"""`FusedDPOTrainer` under DDP and DeepSpeed's ZeRO: `python -m tests.integrations.zero_ranks RANK WORLD FOLDER`.

The folder has the models and the pairs; process 0 leaves there what each run gave. DeepSpeed is brought to a CPU.
"""

import faulthandler
import os
import sys
from pathlib import Path
from typing import Any

# accelerate's way to say so, before it looks for a device; DeepSpeed's is in tests/processes.py
os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "TQDM_DISABLE": "1"}

import datasets
import deepspeed
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM

from spo_kernels.integrations import trl
from tests.integrations import tiny
from tests.integrations.fused_dpo_ranks import everyone, outcome

WATCHDOG = 240
STEPS = 4
STAGES = (2, 3)
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("gemma2", {"gradient_accumulation_steps": 2}),
    "precomputed": ("llama", {"precompute_ref_log_probs": True, "adapter": "new"}),
}
_AUTO = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def settings_of(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True} | dict.fromkeys(_AUTO, "auto")


def on_cpu() -> None:
    """accelerate takes DeepSpeed's processes for one without a backend; DeepSpeed compiles for minutes."""
    made = PartialState.__init__
    PartialState.__init__ = lambda self, cpu=False, **more: made(self, cpu, **{"backend": "gloo", **more})
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def train(kind: str, stage: int | None, folder: Path, **settings: Any) -> list[Any]:
    AcceleratorState._reset_state(reset_partial_state=True)
    if stage is not None:
        settings |= {"deepspeed": settings_of(stage), "use_cpu": False}
    pairs = datasets.load_from_disk(str(folder / "pairs"))
    run = tiny.Run("FusedDPO", kind, folder / "out", steps=STEPS, library=trl, data=pairs, **settings)
    parameters = list(run.trainer.model.parameters())
    assert all(hasattr(parameter, "ds_id") for parameter in parameters) == (stage == 3)
    with deepspeed.zero.GatheredParameters(parameters if stage == 3 else []):
        run.end = {name: weight.clone() for name, weight in run.trainer.model.state_dict().items()}
        return everyone(outcome(run))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(WATCHDOG, exit=True)
    torch.set_num_threads(1)
    rank, folder = int(sys.argv[1]), Path(sys.argv[3])
    # as they are loaded: made under ZeRO-3, they would be others
    tiny.make_model = lambda kind, seed=0: AutoModelForCausalLM.from_pretrained(folder / f"{kind}-{seed}")
    found: dict[str, Any] = {}
    for name, (kind, settings) in RUNS.items():
        found[f"{name} DDP"] = train(kind, None, folder, **settings)
    on_cpu()
    for name, (kind, settings) in RUNS.items():
        for stage in STAGES:
            found[f"{name} ZeRO-{stage}"] = train(kind, stage, folder, **settings)
    if rank == 0:
        torch.save(found, folder / "found")
    # DeepSpeed's threads outlive what they are for
    os._exit(0)
