"""The auxiliary loss of mixtures of experts, as the model's configuration says."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from spo_kernels.integrations.hidden import forward_without_logits
from spo_kernels.train.errors import TrainError
from spo_kernels.train.experts import router_loss

from .conftest import Fails, Train, read_metrics, read_weights

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "mixtral": (tf.MixtralConfig, {"num_local_experts": 4}),
    "qwen3_moe": (tf.Qwen3MoeConfig, {"num_experts": 4}),
    "olmoe": (tf.OlmoeConfig, {"num_experts": 4}),
    "gpt_oss": (tf.GptOssConfig, {"num_local_experts": 4}),
    "granitemoe": (tf.GraniteMoeConfig, {"num_local_experts": 4}),
}


def build(name: str, vocabulary: int = 97, **settings: Any) -> Any:
    kind, own = KINDS[name]
    torch.manual_seed(0)
    config = kind(**{**SMALL, **own, "vocab_size": vocabulary, "output_router_logits": True, **settings})
    return tf.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", KINDS)
def test_value_and_gradient_are_the_models_own(name: str, checkpointing: bool) -> None:
    model = build(name, router_aux_loss_coef=0.5)
    found = router_loss(model)
    assert found is not None
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.randint(3, 97, (2, 20))
    labels = ids.clone()
    labels[:, :5], labels[1, 13:] = -100, -100
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    ours = found.coefficient * found(forward_without_logits(model, input_ids=ids)[1].router_logits, labels)
    parameters = dict(model.named_parameters())
    ours_grads = torch.autograd.grad(ours, list(parameters.values()), allow_unused=True)
    theirs = 0.5 * model(input_ids=ids, attention_mask=mask, use_cache=False).aux_loss
    theirs_grads = torch.autograd.grad(theirs, list(parameters.values()), allow_unused=True)
    torch.testing.assert_close(ours, theirs)
    for (n, p), a, b in zip(parameters.items(), ours_grads, theirs_grads, strict=True):
        zero = torch.zeros_like(p)
        torch.testing.assert_close(
            zero if a is None else a, zero if b is None else b, rtol=1e-3, atol=1e-5, msg=lambda m, n=n: f"{n}: {m}"
        )
    assert any(
        "router" in n or "gate" in n for (n, _), a in zip(parameters.items(), ours_grads, strict=True) if a is not None
    )


def mixtral(folder: Path, tokenizer: Any, **settings: Any) -> Path:
    build("mixtral", len(tokenizer), **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


RUN = ("--max-steps", 3, "--learning-rate", 1e-2, "--batch-size", 4, "--logging-steps", 1, "--save-steps", 0)


@pytest.mark.parametrize("stage", ["preference", "sft"])
def test_coefficient_changes_the_weights(
    train: Train, tmp_path: Path, tokenizer: Any, stage: str, sft_file: Path, pairs_file: Path
) -> None:
    data = {"dataset": sft_file if stage == "sft" else pairs_file}
    weights = {}
    for coefficient in (0.0, 100.0):
        model = mixtral(tmp_path / f"model-{coefficient}", tokenizer, router_aux_loss_coef=coefficient)
        output = tmp_path / f"out-{coefficient}"
        assert train(*RUN, "--stage", stage, model=model, output_dir=output, **data) == 0
        weights[coefficient] = read_weights(output)
        (first, *_) = read_metrics(output, "train")
        if coefficient:
            assert first["router_loss"] >= 100 and first["loss"] > first["router_loss"]
        else:
            assert "router_loss" not in first
    assert any(not torch.equal(w, weights[100.0][n]) for n, w in weights[0.0].items() if "gate" in n)


def test_configuration_that_does_not_ask_is_left_alone(train: Train, tmp_path: Path, tokenizer: Any) -> None:
    quiet = mixtral(tmp_path / "quiet", tokenizer, router_aux_loss_coef=100.0, output_router_logits=False)
    assert train(*RUN, model=quiet) == 0
    assert "router_loss" not in read_metrics(tmp_path / "out", "train")[0]


def test_first_loss_is_the_objectives_and_the_mean_auxiliary_loss(train: Train, tmp_path: Path, tokenizer: Any) -> None:
    """Of one forward, and of two that are accumulated: their mean. Weights then differ, as routing does by batch."""
    model = mixtral(tmp_path / "model", tokenizer, router_aux_loss_coef=0.25)
    for name, options in (("one", ("--batch-size", 8)), ("two", ("--batch-size", 4, "--grad-accum", 2))):
        assert train(*RUN, "--loss", "dpo", *options, model=model, output_dir=tmp_path / name) == 0
        first = read_metrics(tmp_path / name, "train")[0]
        assert first["loss"] == pytest.approx(0.693147 + first["router_loss"], abs=1e-4)
        # At least the coefficient times experts per token: perfectly even routing.
        assert first["router_loss"] >= 0.25 * 2 - 1e-3


def test_lora_and_online_reference(train: Train, tmp_path: Path, tokenizer: Any) -> None:
    pytest.importorskip("peft")
    model = mixtral(tmp_path / "model", tokenizer, router_aux_loss_coef=0.25)
    options = ("--lora-r", 4, "--lora-targets", "q_proj,v_proj", "--reference", "online", "--gradient-checkpointing")
    assert train(*RUN, *options, model=model) == 0
    assert read_metrics(tmp_path / "out", "train")[0]["router_loss"] > 0


def test_unknown_auxiliary_loss_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mixtral import modeling_mixtral

    model = build("mixtral")
    monkeypatch.delattr(modeling_mixtral, "load_balancing_loss_func")
    with pytest.raises(TrainError, match="ask for an auxiliary loss that is not known for this architecture"):
        router_loss(model)


def test_dense_model_that_asks_for_router_logits(fails: Fails, tmp_path: Path, model_dir: Path, tokenizer: Any) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(model_dir)
    model.config.update({"output_router_logits": True, "router_aux_loss_coef": 0.1})
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    assert "not known for this architecture" in fails(model=tmp_path / "dense")
