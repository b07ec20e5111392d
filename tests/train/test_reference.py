"""The cache of reference log-probs: hit, miss, damage."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spo_kernels.data import Example
from spo_kernels.train.content import data_hash, model_hash
from spo_kernels.train.logps_file import cache_key
from spo_kernels.train.reference import Reference

from .conftest import Train, assert_same_weights
from .test_encode import encode_rows
from .test_model import build
from .test_training import run


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of examples in each real computation."""
    calls: list[int] = []
    original = Reference._score

    def counting(self: Reference, examples: Any, *args: Any) -> torch.Tensor:
        calls.append(len(examples))
        return original(self, examples, *args)

    monkeypatch.setattr(Reference, "_score", counting)
    return calls


def test_second_run_reads_the_cache(train: Train, tmp_path: Path, scored: list[int]) -> None:
    cache = ("--cache-dir", tmp_path / "cache", "--eval-fraction", 0.25)
    first = run(train, tmp_path / "first", *cache)
    assert len(scored) == 2 and sum(scored) == 48
    second = run(train, tmp_path / "second", *cache)
    assert len(scored) == 2
    assert_same_weights(first, second)


@pytest.mark.parametrize(
    "change",
    [("--max-length", 8), ("--bf16",), ("--ref-model", "other"), ("--backend", "torch")],
    ids=["data", "precision", "model", "backend"],
)
def test_what_the_numbers_depend_on_misses_the_cache(
    train: Train, tmp_path: Path, scored: list[int], change: tuple[Any, ...]
) -> None:
    cache = ("--cache-dir", tmp_path / "cache")
    first = run(train, tmp_path / "other", *cache)
    change = tuple(first if c == "other" else c for c in change)
    run(train, tmp_path / "second", *cache, *change)
    assert scored == [48, 48]


def test_what_they_do_not_depend_on_hits(train: Train, tmp_path: Path, scored: list[int]) -> None:
    cache = ("--cache-dir", tmp_path / "cache")
    run(train, tmp_path / "first", *cache)
    run(train, tmp_path / "second", *cache, "--beta", 0.5, "--learning-rate", 1e-4, "--seed", 3, "--lora-r", 2)
    assert scored == [48]


@pytest.mark.parametrize("damage", ["cut", "flipped", "text"])
def test_damaged_cache_is_reported_and_computed_again(
    train: Train, tmp_path: Path, scored: list[int], damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ("--cache-dir", tmp_path / "cache")
    first = run(train, tmp_path / "first", *cache)
    (path,) = (tmp_path / "cache").iterdir()
    good, whole = load_file(path)["logps"].clone(), path.read_bytes()
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    path.write_bytes({"cut": whole[:-10], "flipped": flipped, "text": b"not safetensors"}[damage])
    second = run(train, tmp_path / "second", *cache)
    assert f"{path}: damaged cache of reference log-probs" in capsys.readouterr().err
    assert scored == [48, 48]
    assert torch.equal(load_file(path)["logps"], good)
    assert_same_weights(first, second)


def test_keys_see_every_part() -> None:
    assert cache_key(model="a", data="b") != cache_key(model="b", data="a")
    one, other = build("llama"), build("llama")
    assert model_hash(one) == model_hash(other)
    other.config.rope_theta = 5.0
    assert model_hash(one) != model_hash(other)
    other = build("llama")
    with torch.no_grad():
        other.model.norm.weight[3] += 1e-6
    assert model_hash(one) != model_hash(other)


def test_data_hash_sees_boundaries(tokenizer: Any) -> None:
    texts = [("abc", "d"), ("ab", "cd")]
    parts = [encode_rows([{"prompt": p, "completion": r}], tokenizer, stage="sft") for p, r in texts]
    assert data_hash(parts[0]) != data_hash(parts[1])


def test_data_hash_sees_what_is_scored(tokenizer: Any) -> None:
    ids = torch.arange(4).numpy()
    examples = [Example(ids, (ids,)), Example(ids, (ids,), scored=(((1, 4),),))]
    assert data_hash(examples[:1]) != data_hash(examples[1:])
