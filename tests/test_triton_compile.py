"""Every Triton kernel and configuration, compiled ahead of time for each architecture; needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

# how many variants are compiled at least; of GPUs that no data centre has, each kernel and launch once
ARCHITECTURES = {"sm_80": 40, "sm_90": 40, "sm_100": 40, "gfx942": 40, "sm_120": 14, "gfx1100": 14}
# 8 programs of the widest kernel share a multiprocessor of any of them: 99 KiB on sm_120, 64 KiB on gfx942
SHARED_BYTES = 8192
# what a thread may put aside in a candidate of the autotuner, which chooses by time; the tables' may not
CANDIDATE_SPILL_BYTES = 16


def compile_all(architecture):
    """One row per kernel and configuration, from a process that does not interpret kernels."""
    root = Path(__file__).parent.parent
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "SPO_AUTOTUNE")
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    few = ["few"] if ARCHITECTURES[architecture] < 40 else []
    command = [sys.executable, str(root / "tests" / "triton_aot.py"), architecture, *few]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("warp_size", "architecture"), [(64, "gfx942"), (32, "gfx1100")])
def test_an_amd_gpu_gets_the_table_of_its_warps(monkeypatch, warp_size, architecture):
    """A thread has 16 elements of a row that waits in registers, whatever a warp is."""
    from spo_kernels.backends.triton import config

    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(warp_size=warp_size))
    found = config.architecture_of.__wrapped__(torch.device("cuda"))
    assert found == architecture
    for narrow in (False, True):
        launch = config.whole_row(8192, found, narrow)
        assert launch.block == 16 * launch.num_warps * warp_size
    table = config.launch_for("tile_grad", found)
    assert table.block == 16 * table.num_warps * warp_size


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_and_configuration(architecture):
    rows = compile_all(architecture)
    assert {row["case"].split()[0] for row in rows} == {"tile_stats", "tile_grad", "scale_rows", "pair_loss"}
    assert len(rows) >= ARCHITECTURES[architecture]

    allowed = {False: 0, True: CANDIDATE_SPILL_BYTES}
    assert [row for row in rows if row["spills"] > allowed[row["candidate"]]] == []
    assert [row for row in rows if row["shared"] > SHARED_BYTES] == []

    # a row times a stride, in 64 bits wherever there are both: 2^31 float32 are 8 GiB, a tile that is allowed
    assert [row for row in rows if row["narrow_offsets"]] == []
    packed = ("pair_loss spo nll", "pair_loss spo hinge", "pair_loss spo hinge input")
    assert [row for row in rows if row["case"] not in packed and not row["wide_offsets"]] == []

    # 16-byte accesses where widths are multiples of 16; others are legal and slower
    aligned = [row for row in rows if "ragged" not in row["case"] and not row["case"].startswith("pair_loss")]
    assert [row for row in aligned if not row["vector"]] == []
