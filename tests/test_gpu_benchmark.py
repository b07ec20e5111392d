"""The GPU benchmark without a GPU: its paper figures, its tables, and a provider whose process dies."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_roofline, gpu_worker
from benchmarks.gpu_settings import GpuJob

START = gpu.start


def start(job, folder):
    """The floor without a process of its own, the others with one."""
    if job.provider != "floor":
        return START(job, folder)
    job.save(folder / "job.json")
    return json.loads(json.dumps(list(gpu_worker.work(GpuJob.load(folder / "job.json")))))


def test_bytes_per_logit_on_paper():
    """One read; one read and one write of a half-precision operand; nothing else."""
    moved = {row.kernel: (row.read, row.write) for row in gpu_roofline.PAPER}
    assert moved["tile_stats"] == (4, 0)
    assert moved["tile_stats + operand"] == (4, 2)
    assert moved["tile_grad"] == (4, 2)
    assert "| tile_grad | 4 B | 2 B | 6 |" in gpu_roofline.paper()


def test_bandwidth_of_the_kernels_alone(emulated_cuda):
    """Every kernel beside a copy of the same tile; a backend that is missing says why."""
    rows = gpu_roofline.measure(torch.device("cpu"), dry=True)
    measured = {row["kernel"] for row in rows if row["backend"] == "cuda"}
    assert measured >= {"tile_stats", "tile_stats, masses", "tile_stats + operand", "tile_grad"}
    copy = next(row for row in rows if row["kernel"] == "copy_")
    for row in rows:
        if "ms" in row:
            assert row["gb_s"] == pytest.approx(row["bytes_per_logit"] * 4 * 300 / row["ms"] / 1e6)
            assert row["of_copy"] == pytest.approx(row["gb_s"] / copy["gb_s"])
    table = gpu_roofline.measured_table(rows)
    assert "| cuda | tile_grad | 4 x 300 | 6 |" in table
    assert "| triton | " in table


def test_the_script_names_every_file_with_gpu_tests():
    root = Path(__file__).parent
    script = (root.parent / "benchmarks" / "gpu.sh").read_text()
    marked = [path for path in root.rglob("test_*.py") if path != Path(__file__)]
    marked = [path for path in marked if any(mark in path.read_text() for mark in ("pytest.mark.gpu", "on_gpu"))]
    assert marked
    assert not [path.name for path in marked if f"{path.relative_to(root.parent)} " not in script]


def test_kernels_that_cannot_be_measured_fail_the_run_after_it(tmp_path, monkeypatch):
    """What else was measured is kept."""

    def broken(*arguments, **options):
        raise TypeError("an argument too many")

    monkeypatch.setattr(gpu, "sweep", lambda *arguments: [])
    monkeypatch.setattr(gpu_roofline, "measure", broken)
    monkeypatch.setattr(gpu, "start", start)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="TypeError: an argument too many"):
        gpu.main(["--dry-run", "--shapes", "0", "--providers", "floor", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "gpu-dry-run.json").read_text())["rows"]


def test_a_provider_that_dies_costs_its_own_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "sweep", lambda *arguments: [])
    monkeypatch.setattr(gpu, "start", start)
    # main sets it for the processes that it starts
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    gpu.main(["--dry-run", "--shapes", "0", "--providers", "floor,dies,naive", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert report["kernels"].startswith("| backend |")
    status = {(row["provider"], row["phase"]): row["status"] for row in report["rows"]}
    assert status["dies", "all"] == "failed"
    for phase in ("forward", "frozen", "trained"):
        assert status["naive", phase] == "ok"
    assert status["floor-4", "trained"] == "ok"
    trained = next(row for row in report["rows"] if row["provider"] == "naive" and row["phase"] == "trained")
    assert 0 <= trained["errors"]["token"] < 1e-4 and 0 <= trained["errors"]["dw"] < 1e-4
    text = (tmp_path / "gpu-dry-run.md").read_text()
    assert "| naive |" in text and "exit code 11" in text and text in capsys.readouterr().out
