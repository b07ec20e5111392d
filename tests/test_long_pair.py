"""`examples/long_pair.py`: the search for the longest pair, and one that a limit of memory decides."""

from typing import Any

import pytest

pytest.importorskip("transformers")

from examples import long_pair

TINY = ["--vocabulary", "128", "--hidden", "16", "--layers", "1"]


def test_the_search_closes_in_on_the_longest() -> None:
    def run(length: int) -> dict[str, Any]:
        fits = {"seconds": 2.0, "peak_gib": 0.5} if length <= 3000 else {"reason": "out of memory"}
        return {"trainer": "ours", "length": length, **fits}

    rows = long_pair.search(run, 512, 65536, halvings=3)
    assert [row["length"] for row in rows] == [512, 1024, 2048, 2560, 2816, 3072, 4096]
    assert [row["length"] for row in long_pair.search(run, 512, 1500, halvings=3)] == [512, 1024, 1500]
    assert len(long_pair.search(run, 4096, 65536, halvings=3)) == 1
    text = long_pair.table(rows)
    assert "| ours | 2816 | 0.50 | 2.0 | 2816 |" in text and "| ours | 4096 | does not fit: out of memory |" in text


SIZES = [*TINY, "--shortest", "64", "--longest", "64"]


@pytest.mark.parametrize("trainer", long_pair.TRAINERS)
def test_a_trainer_takes_a_step(trainer: str) -> None:
    if trainer == "trl":
        pytest.importorskip("trl")
    (row,) = long_pair.main([*SIZES, "--trainers", trainer, "--memory-gib", "8"])
    assert "reason" not in row and row["seconds"] > 0 and 0.1 < row["peak_gib"] < 8, row


def test_a_limit_decides(capsys: pytest.CaptureFixture[str]) -> None:
    """A process watches its own memory from before its trainer's first line: one trainer stands for all."""
    (row,) = long_pair.main([*SIZES, "--trainers", "ours", "--memory-gib", "0.02"])
    assert row["length"] == 64 and row["reason"] == "took more than 0.02 GiB", row
    assert "ours: 0 tokens" in capsys.readouterr().err
