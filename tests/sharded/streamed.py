"""Heads whose rows lie on processes with tokens of their own, beside each process with the whole head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.sharded import Size, counted
from tests.sharded.inputs import Inputs, alone, parts, random_inputs, token_part, worst
from tests.sharded.modes import Run, alone_of, logprob, of_sequences, of_tokens, pair_loss, rows_of, tokens_of
from tests.sharded.replicas import of_pairs, step

# of a process: pairs that it has, and the share of their tokens that do not count
Batch = tuple[int, float]
Case = Callable[[], dict[str, float]]
EVERY = ("lse", "correct", "entropy", "log_sum_p2", "mean_logit")
SHARES = {2: (1, 2), 4: (3, 1, 0, 2)}
BATCHES: dict[int, tuple[Batch, ...]] = {2: ((3, 0.3), (2, 0.5)), 4: ((2, 0.3), (1, 0.0), (3, 0.3), (1, 0.5))}


def own_inputs(seed: int, batches: tuple[Batch, ...], **options: Any) -> Inputs:
    """Heads that all processes have, and this process's tokens."""
    pairs, ignored = batches[dist.get_rank()]
    common = random_inputs(seed, **options)
    mine = random_inputs(seed + 1000 * (1 + dist.get_rank()), pairs=pairs, ignored=ignored, **options)
    return replace(mine, weight=common.weight, bias=common.bias, ref_weight=common.ref_weight)


def mean_of(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The head's gradients as FSDP has them."""
    for name in ("weight", "bias"):
        if name in found:
            dist.all_reduce(found[name])
            found[name] /= dist.get_world_size()
    return found


def streamed(inputs: Inputs, run: Run, shares: tuple[float, ...]) -> dict[str, float]:
    """Errors where every process has rows, and tokens."""
    rows, group = parts(len(inputs.weight), shares)[dist.get_rank()], dist.group.WORLD
    ours = run(inputs, inputs.head(rows, shard_group=group), inputs.ref_head(rows, shard_group=group))
    expected = mean_of(run(inputs, inputs.head(), inputs.ref_head()))
    return worst(ours, rows_of(expected, rows))


def drawn(
    seed: int, run: Run, shares: tuple[float, ...], batches: tuple[Batch, ...], **options: Any
) -> dict[str, float]:
    return streamed(own_inputs(seed, batches, **options), run, shares)


def and_sequences(run: Run) -> dict[str, float]:
    """Errors where the processes that lend each other rows have some tokens of each sequence."""
    world, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    inputs = random_inputs(27, bias=True)
    rows, (part, places) = parts(len(inputs.weight), SHARES[world])[rank], token_part(inputs, rank, SHARES[world])
    head = inputs.head(rows, shard_group=group, sequence_group=group)
    ours = run(part, head, inputs.ref_head(rows, shard_group=group))
    # the one loss's gradient is the sum
    ours |= {name: world * ours[name] for name in ("weight", "bias")}
    return worst(ours, rows_of(tokens_of(alone_of(inputs, run), inputs, part, places), rows))


def beside_one(objective: Callable[[], Any], counts: tuple[int, ...]) -> dict[str, float]:
    """Errors beside one process that has all pairs, three steps; in float64, as in `replicas`."""
    ours, theirs, errors = objective(), objective(), {}
    mine = parts(sum(counts), counts)[dist.get_rank()]
    for number in range(3):
        inputs = random_inputs(60 + number, pairs=sum(counts), dtype=torch.float64)
        rows = parts(len(inputs.weight), SHARES[len(counts)])[dist.get_rank()]
        groups = {"shard_group": dist.group.WORLD}
        heads = inputs.head(rows, **groups), inputs.ref_head(rows, **groups)
        found = step(of_pairs(inputs, mine), *heads, ours, "two_pass")
        dist.all_reduce(found["loss"])
        found["weight"] *= len(counts)
        with alone():
            expected = step(inputs, inputs.head(), inputs.ref_head(), theirs, "two_pass")
        expected["weight"] = expected["weight"][rows]
        expected["hidden"] = expected["hidden"].unflatten(0, (2, -1))[:, mine].flatten(0, 1)
        errors |= {f"{name}, {number}": value for name, value in worst(found, expected).items()}
    return errors


def cases(objectives: dict[str, Any], backend: str, world: int) -> dict[str, Case]:
    """By name."""
    shares, batches = SHARES[world], BATCHES[world]
    same: dict[str, Any] = {"backend": backend}
    # the path that a streamed head takes, for the whole head too
    pairs: dict[str, Any] = {"backend": backend, "path": "two_pass"}
    kinds: dict[str, dict[str, Any]] = {"bias": {"bias": True, "packed": True}, "softcap": {"logit_softcap": 4.0}}
    found: dict[str, Case] = {}
    for name, objective in objectives.items():
        # β of beta_dpo is a difference of sums of log-probabilities, whose last bits it magnifies: float64, for which
        # there are no tiles in C++
        exact: dict[str, Any] = {"dtype": torch.float64} if name == "beta_dpo" else {}
        run = pair_loss(objective, **{**pairs, "backend": "torch"} if exact else pairs)
        for seed, (kind, options) in enumerate(kinds.items()):
            found[f"{name}, {kind}"] = partial(drawn, 30 + seed, run, shares, batches, **options, **exact)
        found[f"{name}, no token"] = partial(drawn, 22, run, shares, ((2, 0.3), (2, 1.1), *batches[2:]), **exact)
        found[f"{name}, no pair"] = partial(drawn, 34, run, shares, ((0, 0.3), (2, 0.3), *batches[2:]), **exact)
        if backend == "torch" or world == 4:
            found[f"{name}, one process"] = partial(
                beside_one, objective if callable(objective) else partial(str, objective), (3, 2, 0, 1)[:world]
            )
    some: dict[str, tuple[Run, dict[str, Any]]] = {
        "frozen": (pair_loss("dpo", frozen=True, **pairs), {"bias": True}),
        "tiles": (pair_loss("dpo", workspace_bytes=40_000, **pairs), {"vocab": 1500, "tokens": 20}),
        "token weights": (pair_loss("dpo", weighted=True, **pairs), {}),
        "one by one": (pair_loss("dpo", reduction="none", **pairs), {"packed": True}),
        "sums": (of_sequences(**same), {}),
        "outputs": (logprob(outputs=EVERY, upstream=("lse", "entropy"), **same), {"logit_softcap": 3.0}),
        "losses of tokens": (of_tokens(**same), {"bias": True}),
        "drawn tokens": (pair_loss("sgdpo", **pairs), {}),
    }
    for name, (run, options) in some.items():
        found[name] = partial(drawn, 24, run, shares, batches, **options)
    first = (1,) + (0,) * (world - 1)
    found["rows of one process"] = partial(drawn, 25, pair_loss("dpo", **pairs), first, batches)
    found["and sequences"] = partial(and_sequences, pair_loss("dpo", **pairs))
    found["nothing"] = partial(drawn, 26, pair_loss("dpo", **pairs), shares, ((2, 1.1),) * world)
    return found


def memory(size: Size) -> dict[str, float]:
    """Bytes beyond two slices, the workspace, this process's rows and gradients of them and hidden; a slice's share."""
    found = counted("streamed", size)
    rows, states = 2 * size.head / size.processes, size.tokens * size.hidden * (4 + size.bytes)
    return {
        "held, streamed": found["held"] - rows - states - size.workspace - 2 * found["slice"],
        "slice": found["slice"] / size.head,
    }
