"""`benchmarks.compare`: a commit against itself, and what it says where the sides differ."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.compare import __main__ as program
from benchmarks.compare.cases import all_cases
from benchmarks.compare.differences import difference, worst_difference
from benchmarks.compare.trees import NoCommit, export
from benchmarks.compare.turns import take_turns

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--pairs", "1", "--tokens", "4", "--hidden", "16", "--vocab", "256", "--threads", "1", "--rounds", "1"]


@pytest.fixture
def history() -> None:
    try:
        subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there is no git history to take commits from")


@pytest.mark.usefixtures("history")
def test_a_commit_equals_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every case in real processes, each with its own tree; the torch backend needs no build."""
    monkeypatch.setattr(program, "SMALL_REPEATS", 3)
    out = tmp_path / "report.json"
    options = ["--backend", "torch", "--repeats", "1", "--folder", str(tmp_path), "--json", str(out)]
    assert program.main(["HEAD", "HEAD", *TINY, *options]) == 0
    report = json.loads(out.read_text())
    assert [row["case"] for row in report["rows"]] == [case.name for case in all_cases()]
    for row in report["rows"]:
        assert row["same"] and row["difference"] == 0 and row["ratio"] > 0 and len(row["ratios"]) == 1
    assert report["commits"]["old"] == report["commits"]["new"]
    assert {path.name[:4] for path in tmp_path.iterdir() if path.is_dir()} == {"old-", "new-"}
    printed = capsys.readouterr().out
    for text in ("machine:", "new/old", "loss factorised, bfloat16", "full logits"):
        assert text in printed


@pytest.mark.usefixtures("history")
def test_an_unknown_commit_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NoCommit, match="NEW = 'no-such-branch'"):
        export("no-such-branch", "new", tmp_path)
    assert program.main(["no-such-branch", "HEAD", *TINY]) == 2
    assert "OLD = 'no-such-branch' is no commit" in capsys.readouterr().err


def test_an_unknown_case_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["HEAD", "HEAD", "--cases", "nonsense"])
    assert "logprob frozen, float32" in capsys.readouterr().err


def test_sides_take_turns() -> None:
    asked: list[str] = []

    class Pretended:
        def __init__(self, name: str, ms: float) -> None:
            self.name, self.ms = name, ms

        def ask(self, do: str, **request: Any) -> dict[str, float]:
            asked.append(self.name)
            return {"ms": self.ms, "eager_ms": 1.0}

    timing = take_turns({"old": Pretended("old", 2.0), "new": Pretended("new", 3.0)}, 2, 1)  # type: ignore[dict-item]
    assert asked == ["old", "new", "new", "old", "new", "old", "old", "new"]
    assert timing.ratios == [1.5, 1.5] and timing.ratio == 1.5
    assert (timing.old_ms, timing.new_ms, timing.eager_ms) == (2.0, 3.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_passes_and_more_does_not(dtype: torch.dtype) -> None:
    old = torch.linspace(-1, 1, 101).to(dtype)
    eps = torch.finfo(dtype).eps
    assert difference("x", old, old).relative == 0
    assert difference("x", old, old * (1 + eps)).within
    assert not difference("x", old, old * (1 + 64 * eps)).within
    spoiled = old.clone()
    spoiled[3] = torch.nan
    assert not difference("x", old, spoiled).within


def test_the_worst_tensor_is_named(tmp_path: Path) -> None:
    tensors = {"value": torch.ones(2), "hidden.grad": torch.ones(3)}
    torch.save(tensors, tmp_path / "old.pt")
    torch.save(tensors | {"hidden.grad": torch.tensor([1.0, 1.0, 1.5])}, tmp_path / "new.pt")
    found = worst_difference(tmp_path / "old.pt", tmp_path / "new.pt")
    assert (found.tensor, found.relative, found.within) == ("hidden.grad", 0.5, False)
    torch.save({"value": torch.ones(2)}, tmp_path / "new.pt")
    with pytest.raises(ValueError, match="returned different things"):
        worst_difference(tmp_path / "old.pt", tmp_path / "new.pt")
