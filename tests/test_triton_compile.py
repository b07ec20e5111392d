"""Every Triton kernel and configuration, compiled ahead of time for each architecture; needs no GPU."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from tests.processes import Forked, exit_codes, run_module

# how many variants are compiled at least, of 0.3 s each: all for one architecture of each vendor; of others each kernel
# and launch once, with the most outputs
ARCHITECTURES = {"sm_80": 14, "sm_90": 40, "sm_100": 14, "gfx942": 40, "sm_120": 14, "gfx1100": 14}
# 8 programs of the widest kernel share a multiprocessor of any of them: 99 KiB on sm_120, 64 KiB on gfx942
SHARED_BYTES = 8192
# what a thread may put aside in a candidate of the autotuner, which chooses by time; the tables' may not
CANDIDATE_SPILL_BYTES = 16


def compile_all(architecture, folder):
    """One row per kernel and configuration, from a process that does not interpret kernels."""
    few = ["few"] if ARCHITECTURES[architecture] < 40 else []
    process = Forked(folder, run_module, "tests.triton_aot", architecture, *few, TRITON_INTERPRET="0", SPO_AUTOTUNE="0")
    assert exit_codes([process], 300) == [0], process.written[1][-3000:]
    return [json.loads(line) for line in process.written[0].splitlines()]


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
def test_every_kernel_and_configuration(architecture, tmp_path):
    rows = compile_all(architecture, tmp_path)
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
