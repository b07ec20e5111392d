"""FusedPreferenceModel on two processes, sharded by FSDP2: `python -m tests.integrations.fsdp_ranks RANK FOLDER`.

Process 0 leaves in the folder what each case gave: mean losses, gathered gradients and weights.
"""

import faulthandler
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from spo_kernels.integrations.transformers import FusedPreferenceModel, PairCollator
from tests.integrations.test_transformers import PAIRS, REFERENCE, build

WATCHDOG = 100
PROCESSES, STEPS = 2, 10
RECORDS = [PAIRS[i % 3] for i in (0, 1, 2, 1)]


def batch_of(rows: slice) -> dict[str, torch.Tensor]:
    sums = REFERENCE.view(2, 3)[:, [0, 1, 2, 1]][:, rows]
    return {**PairCollator(0)(RECORDS[rows]), "ref_logps": sums.flatten()}


def root(policy: Any, mesh: Any) -> Any:
    fully_shard(policy, mesh=mesh)


def layers(policy: Any, mesh: Any) -> Any:
    for layer in policy.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)


def head(policy: Any, mesh: Any) -> Any:
    """A tied head is in one group with the embeddings."""
    model = policy.model
    tied = model.config.tie_word_embeddings
    fully_shard([model.model.embed_tokens, model.lm_head] if tied else model.lm_head, mesh=mesh)
    layers(policy, mesh)


def inside(policy: Any, mesh: Any) -> Any:
    """The model was sharded before the loss came around it."""
    fully_shard(policy.model.lm_head, mesh=mesh)
    fully_shard(policy.model, mesh=mesh)


Wrap = Callable[[Any, Any], Any]
# name: model, groups, mesh, options
CASES: dict[str, tuple[str, Wrap, tuple[int, ...], dict[str, Any]]] = {
    "root": ("llama", root, (2,), {}),
    "root, tied": ("tied", root, (2,), {}),
    "layers": ("gemma2", layers, (2,), {}),
    "layers, tied, replicas": ("tied", layers, (2, 1), {}),
    "head": ("llama", head, (2,), {}),
    "head, tied": ("tied", head, (2,), {}),
    "head, replicas": ("llama", head, (2, 1), {}),
    "head, two_pass": ("llama", head, (2,), {"path": "two_pass"}),
    "head, tied, two_pass": ("tied", head, (2,), {"path": "two_pass"}),
    "head, factorised": ("llama", head, (2,), {"path": "factorised"}),
    "inside": ("llama", inside, (2,), {"path": "two_pass"}),
}


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def train(policy: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Losses of each step, gradients of the first, weights at the end."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-4, eps=1e-6)
    losses, gradients = [], {}
    for _ in range(STEPS):
        loss, _metrics = policy(**batch)
        loss.backward()
        gradients = gradients or {name: whole(p.grad) for name, p in policy.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {
        "losses": torch.tensor(losses),
        "gradients": gradients,
        "weights": {name: whole(p) for name, p in policy.named_parameters()},
    }


def run(name: str, rank: int) -> dict[str, Any]:
    kind, wrap, shape, options = CASES[name]
    policy = FusedPreferenceModel(build(kind), "dpo", **options)
    wrap(policy, init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :]))
    found = train(policy, batch_of(slice(2 * rank, 2 * rank + 2)))
    dist.all_reduce(found["losses"])
    return {**found, "losses": found["losses"] / PROCESSES}


if __name__ == "__main__":
    faulthandler.dump_traceback_later(WATCHDOG, exit=True)
    torch.set_num_threads(1)
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=PROCESSES)
    found = {name: run(name, rank) for name in CASES}
    if rank == 0:
        torch.save(found, folder / "found")
    dist.destroy_process_group()
