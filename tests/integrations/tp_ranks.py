"""Models whose head tensor parallelism splits: `python -m tests.integrations.tp_ranks RANK WORLD FOLDER`.

Process 0 leaves in the folder what each case gave: losses, gathered gradients, and how many rows it held.
"""

import faulthandler
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from spo_kernels import LMHead, fused_spo_loss
from spo_kernels.integrations.transformers import FusedPreferenceModel, PairCollator, hidden_states
from tests.integrations.fsdp_ranks import message
from tests.integrations.test_transformers import PAIRS, REFERENCE, build

WATCHDOG = 300
Split = Callable[[Any, DeviceMesh, Path], Any]


def planned(model: Any, mesh: DeviceMesh, folder: Path) -> Any:
    """As transformers loads a model by its own plan."""
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(tp_plan="auto", tp_size=mesh["tp"].size())
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)


def head_only(model: Any, mesh: DeviceMesh, folder: Path) -> Any:
    """As torch splits a module."""
    return parallelize_module(model, mesh["tp"], {"lm_head": ColwiseParallel(output_layouts=Replicate())})


def head_and_layers(model: Any, mesh: DeviceMesh, folder: Path) -> Any:
    """And FSDP2 over the mesh's other dimension."""
    model = head_only(model, mesh, folder)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    return model


def own_group(model: Any, mesh: DeviceMesh, folder: Path) -> Any:
    """And a group of FSDP2 for the head."""
    model = head_and_layers(model, mesh, folder)
    fully_shard(model.lm_head, mesh=mesh["dp"])
    return model


def fused(model: Any, mesh: DeviceMesh | None) -> tuple[Any, Any]:
    policy = FusedPreferenceModel(model, "dpo")
    if mesh is not None and mesh.ndim > 1:
        fully_shard(policy, mesh=mesh["dp"])
    return policy, lambda batch: policy(**batch)


def recipe(model: Any, mesh: DeviceMesh | None) -> tuple[Any, Any]:
    def loss(batch: dict[str, Any]) -> Any:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        hidden, head = hidden_states(model, **inputs), LMHead.of(model)
        options = {"ref_logps": batch["ref_logps"], "shift": True, "token_metrics": True}
        return fused_spo_loss(hidden, head, batch["labels"], loss="dpo", **options)

    return model, loss


CASES: dict[str, tuple[str, Split, Any]] = {
    "plan": ("llama", planned, recipe),
    "plan, tied": ("tied", planned, recipe),
    "plan, fused": ("gemma2", planned, fused),
    "module": ("llama", head_only, recipe),
    "module, fused": ("llama", head_only, fused),
}
SHARDED: dict[str, tuple[str, Split, Any]] = {"fsdp": ("llama", head_and_layers, fused)}
REFUSED: dict[str, tuple[str, Split, Any]] = {"own group": ("llama", own_group, fused)}


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def result(policy: Any, loss: Any, rows: slice = slice(None)) -> dict[str, Any]:
    """Loss, metrics and gradients by the model's own names."""
    references = REFERENCE.view(2, 3)[:, rows].flatten()
    found, metrics = loss({**PairCollator(0)(PAIRS[rows]), "ref_logps": references})
    found.backward()
    gradients = {n.removeprefix("model."): whole(p.grad) for n, p in policy.named_parameters() if p.grad is not None}
    return {"loss": found.detach(), "metrics": metrics, "gradients": gradients}


def run(name: str, mesh: DeviceMesh, folder: Path) -> dict[str, Any]:
    kind, split, use = (CASES | SHARDED | REFUSED)[name]
    model = split(build(kind), mesh, folder / name.replace(", ", "-"))
    policy, loss = use(model, mesh)
    found = result(policy, loss)
    return {**found, "rows": len(LMHead.of(model).weight)}


if __name__ == "__main__":
    faulthandler.dump_traceback_later(WATCHDOG, exit=True)
    torch.set_num_threads(1)
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    shape, names = ((2,), ("tp",)) if world == 2 else ((2, 2), ("dp", "tp"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    everything: dict[str, Any] = {name: run(name, mesh, folder) for name in (CASES if world == 2 else SHARDED)}
    if world == 4:
        everything["refused"] = message(lambda: run("own group", mesh, folder))
    if rank == 0:
        torch.save(everything, folder / "found")
    dist.destroy_process_group()
