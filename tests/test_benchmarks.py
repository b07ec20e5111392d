"""The benchmark's own behaviour on tiny shapes: schema, skips, failures, and a float64 truth that is true."""

import json
import sys
from pathlib import Path
from typing import Any

import in_process
import pytest
import torch

from benchmarks import floor, inputs, launch, long, long_pair, measure, oracle, ours, peers, rounds, run, table, worker
from benchmarks.settings import Job, Setting
from benchmarks.variant import Skip, Step, Variant, pair_loss

TINY = ["--pairs", "1", "--tokens", "6", "--hidden", "16", "--vocab", "40", "--threads", "1"]
SETTING = Setting(pairs=1, tokens=6, hidden=16, vocab=40, threads=1)
ROW_KEYS = {"variant", "about", "status", "reason", "rounds"}
MEASURED_KEYS = ROW_KEYS | {
    "ms", "ms_p20", "ms_p80", "ms_min", "samples", "product_ms", "ge", "x_floor", "x_three", "extra_mib",
    "beyond_gradients_mib", "kept_mib", "process_mib", "memory_method", "loss", "errors", "first_ms",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["variant"]: row for row in report["rows"]}


def test_lm_logits_list_the_sparse_backward() -> None:
    """Concentrated inputs, stated; the sparse rows have the exact loss and nearly the exact gradients."""
    shape = ["--pairs", "1", "--tokens", "16", "--hidden", "256", "--vocab", "8192", "--threads", "1"]
    few = ["--rounds", "1", "--repeats", "1", "--variants", "ours-cpp-certified8"]
    report = run.main([*shape, *few, "--logits", "lm"], in_process.launch)
    assert 10 < report["concentration"]["entries_above_2^-12"] < 200
    assert 0.001 < report["concentration"]["mass_below_2^-12"] < 0.1
    row = rows_of(report)["ours-cpp-certified8"]
    if row["status"] == "skipped":
        pytest.skip(row["reason"])
    assert row["status"] == "ok", row["reason"]
    assert row["loss"] == pytest.approx(report["float64_loss"], abs=1e-5)
    assert 1e-5 < row["errors"]["dh"] < 0.05  # something was left out, and not much


def test_table_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A floor and a variant in real processes; the JSON has the documented keys; the variants agree on the loss."""
    out = tmp_path / "report.json"

    def start(job: Job, timeout: float) -> dict[str, Any]:
        launcher = launch if job.variant in ("floor-4", "ours-torch") else in_process
        return launcher.launch(job, timeout)

    few = ["--rounds", "1", "--repeats", "2", "--variants", "floor-*,naive,ours-torch", "--json", str(out)]
    run.main([*TINY, *few], start)
    report = json.loads(out.read_text())
    assert set(report) == {"setting", "plan", "machine", "floor_tiles_ms", "concentration", "float64_loss", "rows"}
    rows = rows_of(report)
    assert list(rows) == ["floor-3", "floor-4", "naive", "ours-torch"]
    for row in rows.values():
        assert row["status"] == "ok", row["reason"]
        assert set(row) == MEASURED_KEYS
        assert row["ms"] > 0 and row["samples"] == 2
    assert rows["floor-4"]["x_floor"] == pytest.approx(1.0)
    assert rows["floor-4"]["loss"] is None
    for name in ("naive", "ours-torch"):
        assert rows[name]["loss"] == pytest.approx(report["float64_loss"], abs=1e-5)
        assert rows[name]["errors"]["token"] < 1e-5
        assert rows[name]["errors"]["sequence"] < 1e-4
        assert rows[name]["errors"]["dh"] < 1e-5 and rows[name]["errors"]["dw"] < 1e-5
    printed = capsys.readouterr().out
    for text in ("machine:", "versions:", "commit:", "x4prod", "sum6", *rows):
        assert text in printed


def test_paths_have_rows_and_the_cost_model_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--rounds", "1", "--repeats", "1", "--variants", "floor-*,ours-cpp-*"]
    rows = rows_of(run.main(arguments, in_process.launch))
    assert list(rows) == ["floor-3", "floor-4", "ours-cpp-packed", "ours-cpp-factorised", "ours-cpp-two_pass"]
    printed = capsys.readouterr().out
    if rows["ours-cpp-packed"]["status"] == "skipped":
        pytest.skip(rows["ours-cpp-packed"]["reason"])
    for name in list(rows)[2:]:
        assert rows[name]["status"] == "ok", rows[name]["reason"]
        assert rows[name]["errors"]["sequence"] < 1e-4 and rows[name]["errors"]["dw"] < 1e-5
    assert "x3prod" in printed and "packed predicted 0.75, measured" in printed
    problem = inputs.random_problem(SETTING)
    for path, products in table.PATH_PRODUCTS.items():
        with long_pair.counted_products() as made:
            ours.build_ours("cpp", path, problem).run()
        assert sum(made) == products * SETTING.rows * SETTING.hidden * SETTING.vocab
    # a workspace of 1 KiB holds no pair's logits
    small = run.main([*arguments, "--no-accuracy", "--workspace-mib", "0.001"], in_process.launch)
    assert rows_of(small)["ours-cpp-packed"]["status"] == "skipped"
    assert table.cost_model(small["rows"]) is None


def test_a_given_tile_is_not_searched_for(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--rounds", "1", "--repeats", "1", "--variants", "floor-*", "--no-accuracy"]
    report = run.main([*arguments, "--floor-tile", "5x16"], in_process.launch)
    assert report["floor_tiles_ms"] == {} and rows_of(report)["floor-4"]["x_floor"] == pytest.approx(1.0)
    assert "floor: 5x16 (rows x columns) for each product, as asked" in capsys.readouterr().out


def test_a_failing_and_a_missing_variant_keep_their_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(problem: inputs.Problem) -> Step:
        raise ValueError("no such tile\nsecond line")

    def refuse(problem: inputs.Problem) -> Step:
        raise Skip("needs another machine")

    broken = [Variant("broken", "fails", explode), Variant("elsewhere", "skips", refuse)]
    monkeypatch.setattr(peers, "VARIANTS", broken)
    few = ["--rounds", "2", "--repeats", "1", "--variants", "broken,elsewhere,naive"]
    report = run.main([*TINY, *few], in_process.launch)
    rows = rows_of(report)
    assert rows["broken"]["status"] == "failed" and rows["broken"]["reason"] == "ValueError: no such tile"
    assert rows["elsewhere"]["status"] == "skipped" and rows["elsewhere"]["reason"] == "needs another machine"
    assert rows["naive"]["status"] == "ok" and rows["naive"]["rounds"] == 2
    # No floor was asked for: the ratio is unknown, not invented.
    assert rows["naive"]["x_floor"] is None
    printed = capsys.readouterr().out
    assert "failed: ValueError: no such tile" in printed
    assert "skipped: needs another machine" in printed


@pytest.mark.parametrize(
    ("module", "variant"), [("trl", "trl"), ("liger_kernel", "liger-dpo"), ("cut_cross_entropy", "cce")]
)
def test_absent_peer_is_skipped_with_the_reason(
    module: str, variant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    result = worker.work(Job(SETTING, variant), tmp_path / "result.json")
    assert result["status"] == "skipped"
    assert module in result["reason"]


def test_unavailable_backend_is_skipped_and_a_broken_import_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = worker.work(Job(SETTING, "ours-abacus"), tmp_path / "result.json")
    assert result["status"] == "skipped" and "abacus" in result["reason"]
    monkeypatch.setitem(sys.modules, "spo_kernels", None)
    result = worker.work(Job(SETTING, "ours-torch"), tmp_path / "result.json")
    assert result["status"] == "failed" and "spo_kernels cannot be imported" in result["reason"]
    assert [variant.name for variant in ours.our_variants(SETTING)][:2] == ["ours-torch", "ours-cpp"]


def test_a_dead_or_hanging_process_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(SETTING, "naive")
    monkeypatch.setattr(launch.sys, "executable", "/bin/false")
    dead = launch.launch(job, timeout=60)
    assert dead["status"] == "failed" and dead["reason"].startswith("exit code 1")
    assert launch.describe_exit(-9, "") == "killed by SIGKILL"
    monkeypatch.undo()
    late = launch.launch(job, timeout=0.05)
    assert late["status"] == "failed" and "no result within" in late["reason"]

    def crash(job: Job, timeout: float) -> dict[str, Any]:
        raise OSError("no processes left")

    assert rounds.attempt(job, rounds.Plan(), crash)["reason"] == "OSError: no processes left"


def test_memory_cap_gives_a_row_that_says_so() -> None:
    """The cap is on the worker: 128 MiB of logits do not fit, and no other process notices."""
    setting = Setting(pairs=1, tokens=512, hidden=8, vocab=1 << 15, threads=1)
    result = launch.launch(Job(setting, "naive", phases=("memory",), limit_bytes=200 << 20), timeout=120)
    assert result["status"] == "failed"
    assert result["reason"].startswith("out of memory") or "allocate" in result["reason"], result["reason"]


def test_frozen_head_has_two_products_and_no_dw() -> None:
    arguments = [*TINY, "--frozen-head", "--rounds", "1", "--repeats", "1", "--variants", "floor-*,naive"]
    rows = rows_of(run.main(arguments, in_process.launch))
    assert list(rows) == ["floor-2", "naive"]
    assert rows["floor-2"]["x_floor"] == pytest.approx(1.0)
    assert rows["naive"]["errors"]["dw"] is None
    assert rows["naive"]["errors"]["dh"] < 1e-5


@pytest.mark.parametrize("pattern", ["nonsense", "naive,zzz*"])
def test_unknown_variant_names_the_known_ones(pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main([*TINY, "--variants", pattern])
    assert "floor-4" in capsys.readouterr().err


@pytest.mark.parametrize("frozen", [False, True])
def test_oracle_equals_autograd_in_float64(frozen: bool) -> None:
    setting = Setting(pairs=3, tokens=7, hidden=12, vocab=33, frozen=frozen)
    problem = inputs.peaked_problem(setting)
    truth = oracle.solve(problem)
    hidden = problem.hidden.detach().double().requires_grad_(True)
    weight = problem.weight.detach().double().requires_grad_(True)
    logps = (hidden @ weight.t()).log_softmax(-1).gather(-1, problem.labels.unsqueeze(-1)).squeeze(-1)
    loss = pair_loss(logps.sum(-1), setting.beta)
    loss.backward()
    assert truth.loss == pytest.approx(loss.item(), abs=1e-12)
    torch.testing.assert_close(truth.tokens, logps.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(truth.dh, hidden.grad, rtol=0, atol=1e-12)
    if frozen:
        assert truth.dw is None
    else:
        torch.testing.assert_close(truth.dw, weight.grad, rtol=0, atol=1e-12)


def test_errors_see_a_wrong_gradient_and_a_nan() -> None:
    truth = torch.randn(2, 3, 4, dtype=torch.float64)
    assert oracle.relative(truth.float() * 1.01, truth) == pytest.approx(0.01, rel=1e-3)
    assert oracle.relative(truth.float(), truth) < 1e-6
    broken = truth.float()
    broken[0, 0, 0] = float("nan")
    assert oracle.relative(broken, truth) != oracle.relative(broken, truth)
    assert oracle.worst(broken, truth) != oracle.worst(broken, truth)


def test_labels_are_peaked_and_margins_small() -> None:
    setting = Setting(pairs=2, tokens=64, hidden=32, vocab=500)
    problem = inputs.peaked_problem(setting)
    truth = oracle.solve(problem)
    assert truth.tokens.mean().item() > -5.0  # uniform labels would give about log(500) + 16 / 2 nats
    chosen, rejected = truth.tokens.sum(-1).chunk(2)
    assert (chosen - rejected).abs().max().item() < 10.0


@pytest.mark.parametrize("layout", [(0, 0), (0, 16), (5, 0), (5, 16)])
def test_floor_products_are_whole_products(layout: tuple[int, int]) -> None:
    """Ragged tiles included: every layout computes all of each product, from a tile of the same content."""
    problem = inputs.random_problem(SETTING)
    products = floor.Products(problem, dict.fromkeys(floor.KINDS, layout), floor.KINDS)
    for kind in floor.KINDS:
        products.buffers[kind].fill_(1.0)
    products.grad_hidden()
    products.grad_weight()
    torch.testing.assert_close(products.dh, problem.weight.detach().sum(0).expand_as(products.dh))
    torch.testing.assert_close(products.dw, products.hidden.sum(0).expand_as(products.dw))
    products.logits()
    last = problem.weight.detach()[-1]
    cols = SETTING.vocab % products.buffers["logits"].shape[1] or products.buffers["logits"].shape[1]
    rows = SETTING.rows % products.buffers["logits"].shape[0] or products.buffers["logits"].shape[0]
    torch.testing.assert_close(products.buffers["logits"][rows - 1, cols - 1], products.hidden[-1] @ last)


def test_peak_memory_sees_a_temporary() -> None:
    size = 64 << 20

    def allocate() -> None:
        torch.ones(size // 4)

    allocate()
    found = measure.peak_of(allocate, lambda: None)
    assert found.process >= found.before
    if found.method == "reset":
        assert abs(found.extra - size) < (16 << 20)
    assert measure.peak_of(lambda: None, lambda: None).extra < (16 << 20)


def test_peak_is_this_process_and_not_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """getrusage would report the parent's peak in a worker; without /proc it is all there is."""
    assert 0 <= measure.status_bytes("VmHWM") - measure.peak_bytes() < (8 << 20)
    monkeypatch.setattr(measure, "STATUS", Path("/nonexistent/status"))
    monkeypatch.setattr(measure, "CLEAR_REFS", Path("/nonexistent/clear_refs"))
    found = measure.peak_of(lambda: None, lambda: None)
    assert found.method == "lifetime" and found.process > 0


def test_summary_uses_medians_of_rounds() -> None:
    def result(ms: list[float], product: list[float]) -> dict[str, Any]:
        return {"status": "ok", "ms": ms, "product_ms": product, "first_ms": 1.0}

    made = [result([1.0, 2.0, 9.0], [1.0, 1.0, 3.0]), result([4.0, 4.0, 4.0], [2.0, 2.0, 2.0])]
    row = table.summarize(SETTING, "x", "", made)
    assert row["ms"] == 3.0 and row["ge"] == 2.0 and row["samples"] == 6 and row["ms_min"] == 1.0
    died = {"status": "failed", "reason": "killed by SIGKILL"}
    row = table.summarize(SETTING, "x", "", [*made, died])
    assert row["status"] == "ok" and row["rounds"] == 2 and row["reason"] == "killed by SIGKILL"


def test_long_mode_stops_a_variant_at_its_first_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    tried: list[tuple[str, int]] = []

    def pretend(job: Job, timeout: float) -> dict[str, Any]:
        tried.append((job.variant, job.setting.tokens))
        if job.variant == "naive" and job.setting.tokens > 8:
            return {"variant": job.variant, "status": "failed", "reason": "out of memory"}
        extra = job.setting.gradient_bytes + (job.setting.tokens << 20)
        return {
            "variant": job.variant,
            "status": "ok",
            "memory": {"extra": extra, "before": 0, "process": extra, "method": "reset"},
        }

    plot = tmp_path / "plot.png"
    arguments = [*TINY, "--long", "--lengths", "32,8,16", "--variants", "naive,ours-torch", "--plot", str(plot)]
    report = run.main(arguments, pretend)
    assert tried == [("naive", 8), ("naive", 16), ("ours-torch", 8), ("ours-torch", 16), ("ours-torch", 32)]
    assert [point.get("beyond_gradients_mib") for point in report["points"]] == [8.0, None, 8.0, 16.0, 32.0]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "out of memory" in capsys.readouterr().out
    assert long.render(report).count("\n") == 3


def test_long_pair_prints_the_peak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pair.json"
    sizes = ["--tokens", "9", "--hidden", "8", "--vocab", "50", "--json", str(out)]
    assert long_pair.main([*sizes, "--backend", "torch", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "peak RSS of the process" in printed and "counted: 3.000" in printed
    figures = json.loads(out.read_text())["figures"]
    assert figures["peak_bytes"] >= figures["resident_before_bytes"] > 0 and figures["dh_norm"] > 0
    assert long_pair.main([*sizes, "--backend", "torch", "--limit-gib", "0.001"]) == 1
    assert long_pair.main([*sizes, "--backend", "torch", "--limit-products", "2.9"]) == 1
    # a workspace without room for a whole pair, nor for rows that pay: logits twice
    assert long_pair.main([*sizes, "--backend", "torch", "--workspace-mib", "0.002"]) == 0
    assert "counted: 4.000" in capsys.readouterr().out
