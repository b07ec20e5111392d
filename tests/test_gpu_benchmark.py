"""The GPU benchmark without a GPU: its paper figures, its tables, and a provider whose process dies."""

import json

from benchmarks import gpu, gpu_roofline


def test_bytes_per_logit_on_paper():
    """One read; one read and one write of a half-precision operand; nothing else."""
    moved = {row.kernel: (row.read, row.write) for row in gpu_roofline.PAPER}
    assert moved["tile_stats"] == (4, 0)
    assert moved["tile_stats + operand"] == (4, 2)
    assert moved["tile_grad"] == (4, 2)
    assert "| tile_grad | 4 B | 2 B | 6 |" in gpu_roofline.paper()


def test_a_provider_that_dies_costs_its_own_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "sweep", lambda *arguments: [])
    # main sets it for the processes that it starts
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    gpu.main(["--dry-run", "--shapes", "0", "--providers", "floor,dies,naive", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    status = {(row["provider"], row["phase"]): row["status"] for row in report["rows"]}
    assert status["dies", "all"] == "failed"
    for phase in ("forward", "frozen", "trained"):
        assert status["naive", phase] == "ok"
    assert status["floor-4", "trained"] == "ok"
    trained = next(row for row in report["rows"] if row["provider"] == "naive" and row["phase"] == "trained")
    assert 0 <= trained["errors"]["token"] < 1e-4 and 0 <= trained["errors"]["dw"] < 1e-4
    text = (tmp_path / "gpu-dry-run.md").read_text()
    assert "| naive |" in text and "exit code 11" in text and text in capsys.readouterr().out
