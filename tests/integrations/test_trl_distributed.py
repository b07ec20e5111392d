"""Two processes: TRL's fused head under DDP and FSDP2, patched and not; both trainers under DDP, ours under FSDP2."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 or newer is not installed")

from tests.processes import found_by

from . import trl_ranks
from .fused_dpo_ranks import OURS, RUNS, SPLIT, WATCHDOG
from .same_run import assert_same
from .tiny import dataset


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return found_by("tests.integrations.trl_ranks", 2, tmp_path_factory.mktemp("ranks"), trl_ranks.WATCHDOG)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    dataset("pairs").save_to_disk(folder / "pairs")
    found = found_by("tests.integrations.fused_dpo_ranks", 2, folder, WATCHDOG)
    return {**found, "saved": AutoModelForCausalLM.from_pretrained(folder / "saved").state_dict()}


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_patched_equals_trl(found, way):
    trls, ours = found[f"{way} trl"], found[f"{way} ours"]
    for mine, theirs in zip(ours["losses"], trls["losses"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert ours["losses"][1][1] == 0.0
    assert torch.equal(*ours["weights"])
    assert_same_way(ours, trls)


def test_both_ways_agree(found):
    assert_same_way(found["ddp ours"], found["fsdp2 ours"])


def assert_same_way(ours, trls):
    """Weights that moved alike."""
    moved = (trls["weights"][0] - trls["start"]).norm()
    assert moved > 0 and (ours["weights"][0] - trls["weights"][0]).norm() <= 1e-3 * moved


@pytest.mark.parametrize("name", RUNS)
def test_fused_trainer_equals_trl(trained, name):
    for ours, trls in zip(trained[f"{name} FusedDPO"], trained[f"{name} DPO"], strict=True):
        assert_same(SimpleNamespace(**ours), SimpleNamespace(**trls))


def test_a_budget_of_tokens_equals_trl(trained):
    """Whatever the processes' forwards are, metrics and weights are those of the batches."""
    for split, trls in zip(trained["split"], trained[f"{SPLIT} DPO"], strict=True):
        assert_same(SimpleNamespace(**{**split, "losses": trls["losses"]}), SimpleNamespace(**trls))
    counts = [len(split["losses"]) for split in trained["split"]]
    assert len(set(counts)) == 2 and min(counts) > len(trained[f"{SPLIT} DPO"][0]["losses"]), counts


@pytest.mark.parametrize("name", RUNS)
def test_fused_trainer_under_fsdp2(trained, name):
    for ours, trls in zip(trained[f"{name} FSDP2"], trained[f"{name} DPO"], strict=True):
        assert_same(SimpleNamespace(**ours), SimpleNamespace(**trls))


def test_losses_of_mixed_precision_are_not_rounded(trained):
    """As accelerate would have what leaves the model."""
    (loss,) = trained["bf16"]
    assert loss != torch.tensor(loss).bfloat16().item()


def test_resumed_under_fsdp2(trained):
    """Same bits, statistics of the objective too; saved as `from_pretrained` loads it."""
    whole, resumed, saved = trained["whole"], trained["resumed"], trained["saved"]
    assert whole["losses"][2:] == resumed["losses"]
    assert all(torch.equal(weight, resumed["end"][key]) for key, weight in whole["end"].items())
    assert all(torch.equal(weight, saved[key]) for key, weight in whole["end"].items())


@pytest.mark.parametrize("name", ["split", *OURS, *(f"{name} FusedDPO" for name in RUNS)])
def test_processes_stay_together(trained, name):
    one, other = (process["end"] for process in trained[name])
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert trained[name][0]["losses"] != trained[name][1]["losses"]
