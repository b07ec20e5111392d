"""Two processes train a FusedPreferenceModel under DDP: torchrun ... tests/integrations/ddp_ranks.py OUTPUT"""

import faulthandler
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from spo_kernels.integrations.transformers import FusedPreferenceModel, PairCollator, precompute_ref_logps
from tests.integrations.test_transformers import PAIRS, build

STEPS, RATE = 3, 0.1
RECORDS = [PAIRS[i % 3] for i in (0, 1, 2, 1)]


def train(module: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    optimizer = torch.optim.SGD(module.parameters(), RATE)
    for _ in range(STEPS):
        for batch in batches:
            module(**batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()


def batch_of(records: list[dict[str, list[int]]], sums: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**PairCollator(0)(records), "ref_logps": sums.T.flatten()}


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100, exit=True)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = build("tied")
    sums = precompute_ref_logps(model, [PairCollator(0)(RECORDS[i : i + 1]) for i in range(4)])
    mine = slice(2 * rank, 2 * rank + 2)
    train(DistributedDataParallel(FusedPreferenceModel(model, "dpo")), [batch_of(RECORDS[mine], sums[mine])])
    torch.save({"sums": sums, "weights": model.state_dict()}, Path(sys.argv[1]) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
