"""TRL's fused head under DDP and FSDP2 on two processes, patched and not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 or newer is not installed")

ROOT = Path(__file__).parents[2]
SECONDS = 150


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    # the loopback: a machine's own name may resolve to nothing, or slowly
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integrations.trl_ranks", str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    messages = [process.communicate(timeout=SECONDS)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(messages)
    return torch.load(folder / "found")


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
