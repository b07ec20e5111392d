"""Shapes, lengths, objectives and budgets at random: `python -m tests.sharded.shapes RANK WORLD FOLDER`.

What no process may do is wait for another forever; process 0 leaves the largest error of each call, or what all said.
"""

import faulthandler
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from spo_kernels.losses.registry import build_loss
from tests.sharded.inputs import Inputs, random_inputs
from tests.sharded.modes import Run, divergence, logprob, of_sequences, pair_loss, split_tokens, split_vocabulary
from tests.sharded.ranks import largest
from tests.sharded.streamed import Batch, own_inputs, streamed

WATCHDOG, CALLS = 300, 200
SPLIT = {"vocabulary": split_vocabulary, "tokens": split_tokens, "streamed": streamed}
OBJECTIVES = ("dpo", "spo", "simpo", "kto", "cpo", "ipo", "tdpo", "aot", "alpha_dpo", "beta_dpo")


def objective(name: str) -> Any:
    return lambda: build_loss(name)


def batch(choose: random.Random) -> Batch:
    return choose.choice((0, 1, 1, 2, 5)), choose.choice((0.0, 0.3, 0.9, 1.1))


def shape(choose: random.Random) -> dict[str, Any]:
    return {
        "tokens": choose.choice((1, 2, 7, 30)),
        "vocab": choose.choice((2, 9, 130, 257, 1000)),
        "width": choose.choice((1, 8, 24)),
        "bias": choose.random() < 0.3,
        "packed": choose.random() < 0.5,
        "spread": choose.choice((1.0, 30.0)),
        "logit_softcap": choose.choice((None, None, 5.0)),
    }


def streaming(seed: int) -> tuple[Inputs, Run, tuple[float, ...]]:
    """The same of a head that is streamed; processes have batches of their own."""
    choose = random.Random(seed)
    inputs = own_inputs(seed, (batch(choose), batch(choose)), **shape(choose))
    backend, budget = choose.choice(("torch", "cpp")), choose.choice((None, 20_000, 50_000, 300_000))
    same: dict[str, Any] = {"workspace_bytes": budget, "backend": backend}
    frozen, reduction = choose.random() < 0.3, choose.choice(("mean", "mean", "sum", "none"))
    name = choose.choice([name for name in OBJECTIVES if name != "tdpo"])
    path = choose.choice((None, None, None, None, "packed"))
    pairs = pair_loss(
        objective(name), frozen=frozen, weighted=choose.random() < 0.3, reduction=reduction, path=path, **same
    )
    per_token = logprob(frozen=frozen, outputs=("entropy", "mean_logit"), upstream=("entropy",), **same)
    shares = choose.choice(((1, 1), (1, 4), (0, 1), (3, 2)))
    return inputs, choose.choice((pairs, pairs, per_token, of_sequences(**same))), shares


def drawn(seed: int) -> tuple[str, Inputs, Run, tuple[float, ...]]:
    """The mode, inputs, call and shares of a number; the same in every process."""
    choose = random.Random(seed)
    backend = choose.choice(("torch", "cpp"))
    pairs, ignored = batch(choose)
    lora = choose.random() < 0.15
    inputs = random_inputs(seed, pairs=pairs, ignored=ignored, lora=lora, **shape(choose))
    budget = {"workspace_bytes": choose.choice((None, 20_000, 50_000, 300_000)), "backend": backend}
    sparsity = choose.choice(("exact", "exact", "certified", "unbiased"))
    frozen = choose.random() < 0.3
    loss = objective(choose.choice(OBJECTIVES))
    path = choose.choice((None, None, "packed", "factorised", "two_pass")) if sparsity == "exact" else None
    calls = {
        "pairs": pair_loss(
            loss, frozen=frozen, weighted=choose.random() < 0.3, path=path, sparsity=sparsity,
            reduction=choose.choice(("mean", "mean", "sum", "none")), token_metrics=choose.random() < 0.5, **budget,
        ),
        "logprob": logprob(frozen=frozen, outputs=("entropy", "mean_logit"), sparsity=sparsity, **budget),
        "kl": divergence(**budget),
        "sequences": of_sequences(**budget),
    }  # fmt: skip
    mode = choose.choice(("vocabulary", "vocabulary", "tokens"))
    # per-token calls have nothing to share there
    names = (
        ("pairs", "pairs", "pairs", "logprob", "kl", "sequences") if mode == "vocabulary" else ("pairs", "sequences")
    )
    shares = choose.choice(((1, 1), (1, 4), (3, 2)) if mode == "vocabulary" else ((1, 1), (1, 4), (0, 1), (1, 0)))
    return mode, inputs, calls[choose.choice(names)], shares


def error(seed: int) -> float | str:
    """The largest of a call, or what all processes said; certified and unbiased gradients are their own."""
    mode, inputs, run, shares = drawn(seed) if seed % 3 else ("streamed", *streaming(seed))
    said: str | None = None
    found: dict[str, float] = {}
    try:
        found = SPLIT[mode](inputs, run, shares)
    except ValueError as wrong:
        said = str(wrong)
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, said)
    assert len(set(everybody)) == 1, everybody
    return max(largest(found).values()) if said is None else said


if __name__ == "__main__":
    faulthandler.dump_traceback_later(WATCHDOG, exit=True)
    torch.set_num_threads(1)
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    errors = {seed: error(seed) for seed in range(CALLS)}
    if rank == 0:
        torch.save(errors, folder / "found")
    dist.destroy_process_group()
