"""Rows of every supported form become the same samples; a hold-out never splits a prompt."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from spo_kernels.train.errors import TrainError
from spo_kernels.train.records import read_rows
from spo_kernels.train.samples import Sample, count_same, preference_sample, sft_sample, split_by_prompt

USER = {"role": "user", "content": "say cat"}
YES, NO = {"role": "assistant", "content": "cat"}, {"role": "assistant", "content": "no"}


def rows_of(path: Path, split: str = "train") -> list[dict[str, Any]]:
    return [row for _, row in read_rows(str(path), split)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_file_types_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": f"p{i} é", "chosen": "a", "rejected": "b"} for i in range(5)]
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert rows_of(path) == rows


def test_json_lines_in_a_json_file_with_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}\n{"a": 2}\n')
    assert [where for where, _ in read_rows(str(path), "train")] == [f"{path}:1", f"{path}:2"]


def test_folder_goes_through_load_dataset(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "train-00000.parquet"))
    assert list(read_rows(str(tmp_path), "train")) == [(f"{tmp_path}[train]: record 1", rows[0])]


def test_chat_rows_from_parquet(tmp_path: Path) -> None:
    row = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
    path = tmp_path / "chat.parquet"
    datasets.Dataset.from_list([row]).to_parquet(str(path))
    assert preference_sample("x", rows_of(path)[0]) == Sample("x", [USER], ([YES], [NO]))


@pytest.mark.parametrize(
    ("row", "prompt", "responses"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "p", ("a", "b")),
        ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, [USER], ([YES], [NO])),
        ({"chosen": [USER, YES], "rejected": [USER, NO]}, [USER], ([YES], [NO])),
        ({"prompt": "say cat", "chosen": [USER, YES], "rejected": [USER, NO]}, [USER], ([YES], [NO])),
        ({"prompt": None, "chosen": "Q: x\nA", "rejected": "Q: x\nB"}, "Q: x\n", ("A", "B")),
        ({"chosen": "2+2 = 14", "rejected": "2+2 = 15"}, "2+2 =", (" 14", " 15")),
        ({"chosen": "say cat", "rejected": "say dog"}, "say", (" cat", " dog")),
        ({"chosen": "say cat", "rejected": "say cat cat"}, "say", (" cat", " cat cat")),
    ],
    ids=["strings", "chat", "implicit chat", "prompt twice", "line break", "whole words", "space", "prefix"],
)
def test_preference_forms(row: dict[str, Any], prompt: Any, responses: Any) -> None:
    assert preference_sample("x", row) == Sample("x", prompt, responses)


def test_sft_forms() -> None:
    assert sft_sample("x", {"prompt": "p", "completion": "c"}) == Sample("x", "p", ("c",))
    assert sft_sample("x", {"prompt": [USER], "completion": [YES]}) == Sample("x", [USER], ([YES],))
    assert sft_sample("x", {"messages": [USER, NO, USER, YES]}) == Sample("x", [USER, NO, USER], ([YES],))


def test_hold_out_keeps_a_prompts_records_together() -> None:
    samples = [Sample(str(i), f"prompt {i % 40}", ("a", "b")) for i in range(200)]
    train, held_out = split_by_prompt(samples, 0.25, seed=3)
    assert len(train) == 150 and len(held_out) == 50
    assert not {s.prompt for s in train} & {s.prompt for s in held_out}
    assert split_by_prompt(samples, 0.25, seed=3) == (train, held_out)
    assert split_by_prompt(samples, 0.25, seed=4) != (train, held_out)


def test_hold_out_of_nothing_is_an_error() -> None:
    with pytest.raises(TrainError, match=r"0\.1 of 2 different prompts leaves 2 records to train on and 0"):
        split_by_prompt([Sample("x", p, ("a", "b")) for p in "pq"], 0.1, seed=0)


def test_equal_responses_are_counted() -> None:
    assert count_same([Sample("x", "p", ("a", "a")), Sample("x", "p", ("a", "b")), Sample("x", "p", ("a",))]) == 1
