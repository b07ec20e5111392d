"""`FusedDPOTrainer` is TRL's `DPOTrainer`: the same losses, metrics and weights, step by step."""

import os
from itertools import combinations, product

import pytest

pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 or newer is not installed")

from spo_kernels.integrations import trl
from spo_kernels.integrations.layout import batch

from .fused_dpo_rows import ACCUMULATION, ADAPTERS, EVERYTHING, LOSSES, PAIRWISE, PRECOMPUTED
from .same_run import assert_same
from .tiny import Run

# `make test-trl`
ROWS = EVERYTHING if os.environ.get("SPO_TEST_TRL") == "everything" else PAIRWISE
MODELS = {
    "llama": {},
    "gemma2": {},
    "cohere": {},
    "gpt2": {},
    # TRL asks the router for its loss whatever the model's configuration says
    "mixtral": {},
    "mixtral, own coefficient": {"router_aux_loss_coef": 0.3},
    "llama, synchronised reference": {"sync_ref_model": True, "ref_model_sync_steps": 3},
    "llama, gradient checkpointing": {"gradient_checkpointing": True},
}


def both(kind, folder, **settings):
    return Run("FusedDPO", kind, folder, library=trl, **settings), Run("DPO", kind, folder, **settings)


@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps(tmp_path, name):
    ours, trls = both(name.split(",")[0], tmp_path, steps=20, **MODELS[name])
    assert_same(ours, trls)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row)))
def test_row(tmp_path, monkeypatch, row):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    loss, adapter, precomputed, accumulation = row
    settings = {
        **LOSSES[loss],
        "adapter": adapter,
        "precompute_ref_log_probs": precomputed,
        "gradient_accumulation_steps": accumulation,
    }
    ours, trls = both("llama", tmp_path, steps=20 if ROWS is EVERYTHING else 2, **settings)
    assert len(ours.losses) == len(ours.logs) * accumulation
    assert_same(ours, trls)


def test_the_rows_cover_every_pair_of_choices():
    factors = (tuple(LOSSES), ADAPTERS, PRECOMPUTED, ACCUMULATION)
    for one, other in combinations(range(len(factors)), 2):
        assert {(row[one], row[other]) for row in PAIRWISE} == set(product(factors[one], factors[other]))


def test_a_lost_gradient_of_the_head_would_show(tmp_path, monkeypatch):
    fused = batch.fused_spo_loss

    def without(hidden, head, labels, **options):
        return fused(hidden, type(head)(head.weight.detach()), labels, **options)

    monkeypatch.setattr(batch, "fused_spo_loss", without)
    ours, trls = both("llama", tmp_path, steps=20)
    with pytest.raises(AssertionError):
        assert_same(ours, trls)
