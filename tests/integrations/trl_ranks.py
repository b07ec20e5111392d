"""Steps of a model with TRL's fused head on two processes: `python -m tests.integrations.trl_ranks RANK WORLD FOLDER`.

DDP and FSDP2, patched and not; process 0 leaves losses and gathered weights in the folder.
"""

import faulthandler
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from trl.trainer.utils import add_fused_lm_head

from spo_kernels.integrations.trl import patch_trl, unpatch_trl
from tests.integrations.tiny import VOCAB, make_model

WATCHDOG = 120
PROCESSES, STEPS = 2, 4


def wrap(model: Any, way: str) -> Any:
    if way == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.lm_head.weight, DTensor)
    return model


def train(way: str, rank: int) -> dict[str, Any]:
    """Losses of each step and weights at the end of both processes, and the weights at the start."""
    model = make_model("llama")
    begin = flat(model)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    wrapped = wrap(model, way)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=5e-4, eps=1e-6)
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(PROCESSES * step + rank)
        ids = torch.randint(VOCAB, (3, 12), generator=generator)
        # process 1 has no label at all in step 1
        start = 12 if (rank, step) == (1, 1) else 3 + step
        labels = ids.masked_fill(torch.arange(12) < start, -100)
        out = wrapped(input_ids=ids, labels=labels, fused_lm_head=True)
        (out.loss + 0.1 * out.entropy.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    everyone: list[Any] = [None] * PROCESSES
    dist.all_gather_object(everyone, (losses, flat(model)))
    return {"losses": [own for own, _ in everyone], "weights": [end for _, end in everyone], "start": begin}


def flat(model: Any) -> torch.Tensor:
    """All weights, gathered."""
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([weight.detach().flatten() for weight in whole])


if __name__ == "__main__":
    faulthandler.dump_traceback_later(WATCHDOG, exit=True)
    torch.set_num_threads(1)
    rank, folder = int(sys.argv[1]), Path(sys.argv[3])
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=PROCESSES)
    found: dict[str, Any] = {}
    for way in ("ddp", "fsdp2"):
        unpatch_trl()
        found[f"{way} trl"] = train(way, rank)
        patch_trl()
        found[f"{way} ours"] = train(way, rank)
    if rank == 0:
        torch.save(found, folder / "found")
    dist.destroy_process_group()
