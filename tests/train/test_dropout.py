"""Dropout is off unless --dropout keeps it: policy and reference are equal before the first step."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from spo_kernels.train.dropout import saved_configuration, switch_off

from .conftest import Train, read_metrics

FROZEN = ("--max-steps", 3, "--learning-rate", 0, "--logging-steps", 1, "--save-steps", 0, "--loss", "dpo")

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
# Where dropout is, in each: modules, numbers in modules, numbers in the configuration, skipped layers, noise.
MODELS = {
    "gpt2": (tf.GPT2Config, {**GPT2, "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
    "llama": (tf.LlamaConfig, {**SMALL, "attention_dropout": 0.5}),
    "gpt_neox": (tf.GPTNeoXConfig, {**SMALL, "attention_dropout": 0.5, "hidden_dropout": 0.5}),
    "opt": (
        tf.OPTConfig,
        {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    ),
    "bloom": (
        tf.BloomConfig,
        {
            "vocab_size": 97,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "hidden_dropout": 0.5,
            "attention_dropout": 0.5,
        },
    ),
    "phi": (tf.PhiConfig, {**SMALL, "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5}),
    "mixtral": (
        tf.MixtralConfig,
        {**SMALL, "num_key_value_heads": 2, "attention_dropout": 0.5, "router_jitter_noise": 0.5},
    ),
    "mpt": (
        tf.MptConfig,
        {"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4, "attn_config": {"attn_pdrop": 1}},
    ),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_every_form_is_switched_off(name: str, attention: str) -> None:
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    try:
        model = tf.AutoModelForCausalLM.from_config(kind(**settings), attn_implementation=attention)
    except ValueError:
        pytest.skip(f"{name} has no {attention} attention")
    before = model.config.to_json_string()
    rows = torch.randint(3, 97, (2, 20))
    expected = model.eval()(input_ids=rows).logits
    model.train()
    assert not torch.allclose(model(input_ids=rows).logits, expected, atol=1e-3)
    switch_off(model)
    for _ in range(3):
        torch.testing.assert_close(model(input_ids=rows).logits, expected)
    with saved_configuration(model):
        assert model.config.to_json_string() == before
    torch.testing.assert_close(model(input_ids=rows).logits, expected)


@pytest.fixture
def gpt2(tmp_path: Path, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    config = tf.GPT2Config(
        **{**GPT2, "vocab_size": len(tokenizer)}, bos_token_id=1, eos_token_id=2, initializer_range=0.2
    )
    assert config.resid_pdrop == config.attn_pdrop == 0.1
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize(
    "options",
    [(), ("--reference", "online"), ("--gradient-checkpointing",), ("--bf16",), ("--lora-r", 4)],
    ids=["precompute", "online", "checkpointing", "bf16", "lora"],
)
def test_losses_before_training_are_log_2(train: Train, tmp_path: Path, gpt2: Path, options: tuple[Any, ...]) -> None:
    """GPT-2 with its own dropout of 0.1 and learning rate 0."""
    assert train(*FROZEN, *options, model=gpt2) == 0
    losses = [r["loss"] for r in read_metrics(tmp_path / "out", "train")]
    assert losses == pytest.approx([math.log(2)] * 3, abs=2e-2 if "--bf16" in options else 1e-4)


def test_dropout_is_kept_where_it_is_asked_for(train: Train, tmp_path: Path, gpt2: Path) -> None:
    assert train(*FROZEN, "--dropout", model=gpt2) == 0
    assert any(abs(r["loss"] - math.log(2)) > 0.01 for r in read_metrics(tmp_path / "out", "train"))


def test_lora_dropout_is_its_own_option(train: Train, tmp_path: Path, gpt2: Path) -> None:
    options = ("--max-steps", 3, "--learning-rate", 0.1, "--batch-size", 4, "--save-steps", 0, "--lora-r", 4)
    runs = [("plain", ()), ("dropout", ("--lora-dropout", 0.5))]
    for name, extra in runs:
        assert train(*options, *extra, model=gpt2, output_dir=tmp_path / name) == 0
    plain, dropped = (read_metrics(tmp_path / name, "train")[-1]["grad_norm"] for name, _ in runs)
    assert plain != dropped


def test_saved_configuration_is_the_models_own(train: Train, tmp_path: Path, gpt2: Path) -> None:
    assert train(*FROZEN, model=gpt2) == 0
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["resid_pdrop"] == saved["attn_pdrop"] == saved["embd_pdrop"] == 0.1
