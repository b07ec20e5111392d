"""What a process holds and sends where several share a language-model head: `python -m benchmarks.sharded`.

    gather       every process brings the whole head together, and its gradient goes back in parts
    streamed     every process sees the others' rows pass by in slices, and a slice's gradient goes back at once
    vocabulary   every process multiplies with its own rows; statistics and hidden's gradient are exchanged

One DPO loss with a trained head, forward and backward, with as many tokens a process in each mode (in the last all
have the same ones). Bytes are counted, on gloo: held is the process's rows and the most that was alive of what the loss
created; sent is every collective's operand times what a ring sends of it. Beside each count stands what the formula
gives; the last table is the formula alone, for eight GPUs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_leaves

from spo_kernels import LMHead, fused_spo_loss
from spo_kernels.head.gathered import gathered
from spo_kernels.testing import TensorMeter

from .machine import describe_machine, machine_line

MODES = ("gather", "streamed", "vocabulary")
WIDE = 4  # bytes of what is summed
# of the operand of a collective, as a process is given it, what a ring of r processes sends, on average
_RING = {
    "allreduce_": lambda r: 2 * (r - 1) / r,
    "all_reduce": lambda r: 2 * (r - 1) / r,
    "allgather_": lambda r: r - 1,
    "all_gather_into_tensor": lambda r: r - 1,
    "reduce_scatter_tensor": lambda r: (r - 1) / r,
    "broadcast_": lambda r: (r - 1) / r,
    "reduce_": lambda r: (r - 1) / r,
}
_SILENT = {"wait_tensor", "_wrap_tensor_autograd"}
_OPERAND = {"allgather_": 1}


@dataclass(frozen=True)
class Size:
    """A problem: tokens that each process has in work, and the head."""

    processes: int
    tokens: int
    vocab: int
    hidden: int
    bytes: int  # of an entry of the head and of hidden states
    workspace: int = 32 << 20

    @property
    def head(self) -> int:
        return self.vocab * self.hidden * self.bytes

    def held(self, mode: str) -> float:
        """Bytes of the process's rows and their gradient, hidden's gradient and its sum, and the workspace.

        Beside them the whole head twice; or two slices, each at most what the workspace has for their two gradients.
        """
        rows = 2 * self.head / self.processes + self.tokens * self.hidden * (WIDE + self.bytes) + self.workspace
        slices = self.workspace * self.bytes / WIDE
        return rows + {"gather": 2 * self.head, "streamed": min(slices, 2 * self.head), "vocabulary": 0}[mode]

    def sent(self, mode: str) -> float:
        """Bytes: the head once out and its gradient once back; the head twice out and its gradient, as it is summed,
        once back; or three numbers a token, and hidden's gradient.
        """
        r = self.processes
        if mode == "gather":
            return 2 * self.head * (r - 1) / r
        if mode == "streamed":
            return (2 * self.head + self.vocab * self.hidden * WIDE) * (r - 1) / r
        return (r - 1) * 3 * WIDE * self.tokens + 2 * (r - 1) / r * self.tokens * self.hidden * WIDE


class Traffic(TensorMeter):
    """Also counts, in `sent`, the bytes that a process of a group of `processes` sends; `slice` is the most at once."""

    def __init__(self, processes: int) -> None:
        super().__init__()
        self.sent, self.slice, self._processes = 0.0, 0, processes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if DTensor in types:  # what it does with its part comes here again
            return NotImplemented
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name not in _SILENT:
            operands = [leaf for leaf in tree_leaves(args[_OPERAND.get(name, 0)]) if isinstance(leaf, Tensor)]
            size = sum(tensor.nbytes for tensor in operands)
            self.sent += _RING[name](self._processes) * size
            self.slice = max(self.slice, size)
        return super().__torch_dispatch__(func, types, args, kwargs)


def counted(mode: str, size: Size) -> dict[str, float]:
    """Held and sent bytes of one loss in this process, and the most sent at once."""
    generator = torch.Generator().manual_seed(0)
    dtype = {4: torch.float32, 2: torch.bfloat16}[size.bytes]
    whole = torch.randn(size.vocab, size.hidden, generator=generator).mul_(size.hidden**-0.25).to(dtype)
    mesh = init_device_mesh("cpu", (size.processes,), mesh_dim_names=("tp",))
    weight = distribute_tensor(whole, mesh, [Shard(0)]).detach().requires_grad_()
    del whole
    hidden = torch.randn(2, size.tokens // 2, size.hidden, generator=generator).mul_(size.hidden**-0.25).to(dtype)
    labels = torch.randint(size.vocab, hidden.shape[:2], generator=generator)
    hidden.requires_grad_()
    with Traffic(size.processes) as meter:
        if mode == "gather":
            head = LMHead(gathered(weight))
        else:
            group = {"streamed": "shard_group", "vocabulary": "vocab_group"}[mode]
            head = LMHead(weight.to_local(), **{group: mesh.get_group()})
        loss, _ = fused_spo_loss(
            hidden, head, labels, loss="dpo", ref_logps=torch.zeros(2), path="two_pass", workspace_bytes=size.workspace
        )
        loss.backward()
    return {"held": weight.to_local().nbytes + meter.peak, "sent": meter.sent, "slice": meter.slice}


def work(rank: int, folder: str, mode: str, size: Size) -> None:
    """One process; the first leaves the largest counts of all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=size.processes)
    found = counted(mode, size)
    values = torch.tensor(list(found.values()), dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    if rank == 0:
        Path(folder, "found").write_text(json.dumps(dict(zip(found, values.tolist(), strict=True))))
    dist.destroy_process_group()


def measure(mode: str, size: Size) -> dict[str, float]:
    """In processes of their own."""
    with tempfile.TemporaryDirectory(prefix="spo-bench-") as folder:
        torch.multiprocessing.spawn(work, args=(folder, mode, size), nprocs=size.processes)
        found: dict[str, float] = json.loads(Path(folder, "found").read_text())
    return found


def mib(value: float) -> str:
    return f"{value / 2**20:,.2f}"


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded", description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="numbers of processes (default 2 4)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a process, a multiple of 2 (default 2048)")
    parser.add_argument("--vocab", type=int, default=32000, help="rows of the head (default 32000)")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size (default 512)")
    parser.add_argument("--bytes", type=int, default=4, choices=(2, 4), help="of an entry: bfloat16 or float32")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    chosen = parser.parse_args(arguments)
    print(machine_line(describe_machine(1)))
    print(f"\nV = {chosen.vocab}, H = {chosen.hidden}, {chosen.tokens} tokens a process; MiB, counted (formula)")
    print(f"{'mode':<12}{'processes':>10}{'held':>24}{'sent':>24}")
    rows = []
    for processes in chosen.processes:
        size = Size(processes, chosen.tokens, chosen.vocab, chosen.hidden, chosen.bytes)
        for mode in MODES:
            found = measure(mode, size)
            rows.append({"mode": mode, **asdict(size), **found})
            columns = (f"{mib(found[name])} ({mib(getattr(size, name)(mode))})" for name in ("held", "sent"))
            print(f"{mode:<12}{processes:>10}" + "".join(f"{column:>24}" for column in columns))
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=2))
    large = Size(8, 16384, 128_256, 8192, 2, workspace=512 << 20)
    print(
        f"\non paper: 8 x H100, V = {large.vocab}, H = {large.hidden}, bfloat16, {large.tokens} tokens a process; MiB"
    )
    for mode in MODES:
        print(f"{mode:<12}{'':>10}{mib(large.held(mode)):>24}{mib(large.sent(mode)):>24}")
    return rows


if __name__ == "__main__":
    main()
