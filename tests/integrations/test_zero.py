"""`FusedDPOTrainer` under DeepSpeed's ZeRO-2 and 3 on two processes against DDP; skips where there is no DeepSpeed."""

from types import SimpleNamespace

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 or newer is not installed")

from tests.processes import found_by

from .same_run import assert_same
from .tiny import dataset, make_model
from .zero_ranks import RUNS, STAGES, WATCHDOG


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    dataset("pairs").save_to_disk(folder / "pairs")
    for kind in {kind for kind, _ in RUNS.values()}:
        for seed in range(2):
            make_model(kind, seed).save_pretrained(folder / f"{kind}-{seed}")
    return found_by("tests.integrations.zero_ranks", 2, folder, WATCHDOG)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", RUNS)
def test_equals_ddp(trained, name, stage):
    for ours, ddp in zip(trained[f"{name} ZeRO-{stage}"], trained[f"{name} DDP"], strict=True):
        # under ZeRO-3 each process begins with nothing of a weight
        assert_same(SimpleNamespace(**{**ours, "start": ddp["start"]}), SimpleNamespace(**ddp))
