"""The benchmark of whole training steps on a tiny model: the trainers see the same batches, and what fails says so."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from one_thread import one_thread  # noqa: F401 (a fixture of every test here)

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.training import __main__ as command
from benchmarks.training import data, rounds, table
from benchmarks.training.phases import PHASES
from benchmarks.training.providers import PROVIDERS
from benchmarks.training.settings import TUNINGS, Job, Shape

TINY = Shape(vocabulary=400, hidden=16, intermediate=16, layers=1, heads=2)
SHAPE = [text for name, value in vars(TINY).items() for text in (f"--{name}", str(value))]
NOWHERE = Path("/nonexistent")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and three steps of two pairs."""
    made = tmp_path_factory.mktemp("training")
    tokenizer = data.build_model(made / "model", NOWHERE, TINY)
    data.write_pairs(made / "tldr", data.make_pairs("tldr", 6, NOWHERE, tokenizer), batch=2)
    return made


def losses_of(provider: str, tuning: str, folder: Path, output: Path, layout: str = "shared") -> list[float]:
    try:
        run = PROVIDERS[provider].load()
    except ImportError as error:
        pytest.skip(str(error))
    # large, so that a step on another batch would show in the next loss
    return run(
        Job(
            provider,
            tuning,
            model=str(folder / "model"),
            pairs=str(folder / "tldr"),
            output=str(output),
            layout=layout if PROVIDERS[provider].lays else "padded",
            steps=2,
            batch=2,
            threads=1,
            learning_rate=1e-2,
        )
    )


@pytest.fixture(scope="module", params=TUNINGS)
def of_trl(request: pytest.FixtureRequest, folder: Path) -> tuple[str, list[float]]:
    return request.param, losses_of("trl", request.param, folder, folder / f"trl-{request.param}")


@pytest.mark.parametrize("provider", [name for name in PROVIDERS if name != "trl"])
def test_losses_are_those_of_trl(provider: str, of_trl: tuple[str, list[float]], folder: Path, tmp_path: Path) -> None:
    tuning, expected = of_trl
    assert len(expected) == 3 and len({round(loss, 4) for loss in expected}) == 3
    assert losses_of(provider, tuning, folder, tmp_path) == pytest.approx(expected, rel=1e-4)


def test_layouts_have_the_same_losses(folder: Path, tmp_path: Path) -> None:
    shared, packed = (losses_of("spo_train", "full", folder, tmp_path / name, name) for name in ("shared", "packed"))
    assert packed == pytest.approx(shared)


def test_generated_lengths_lie_between_the_bounds() -> None:
    tokenizer = data.train_tokenizer(["a few words"], 300)
    for name, (prompt, response) in data.SHAPES.items():
        for pair in data.make_pairs(name, 3, NOWHERE, tokenizer):
            lengths = {key: len(tokenizer(text)["input_ids"]) for key, text in pair.items()}
            assert prompt[0] <= lengths["prompt"] <= prompt[1]
            assert all(response[0] <= lengths[key] <= response[1] for key in ("chosen", "rejected"))
    with pytest.raises(data.NoData, match=r"preferences\.jsonl: 2 pairs are needed, got 0"):
        data.make_pairs("gsm8k", 2, NOWHERE, tokenizer)


def test_report_of_real_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One trainer and its floor, and data that are not there; the picture is made from the file."""
    pytest.importorskip("matplotlib")
    few = ["--steps", "2", "--batch", "1", "--threads", "1", "--tuning", "full", "--gsm8k", str(NOWHERE)]
    out, plot = tmp_path / "report.json", tmp_path / "plot.png"
    asked = ["--providers", "spo_train", "--data", "gsm8k", "tldr"]
    command.main([*SHAPE, *few, *asked, "--json", str(out)])
    absent, row = json.loads(out.read_text())["rows"]
    assert absent["status"] == "skipped" and "pairs are needed" in absent["reason"]
    assert row["status"] == "ok", row["reason"]
    assert row["layout"] == absent["layout"] == "shared"
    # every part of a step takes time, and all of them together the step's
    assert list(row["phases"]) == list(PHASES) and min(row["phases"].values()) > 0
    assert 0.5 * min(row["seconds"]) <= sum(row["phases"].values()) <= 1.01 * max(row["seconds"])
    assert len(row["losses"]) == 3 and len(row["seconds"]) == len(row["tokens"]) == 2
    assert row["above_floor_mib"] == pytest.approx(row["peak_mib"] - row["floor_mib"]) and row["floor_mib"] > 100
    # without TRL in the run there is nothing to divide by
    assert "speed_ratio" not in row
    report = command.main(["--read", str(out), str(out), "--plot", str(plot)])
    assert [each["status"] for each in report["rows"]] == ["skipped", "ok"] * 2
    printed = capsys.readouterr().out
    # in the report and twice in that of two files, each in the table and in that of the parts
    assert printed.count("| tldr | full | spo-train, shared |") == 6 and "machine:" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    out.with_name("other.json").write_text(json.dumps(report | {"setting": "another"}))
    with pytest.raises(ValueError, match="of one setting"):
        command.joined([out, out.with_name("other.json")])


def test_a_process_that_dies_is_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each layout that a trainer has."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    asked = ["--providers", "trl", "spo_train", "--layouts", "packed", "shared", "--data", "gsm8k", "tldr"]
    few = [*SHAPE, "--steps", "1", "--batch", "1", "--tuning", "full", "--gsm8k", str(NOWHERE)]
    rows = command.main([*few, *asked])["rows"]
    trainers = [("trl", "padded"), ("spo_train", "packed"), ("spo_train", "shared")]
    assert [(row["provider"], row["layout"]) for row in rows] == trainers * 2
    assert [row["status"] for row in rows] == ["skipped"] * 3 + ["failed"] * 3
    assert "trl ended with 1 at start" in rows[3]["reason"] and rows[3]["reason"] in table.render(rows)


def test_ratios_are_medians_over_the_same_batches(tmp_path: Path) -> None:
    def runner(name: str, seconds: list[float], peak: int, losses: list[float]) -> Any:
        made = object.__new__(rounds.Runner)
        made.job = Job(name, "full", "", "", "", steps=3)
        made.status = made.reason = None
        phases = dict.fromkeys(PHASES, 0.1)
        made.steps = [{"seconds": each, "phases": phases, "peak": peak << 20, "method": "reset"} for each in seconds]
        made.losses = losses
        return made

    floors = {("trl", "full"): 100 << 20, ("spo_train", "full"): 50 << 20}
    trl = runner("trl", [2.0, 8.0, 3.0], 300, [0.7, 0.6, 0.5, 0.4])
    ours = runner("spo_train", [1.0, 2.0, 3.0], 100, [0.7, 0.6, 0.51, 0.4])
    base, row = rounds.rows_of("tldr", [trl, ours], [9, 100, 200, 300], floors)
    assert base["speed_ratio"] == base["memory_ratio"] == 1 and base["tokens_per_second"] == 50
    assert row["speed_ratio"] == 2 and row["memory_ratio"] == 0.25 and row["tokens_per_second"] == 100
    assert row["loss_difference"] == pytest.approx(0.01)
