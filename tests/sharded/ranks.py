"""All cases in one launch: `python -m tests.sharded.ranks RANK WORLD FOLDER [random]`.

Process 0 leaves in the folder the largest errors of each case over all processes, and what was said where something
is refused.
"""

import faulthandler
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.sharded import MODES, Size, counted
from spo_kernels.losses.registry import build_loss
from tests.sharded.inputs import random_inputs
from tests.sharded.modes import (
    divergence,
    logprob,
    of_sequences,
    of_tokens,
    pair_loss,
    split_both,
    split_tokens,
    split_vocabulary,
)
from tests.sharded.refused import messages
from tests.sharded.replicas import replicas
from tests.sharded.sparsely import certified, decided_together, everything_kept, unbiased
from tests.sharded.streamed import cases as streamed_cases
from tests.sharded.streamed import memory

# seconds until every process says where it stands and ends; alone on two cores 10 to 15 are taken
WATCHDOG = 300
EVERY = ("lse", "correct", "entropy", "log_sum_p2", "mean_logit")
CARRIED = ("lse", "entropy", "log_sum_p2")
# a margin one, a pair one, a batch-coupled one with running statistics
OBJECTIVES = {"dpo": "dpo", "simpo": "simpo", "beta_dpo": partial(build_loss, "beta_dpo", filtered=0.0)}
PATHS = {
    "dpo": ("packed", "factorised", "two_pass"),
    "simpo": ("packed", "factorised", "two_pass"),
    "beta_dpo": (None,),
}

Case = Callable[[], dict[str, float]]


def losses(backend: str) -> dict[str, Any]:
    """What both modes run: inputs, and what is done with them."""
    ragged, capped = random_inputs(1, packed=True, bias=True), random_inputs(2, bias=True, logit_softcap=4.0)
    adapted, few = random_inputs(3, lora=True, logit_scale=1.5), random_inputs(4, pairs=1, tokens=3)
    found: dict[str, Any] = {
        f"{name}, {path}": (ragged, pair_loss(objective, path=path, backend=backend))
        for name, objective in OBJECTIVES.items()
        for path in PATHS[name]
    }
    small = {"workspace_bytes": 60_000, "backend": backend}
    found |= {
        "frozen": (capped, pair_loss("dpo", frozen=True, backend=backend)),
        "softcap": (capped, pair_loss("dpo", backend=backend)),
        "adapter": (adapted, pair_loss("dpo", backend=backend)),
        "tiles": (random_inputs(5, tokens=40), pair_loss("dpo", **small)),
        "groups": (
            random_inputs(5, pairs=5, tokens=12, packed=True),
            pair_loss("simpo", path="packed", **{**small, "workspace_bytes": 90_000}),
        ),
        "parts of a pair": (random_inputs(5, tokens=40), pair_loss("simpo", path="factorised", **small)),
        "token weights": (ragged, pair_loss("dpo", weighted=True, backend=backend)),
        "one by one": (ragged, pair_loss("dpo", reduction="none", backend=backend)),
        "kl": (capped, pair_loss("tdpo", backend=backend)),
        "one pair": (few, pair_loss("dpo", backend=backend)),
        "no token": (random_inputs(6, ignored=1.1), pair_loss("dpo", backend=backend)),
        "no pair": (random_inputs(6, pairs=0), pair_loss(OBJECTIVES["beta_dpo"], backend=backend)),
        "sums": (ragged, of_sequences(backend=backend)),
    }
    return found


def few_losses(backend: str) -> dict[str, Any]:
    """The three objectives on each path, and what has no token or pair."""
    names = (*OBJECTIVES, "no")
    return {name: case for name, case in losses(backend).items() if name.startswith(names)}


def of_vocabulary(backend: str) -> dict[str, Any]:
    """What a vocabulary's parts run beside."""
    plain, odd = (
        random_inputs(7, tokens=20),
        random_inputs(8, vocab=1001, bias=True, logit_scale=0.5, logit_softcap=3.0),
    )
    wide = random_inputs(10, tokens=20, dtype=torch.float64)
    empty = random_inputs(9, ignored=1.1)
    return {
        "outputs": (odd, logprob(outputs=EVERY, upstream=CARRIED, backend=backend)),
        "outputs, frozen": (odd, logprob(frozen=True, outputs=EVERY, backend=backend)),
        "outputs, frozen, carried": (odd, logprob(frozen=True, outputs=EVERY, upstream=CARRIED, backend=backend)),
        "tiles, frozen": (plain, logprob(frozen=True, workspace_bytes=40_000, backend=backend)),
        "divergence": (odd, divergence(backend=backend)),
        "divergence, tiles": (wide, divergence(workspace_bytes=60_000, backend="torch")),
        "divergence, no token": (empty, divergence(backend=backend)),
        "losses of tokens": (odd, of_tokens(backend=backend)),
        "no token at all": (empty, logprob(outputs=EVERY, backend=backend)),
        "drawn tokens": (plain, pair_loss("sgdpo", backend=backend)),
    }


def cases(world: int) -> dict[str, Case]:
    found: dict[str, Case] = {}
    uneven, one_without = ((1, 2), (1, 0)) if world == 2 else ((3, 1, 2, 1), (1, 0, 2, 1))
    # four processes cost twice as much and pass the same code
    of_both = losses if world == 2 else few_losses
    for backend in ("torch", "cpp") if world == 2 else ("cpp",):
        of_stream = streamed_cases(OBJECTIVES, backend, world)
        found |= {f"streamed, {name}, {backend}": case for name, case in of_stream.items()}
        for name, (inputs, run) in (of_both(backend) | of_vocabulary(backend)).items():
            found[f"vocabulary, {name}, {backend}"] = partial(split_vocabulary, inputs, run, uneven)
        for name, (inputs, run) in of_both(backend).items():
            found[f"tokens, {name}, {backend}"] = partial(split_tokens, inputs, run, uneven)
            found[f"tokens, {name}, {backend}, one without"] = partial(split_tokens, inputs, run, one_without)
    if world == 4:
        vocab, tokens = grid()
        for name, (inputs, run) in of_both("torch").items():
            found[f"both, {name}"] = partial(split_both, inputs, run, vocab, tokens)
        for counts in ((3, 2), (4, 0)):
            found[f"replicas, {counts}"] = partial(replicas, counts, vocab, tokens)
    else:
        for frozen in (False, True):
            for mode in ("certified", "unbiased"):
                found[f"sparse, all kept, {mode}, {frozen}"] = partial(everything_kept, mode, frozen)
            for name, shares in (("sparse", (1, 1)), ("exact", (3, 1))):
                found[f"decided {name}, {frozen}"] = partial(decided_together, shares, frozen)
        found |= {"certified": certified, "unbiased": unbiased}
        found["traffic"] = traffic
    return found


def traffic() -> dict[str, float]:
    """Bytes of either mode beyond the formula's; see benchmarks/sharded.py."""
    size = Size(2, tokens=64, vocab=4000, hidden=32, bytes=4, workspace=200_000)
    found = {mode: counted(mode, size) for mode in MODES}
    beyond = {f"sent, {mode}": found[mode]["sent"] - size.sent(mode) for mode in MODES}
    return beyond | {"held, vocabulary": found["vocabulary"]["held"] - size.held("vocabulary")} | memory(size)


def grid() -> tuple[Any, Any]:
    """Two groups of two neighbours for the vocabulary, and across them two for the tokens."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    return mesh.get_group("tp"), mesh.get_group("cp")


def largest(errors: dict[str, float]) -> dict[str, float]:
    """Over all processes, which have the same names."""
    values = torch.tensor(list(errors.values()), dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return dict(zip(errors, values.tolist(), strict=True))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(WATCHDOG, exit=True)
    torch.set_num_threads(1)
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    everything: dict[str, Any] = {name: largest(case()) for name, case in cases(world).items()}
    if world == 2:
        everything["refused"] = messages()
    if rank == 0:
        torch.save(everything, folder / "found")
    dist.destroy_process_group()
