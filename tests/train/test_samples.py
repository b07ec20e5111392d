"""Rows of every supported form become the same samples; a hold-out never splits a prompt."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from spo_kernels.data import DataError, Sample, preference_sample, read_records, sft_sample
from spo_kernels.data.examples import held_out_prompts

from .test_encode import encode_rows

USER = {"role": "user", "content": "say cat"}
YES, NO = {"role": "assistant", "content": "cat"}, {"role": "assistant", "content": "no"}


def rows_of(path: Path, split: str = "train") -> list[dict[str, Any]]:
    return [row for _, row in read_records(str(path), split)]


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
    assert [where for where, _ in read_records(str(path))] == [f"{path}:1", f"{path}:2"]


def test_folder_goes_through_load_dataset(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "train-00000.parquet"))
    assert list(read_records(str(tmp_path))) == [(f"{tmp_path}[train]: record 1", rows[0])]


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
        ({"prompt": [USER], "chosen": [USER, YES], "rejected": [NO]}, [USER], ([YES], [NO])),
        ({"prompt": [USER, NO], "chosen": [NO, USER, YES], "rejected": [NO]}, [USER, NO], ([NO, USER, YES], [NO])),
        ({"prompt": "say cat", "chosen": [USER, YES], "rejected": [USER, NO]}, [USER], ([YES], [NO])),
        ({"prompt": None, "chosen": "Q: x\nA", "rejected": "Q: x\nB"}, "Q: x\n", ("A", "B")),
        ({"chosen": "2+2 = 14", "rejected": "2+2 = 15"}, "2+2 =", (" 14", " 15")),
        ({"chosen": "say cat", "rejected": "say dog"}, "say", (" cat", " dog")),
        ({"chosen": "say cat", "rejected": "say cat cat"}, "say", (" cat", " cat cat")),
    ],
    ids=[
        "strings",
        "chat",
        "implicit chat",
        "one says the prompt",
        "one says a reply",
        "prompt twice",
        "line break",
        "whole words",
        "space",
        "prefix",
    ],
)
def test_preference_forms(row: dict[str, Any], prompt: Any, responses: Any) -> None:
    assert preference_sample("x", row) == Sample("x", prompt, responses)


def test_sft_forms() -> None:
    assert sft_sample("x", {"prompt": "p", "completion": "c"}) == Sample("x", "p", ("c",))
    assert sft_sample("x", {"prompt": [USER], "completion": [YES]}) == Sample("x", [USER], ([YES],))
    assert sft_sample("x", {"messages": [USER, NO, USER, YES]}) == Sample("x", [USER, NO, USER], ([YES],))


def test_hold_out_keeps_a_prompts_records_together() -> None:
    keys = [f"prompt {i % 40}" for i in range(200)]
    out = held_out_prompts(keys, 0.25, seed=3)
    assert out.sum() == 50
    held_out = {key for key, chosen in zip(keys, out, strict=True) if chosen}
    assert not held_out & {key for key, chosen in zip(keys, out, strict=True) if not chosen}
    assert (held_out_prompts(keys, 0.25, seed=3) == out).all()
    assert (held_out_prompts(keys, 0.25, seed=4) != out).any()


def test_hold_out_of_nothing_is_an_error(tokenizer: Any) -> None:
    rows = [{"prompt": p, "chosen": "cat", "rejected": "no"} for p in ("say\n", "do\n")]
    with pytest.raises(DataError, match=r"0\.1 of 2 different prompts leaves 2 records to train on and 0"):
        encode_rows(rows, tokenizer).hold_out(0.1, seed=0)
