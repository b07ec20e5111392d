"""One pair in a batch, and pairs with empty responses, for the losses that take statistics of a batch."""

import math
from typing import Any

import pytest
import torch

from spo_kernels.integrations.token_batches import step_indices
from spo_kernels.losses import LOSSES, build_loss
from spo_kernels.losses.state import has_state
from spo_kernels.train.batches import IGNORE_INDEX
from spo_kernels.train.forwards import micro_batches
from spo_kernels.train.policy import Policy

from .conftest import Train, read_metrics, read_weights
from .test_model import build

STATISTICS = ("alpha_dpo_code", "bco", "beta_dpo", "aot", "aot_unpaired", "dr_dpo", "kto", "nca_pair", "wpo")
FIELDS: dict[str, dict[str, Any]] = {"alpha_dpo_code": {"beta": 1.0}}


@pytest.mark.parametrize("name", [n for n in STATISTICS if n in LOSSES])
def test_training_with_one_pair_a_batch(train: Train, tmp_path: Any, name: str) -> None:
    options = ("--loss", name, "--max-steps", 6, "--batch-size", 1, "--logging-steps", 1, "--save-steps", 0)
    options += ("--eval-fraction", 0.1, "--learning-rate", 1e-2)
    fields = [f"--loss-arg={key}={value}" for key, value in FIELDS.get(name, {}).items()]
    assert train(*options, *fields) == 0
    assert all(math.isfinite(r["loss"]) for r in read_metrics(tmp_path / "out"))
    assert all(bool(w.isfinite().all()) for w in read_weights(tmp_path / "out").values())


def batch(rows: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of pairs whose responses have so many tokens, after prompts of 4."""
    lengths = [chosen for chosen, _ in rows] + [rejected for _, rejected in rows]
    ids = torch.randint(3, 97, (len(lengths), 12), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, IGNORE_INDEX)
    for i, length in enumerate(lengths):
        labels[i, 4 : 4 + length] = ids[i, 4 : 4 + length]
    return ids, labels


BATCHES = {
    "one pair": [(5, 3)],
    "chosen empty": [(0, 3), (4, 2)],
    "rejected empty": [(5, 0), (4, 2)],
    "one pair, rejected empty": [(5, 0)],
    "one pair, chosen empty": [(0, 5)],
    "all empty": [(0, 0)],
}


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", [n for n in STATISTICS if n in LOSSES])
def test_empty_responses(name: str, rows: list[tuple[int, int]]) -> None:
    """Losses, gradients and running statistics stay finite, and the next batch's do."""
    objective = build_loss(name, **FIELDS.get(name, {}))
    policy = Policy(build("llama"), objective).train()
    for pairs in (rows, [(3, 4), (5, 2)], rows):
        ids, labels = batch(pairs)
        loss, sums, pair_logps = policy(ids, labels, ref_logps=torch.zeros(2 * len(pairs)))
        loss.backward()
        assert bool(loss.isfinite()) and pair_logps is not None and bool(pair_logps.isfinite().all())
        assert all(bool(v.isfinite().all()) for v in sums.values()), sums
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in policy.parameters())
        if has_state(objective):
            state = [v for v in objective.state_dict().values() if isinstance(v, torch.Tensor | float)]
            assert all(math.isfinite(float(v)) for v in state), objective.state_dict()


def test_value_of_empty_chosen_responses() -> None:
    """What the inner steps of SPO ask for."""
    policy = Policy(build("llama"), build_loss("spo"))
    assert policy.chosen_logps(*batch([(0, 3)])).tolist() == [0.0]


@pytest.mark.parametrize(("world", "size"), [(2, 2), (4, 1)])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_processes_share_the_batches_of_one(world: int, size: int, accumulated: int) -> None:
    """Forward by forward: 2 processes with 2 pairs have together the 4 pairs that 1 process has."""
    for step in range(5):
        indices = step_indices(step, 48, 4 * accumulated, seed=1)
        one = micro_batches(indices, 0, 1, 4)
        parts = [micro_batches(indices, rank, world, size) for rank in range(world)]
        together = [sorted(i for part in forward for i in part) for forward in zip(*parts, strict=True)]
        assert together == [sorted(forward) for forward in one]
