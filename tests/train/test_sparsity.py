"""`--sparsity`: what is left out is logged, resumed runs make the same choice, flags are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

from spo_kernels.engine import sparse

from .conftest import Fails, Train, assert_same_weights, read_metrics, read_weights

OPTIONS = ("--max-steps", 4, "--batch-size", 2, "--learning-rate", 1e-2, "--logging-steps", 1, "--save-steps", 2)
CERTIFIED = ("--sparsity", "certified", "--sparsity-tolerance", 0.25)
UNBIASED = ("--sparsity", "unbiased", "--sparsity-tolerance", 0.25)


@pytest.fixture
def peaked_model(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight blocks of vocabulary and large logits; sparse whether that pays or not."""
    monkeypatch.setattr(sparse, "_WORTH", 1.0)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    folder = tmp_path / "peaked"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [CERTIFIED, UNBIASED], ids=["certified", "unbiased"])
@pytest.mark.parametrize("stage", ["preference", "sft"])
def test_what_is_left_out_is_logged(
    train: Train, tmp_path: Path, peaked_model: Path, sft_file: Path, pairs_file: Path, stage: str, options: Any
) -> None:
    data = sft_file if stage == "sft" else pairs_file
    common = {"model": peaked_model, "dataset": data}
    assert train(*OPTIONS, "--stage", stage, output_dir=tmp_path / "exact", **common) == 0
    assert train(*OPTIONS, "--stage", stage, *options, output_dir=tmp_path / "sparse", **common) == 0
    exact, sparse = (read_metrics(tmp_path / name, "train") for name in ("exact", "sparse"))
    # the first step's loss is computed before any gradient is used
    assert sparse[0]["loss"] == exact[0]["loss"]
    for record in sparse:
        assert 0 < record["sparsity/kept"] < 1
        assert 0 < record["sparsity/dropped_mass_mean"] < 1
        if stage == "preference" and options is CERTIFIED:
            assert record["sparsity/dropped_mass_max"] <= 0.25
    assert "sparsity/kept" not in exact[0]
    first, second = (read_weights(tmp_path / name) for name in ("exact", "sparse"))
    assert any((first[name] != second[name]).any() for name in first)


def test_a_resumed_run_draws_the_same(train: Train, tmp_path: Path, peaked_model: Path) -> None:
    assert train(*OPTIONS, *UNBIASED, model=peaked_model, output_dir=tmp_path / "whole") == 0
    assert train(*OPTIONS, *UNBIASED, model=peaked_model, output_dir=tmp_path / "half") == 0
    half = tmp_path / "half"
    (half / "model.safetensors").unlink()
    for path in sorted((half / "checkpoint-4").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (half / "checkpoint-4").rmdir()
    assert train(*OPTIONS, *UNBIASED, "--resume", model=peaked_model, output_dir=half) == 0
    assert_same_weights(half, tmp_path / "whole")


def test_flags_are_checked(fails: Fails) -> None:
    assert "--sparsity-tolerance needs --sparsity" in fails("--sparsity-tolerance", 0.1)
    assert "--sparsity-tolerance must be between 0 and 1" in fails(*CERTIFIED[:3], 1.5)
