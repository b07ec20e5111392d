"""Two processes: TRL's fused head under DDP and FSDP2, patched and not; both trainers under DDP, ours under FSDP2."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 or newer is not installed")

from .fused_dpo_ranks import OURS, RUNS, SPLIT
from .same_run import assert_same
from .tiny import dataset

ROOT = Path(__file__).parents[2]
SECONDS = 270


def launch(module, folder):
    """Both processes of a module, with torchrun's environment; what process 0 left."""
    # the loopback: a machine's own name may resolve to nothing, or slowly
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(folder)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    messages = [process.communicate(timeout=SECONDS)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(messages)
    return torch.load(folder / "found")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return launch("tests.integrations.trl_ranks", tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    dataset("pairs").save_to_disk(folder / "pairs")
    found = launch("tests.integrations.fused_dpo_ranks", folder)
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
