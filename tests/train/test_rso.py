"""`spo-rso`: from scored candidates to pairs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from spo_kernels.commands.rso import main
from spo_kernels.data import preference_sample, read_records

from .conftest import Train, write_jsonl


def record(i: int, candidates: int = 16) -> dict[str, Any]:
    texts = [{"text": f"answer {i} {k}", "reward": ((7 * k + i) % candidates) / 4} for k in range(candidates)]
    return {"prompt": f"question {i}\n", "candidates": texts}


def rewards(row: dict[str, Any]) -> dict[str, float]:
    return {c["text"]: c["reward"] for c in row["candidates"]}


def run(tmp_path: Path, rows: list[Any], *options: Any, name: str = "pairs.jsonl") -> list[dict[str, Any]]:
    source = write_jsonl(tmp_path / "candidates.jsonl", rows)
    output = tmp_path / name
    assert main(["--candidates", str(source), "--output", str(output), *map(str, options)]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize("samples", [2, 7, 8])
def test_first_round_pairs(tmp_path: Path, samples: int, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [record(i) for i in range(5)]
    pairs = run(tmp_path, rows, "--num-samples", samples)
    assert len(pairs) == 5 * (samples // 2)
    for i, row in enumerate(rows):
        own = [p for p in pairs if p["prompt"] == row["prompt"]]
        texts = [p[side] for p in own for side in ("chosen", "rejected")]
        assert len(own) == samples // 2 and len(set(texts)) == len(texts), i
        for pair in own:
            better, worse = (rewards(row)[pair[side]] for side in ("chosen", "rejected"))
            assert better > worse
            assert (pair["chosen_reward"], pair["rejected_reward"]) == (better, worse)
            assert pair["score_margin"] == better - worse
    assert f"{len(pairs)} pairs of 5 prompts; 0 left out" in capsys.readouterr().err


def test_beta_0_takes_the_best(tmp_path: Path) -> None:
    rows = [record(i) for i in range(4)]
    pairs = run(tmp_path, rows, "--beta", 0, "--num-samples", 4)
    for row in rows:
        best = sorted(rewards(row), key=rewards(row).__getitem__)[-4:]
        used = {p[side] for p in pairs if p["prompt"] == row["prompt"] for side in ("chosen", "rejected")}
        assert used == set(best)
    (pair,) = run(tmp_path, rows[:1], "--beta", 0, "--num-samples", 4, "--pairing", "best-worst", name="b.jsonl")
    best = sorted(rewards(rows[0]), key=rewards(rows[0]).__getitem__)[-4:]
    assert (pair["chosen"], pair["rejected"]) == (best[-1], best[0])


def test_beta_decides_how_good_the_accepted_are(tmp_path: Path) -> None:
    rows = [record(i) for i in range(60)]

    def mean(beta: float) -> float:
        pairs = run(tmp_path, rows, "--beta", beta, "--num-samples", 4, name=f"{beta}.jsonl")
        return sum(p["chosen_reward"] + p["rejected_reward"] for p in pairs) / (2 * len(pairs))

    best, usual, uniform = mean(0), mean(0.5), mean(math.inf)
    assert best > usual + 0.1 and usual > uniform + 0.1
    # uniform: the mean of all rewards, here 0, 1/4, ..., 15/4; four standard errors of the mean of 240 of 16
    assert uniform == pytest.approx(7.5 / 4, abs=4 * 1.15 / math.sqrt(240))


def test_a_record_does_not_depend_on_the_others(tmp_path: Path) -> None:
    """The seed and the record's place decide: the same prefix gives the same pairs, another seed does not."""
    rows = [record(i) for i in range(6)]
    all_pairs = run(tmp_path, rows, name="all.jsonl")
    again = run(tmp_path, rows[:3], name="prefix.jsonl")
    assert again == all_pairs[: len(again)]
    assert run(tmp_path, rows, "--seed", 1, name="other.jsonl") != all_pairs


def test_pairs_without_a_preference_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same_reward = {"prompt": "x\n", "candidates": [{"text": f"t{k}", "reward": 1} for k in range(8)]}
    same_text = {"prompt": "y\n", "candidates": [{"text": "t", "reward": k} for k in range(8)]}
    assert run(tmp_path, [same_reward, same_text]) == []
    assert "0 pairs of 2 prompts; 8 left out" in capsys.readouterr().err


def test_pairs_are_training_data(train: Train, tmp_path: Path) -> None:
    """Chat prompts too; ODPO's offset from the score margin."""
    chat = {**record(2), "prompt": [{"role": "user", "content": "hello"}]}
    pairs = run(tmp_path, [record(0), chat])
    assert pairs[-1]["chosen"][0]["role"] == "assistant"
    for where, row in read_records(str(tmp_path / "pairs.jsonl")):
        preference_sample(where, row, {"offset": "score_margin"})
    options = ("--loss", "odpo", "--pair-input", "offset=score_margin", "--max-steps", 2, "--batch-size", 4)
    assert train(*options, dataset=tmp_path / "pairs.jsonl") == 0


BAD: dict[str, tuple[Any, str]] = {
    "no prompt": ({"candidates": []}, "no column 'prompt'"),
    "no candidates": ({"prompt": "x"}, "candidates must be a list of objects with text and reward"),
    "too few": (record(0, 3), "3 candidates, fewer than --num-samples 8"),
    "not an object": ({"prompt": "x", "candidates": ["a"] * 8}, "candidates[0] must be an object with text and reward"),
    "no text": ({"prompt": "x", "candidates": [{"reward": 1}] * 8}, "candidates[0]: no column 'text'"),
    "no reward": ({"prompt": "x", "candidates": [{"text": "a"}] * 8}, "candidates[0]: reward must be a finite number"),
    "nan": (
        '{"prompt": "x", "candidates": [' + ", ".join(['{"text": "a", "reward": NaN}'] * 8) + "]}",
        "candidates[0]: reward must be a finite number, got float 'nan'",
    ),
    "messages": (
        {"prompt": "x", "candidates": [{"text": [{"role": "user", "content": "a"}], "reward": 1}] * 8},
        "candidates[0]: text is messages, but the prompt is a string",
    ),
    "range": (
        {"prompt": "x", "candidates": [{"text": f"{k}", "reward": 1.7e308 * (-1) ** k} for k in range(8)]},
        "their difference is no finite number",
    ),
    "cut": ('{"prompt": "x", "candid', "not valid JSON, or cut off"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_record_names_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    row, message = BAD[name]
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(record(0)) + "\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    assert main(["--candidates", str(path), "--output", str(tmp_path / "out.jsonl")]) == 2
    error = capsys.readouterr().err
    assert f"{path}:2: " in error and message in error and "Traceback" not in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl"]


OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "samples": (("--num-samples", 1), "--num-samples must be at least 2, got 1"),
    "beta": (("--beta", -1), "--beta must be at least 0, got -1.0"),
    "beta nan": (("--beta", "nan"), "--beta must be at least 0, got nan"),
    "seed": (("--seed", -1), "--seed must be at least 0, got -1"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_option(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    options, message = OPTIONS[name]
    path = write_jsonl(tmp_path / "c.jsonl", [record(0)])
    assert main(["--candidates", str(path), "--output", str(tmp_path / "o"), *map(str, options)]) == 2
    assert message in capsys.readouterr().err


def test_output_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [record(0)])
    assert main(["--candidates", str(path), "--output", str(path)]) == 2
    assert "exists already and is not overwritten" in capsys.readouterr().err
    assert main(["--candidates", str(path), "--output", str(tmp_path / "none" / "o.jsonl")]) == 2
    assert "can't be written" in capsys.readouterr().err
