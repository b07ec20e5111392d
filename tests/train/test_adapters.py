"""PEFT adapters as the model to train, and on embeddings and heads."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from spo_kernels.train.config import TrainConfig
from spo_kernels.train.lora import check_adapters
from spo_kernels.train.reference import Reference

from .conftest import Fails, Train, build_tokenizer, read_metrics

peft = pytest.importorskip("peft")

RUN = ("--max-steps", 3, "--learning-rate", 1e-2, "--batch-size", 4, "--logging-steps", 1, "--loss", "dpo")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("untied")
    config = tf.AutoConfig.from_pretrained(model_dir, tie_word_embeddings=False)
    tf.set_seed(0)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def adapter(folder: Path, base: Path, **settings: Any) -> Path:
    """A trained-looking LoRA adapter without a tokenizer, as many are."""
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings})
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder


def logits(folder: Path, base: Path) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(base), folder).eval()
    return model(input_ids=torch.arange(3, 30)[None]).logits


@pytest.mark.parametrize("reference", ["precompute", "online"])
def test_adapter_is_trained_on(train: Train, tmp_path: Path, model_dir: Path, reference: str) -> None:
    """The reference is the model with the adapter as it was, not the base."""
    start = adapter(tmp_path / "start", model_dir, lora_dropout=0.5)
    assert train(*RUN, "--reference", reference, model=start) == 0
    output = tmp_path / "out"
    first, *_, last = read_metrics(output, "train")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and last["loss"] < first["loss"]
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (start, output))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[n], after[n]) for n in before)
    assert not (output / "model.safetensors").exists()
    assert all("lora_" in n for n in load_file(output / "checkpoint-3" / "model.safetensors"))
    # What was saved is the model that was trained: its loss goes on from there.
    assert train(*RUN, "--learning-rate", 0, model=output, output_dir=tmp_path / "again") == 0
    reward = ("--ref-model", start, "--learning-rate", 0, "--max-steps", 1, "--batch-size", 48)
    assert train(*RUN, *reward, model=output, output_dir=tmp_path / "compared") == 0
    assert read_metrics(tmp_path / "compared", "train")[0]["rewards/margins"] > 0.005


def test_adapter_resumes(train: Train, tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = adapter(tmp_path / "start", model_dir)
    options = (*RUN, "--max-steps", 6, "--save-steps", 2, "--schedule", "constant")
    assert train(*options, model=start, output_dir=tmp_path / "whole") == 0
    assert train(*options, "--max-steps", 4, model=start) == 0
    assert train(*options, "--resume", model=start) == 0
    whole, resumed = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "out"))
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)


def test_scale_of_an_adapter_is_part_of_the_models_hash(train: Train, tmp_path: Path, model_dir: Path) -> None:
    """The same weights with another scale need other reference log-probs."""
    start = adapter(tmp_path / "start", model_dir)
    cache = ("--cache-dir", tmp_path / "cache", "--learning-rate", 0)
    assert train(*RUN, *cache, model=start, output_dir=tmp_path / "a") == 0
    config = start / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 64}))
    assert train(*RUN, *cache, model=start, output_dir=tmp_path / "b") == 0
    assert read_metrics(tmp_path / "b", "train")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_extrapolated_adapter_starts_the_next_round(train: Train, tmp_path: Path, model_dir: Path) -> None:
    from spo_kernels.commands.extrapolate import main

    start = adapter(tmp_path / "start", model_dir)
    assert train(*RUN, model=start) == 0
    folders = ["--from", start, "--to", tmp_path / "out", "--output-dir", tmp_path / "next"]
    assert main([*map(str, folders)]) == 0
    assert train(*RUN, model=tmp_path / "next", output_dir=tmp_path / "round-2") == 0
    assert read_metrics(tmp_path / "round-2", "train")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


BROKEN = {
    "empty": (b"{}", "adapter_config.json: not an adapter's configuration: KeyError"),
    "no JSON": (b"\xff", "adapter_config.json: not an adapter's configuration"),
    "deep": (b"[" * 200_000, "adapter_config.json: not an adapter's configuration"),
    "no base": (b'{"base_model_name_or_path": null}', "must name the base model, got None"),
    "missing base": (b'{"base_model_name_or_path": "/none/such"}', "'/none/such'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_adapter(fails: Fails, tmp_path: Path, model_dir: Path, name: str) -> None:
    content, message = BROKEN[name]
    start = adapter(tmp_path / "start", model_dir)
    build_tokenizer().save_pretrained(start)
    (start / "adapter_config.json").write_bytes(content)
    assert message in fails(model=start)


def test_adapter_with_damaged_weights(fails: Fails, tmp_path: Path, model_dir: Path) -> None:
    start = adapter(tmp_path / "start", model_dir)
    (start / "adapter_model.safetensors").write_bytes(b"half")
    assert f"adapter '{start}' can't be loaded (" in fails(model=start)


def test_adapter_and_new_adapters(fails: Fails, tmp_path: Path, model_dir: Path) -> None:
    start = adapter(tmp_path / "start", model_dir)
    message = fails("--lora-r", 4, model=start)
    assert f"{start} is an adapter and is trained itself: leave --lora-r out, or merge it into {model_dir}" in message


def test_prompt_adapter_is_refused(fails: Fails, tmp_path: Path, model_dir: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(model_dir)
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "prompt")
    assert "PROMPT_TUNING adapter changes the input, which is not supported" in fails(model=tmp_path / "prompt")


EMBEDDINGS: dict[str, dict[str, Any]] = {
    "adapter on the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "trained embeddings": {"modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_adapted_embeddings(
    train: Train, fails: Fails, tmp_path: Path, model_dir: Path, untied: Path, name: str
) -> None:
    """Right where the head has weights of its own, refused where they are the embeddings'."""
    tied = adapter(tmp_path / "tied", model_dir, **EMBEDDINGS[name])
    message = fails(model=tied)
    assert f"{tied}: an adapter on the embeddings, which are tied to the head (tie_word_embeddings)" in message
    start = adapter(tmp_path / "start", untied, **EMBEDDINGS[name])
    assert train(*RUN, model=start, output_dir=tmp_path / "free") == 0
    first, *_, last = read_metrics(tmp_path / "free", "train")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and last["loss"] < first["loss"]
    assert not torch.allclose(logits(start, untied), logits(tmp_path / "free", untied), atol=1e-3)


HEADS: dict[str, dict[str, Any]] = {
    "adapter on the head": {"target_modules": ["q_proj", "lm_head"]},
    "trained head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("reference", ["precompute", "online"])
@pytest.mark.parametrize("name", HEADS)
def test_adapted_head(
    train: Train, fails: Fails, tmp_path: Path, model_dir: Path, untied: Path, name: str, reference: str
) -> None:
    """Trained where it has weights of its own, from the reference's loss on; refused where they are the embeddings'."""
    tied = adapter(tmp_path / "tied", model_dir, **HEADS[name])
    assert f"{tied}: an adapter on the head, which is tied to the embeddings" in fails(model=tied)
    start = adapter(tmp_path / "start", untied, **HEADS[name])
    assert train(*RUN, "--reference", reference, model=start, output_dir=tmp_path / "free") == 0
    first, *_, last = read_metrics(tmp_path / "free", "train")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and last["loss"] < first["loss"]
    before, after = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("start", "free"))
    assert before.keys() == after.keys() and any("lm_head" in n for n in before)
    # PEFT saves the base of an adapted head too
    assert all(torch.equal(before[n], after[n]) == ("base_layer" in n) for n in before)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj,embed_tokens", "an adapter on the embeddings, which are tied to the head"),
        ("lm_head", "an adapter on the head, which is tied to the embeddings"),
        ("q_proj,input_layernorm", "Target module LlamaRMSNorm"),
    ],
)
def test_new_adapters_are_refused_before_the_reference(
    fails: Fails, monkeypatch: pytest.MonkeyPatch, targets: str, expected: str
) -> None:
    monkeypatch.setattr(Reference, "logps", lambda *_, **__: pytest.fail("the reference was computed"))
    assert f"--lora-targets {targets}: {expected}" in fails("--lora-r", 4, "--lora-targets", targets)


def test_trying_adapters_changes_nothing(model_dir: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(model_dir)
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    check_adapters(model, TrainConfig(model="", dataset="", output_dir="", lora_r=4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in model.named_parameters())
    assert not any("lora" in name for name, _ in model.named_modules())


def test_new_adapters_on_embeddings_of_their_own(train: Train, tmp_path: Path, untied: Path) -> None:
    options = ("--lora-r", 4, "--lora-targets", "q_proj,embed_tokens", "--reference", "online")
    assert train(*RUN, *options, model=untied) == 0
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any("embed_tokens.lora" in n for n in names)
    assert read_metrics(tmp_path / "out", "train")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize(
    ("dtype", "options"), [("bfloat16", ()), ("bfloat16", ("--lora-r", 4)), ("float16", ("--lora-r", 4))]
)
def test_dtype_of_the_weights(train: Train, tmp_path: Path, untied: Path, dtype: str, options: tuple[Any, ...]) -> None:
    assert train(*RUN, "--dtype", dtype, *options, model=untied) == 0
    name = "adapter_model" if options else "model"
    saved = {t.dtype for t in load_file(tmp_path / "out" / f"{name}.safetensors").values()}
    # Adapters are float32 whatever their base is.
    assert saved == {torch.float32 if options else torch.bfloat16}
    losses = [r["loss"] for r in read_metrics(tmp_path / "out", "train")]
    assert all(map(math.isfinite, losses)) and losses[0] == pytest.approx(math.log(2), abs=2e-2)


def test_attention_implementations_agree(train: Train, tmp_path: Path) -> None:
    runs = {}
    for name in ("eager", "sdpa"):
        assert train(*RUN, "--attn-implementation", name, output_dir=tmp_path / name) == 0
        runs[name] = [r["loss"] for r in read_metrics(tmp_path / name, "train")]
    assert runs["eager"] == pytest.approx(runs["sdpa"], abs=1e-4)


def quantised(folder: Path, model_dir: Path, **settings: Any) -> Path:
    """A copy whose configuration says that its weights are quantised."""
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "bitnet"])
def test_quantised_base_without_adapters_is_refused(fails: Fails, tmp_path: Path, model_dir: Path, method: str) -> None:
    """Before its package is asked for, or its weights are read."""
    model = quantised(tmp_path / "model", model_dir, quant_method=method, load_in_4bit=True, bits=4)
    (model / "model.safetensors").write_bytes(b"not read")
    message = fails(model=model)
    assert f"{model} is quantised ({method}): such weights can't be trained; --lora-r 16 trains adapters" in message


@pytest.mark.parametrize("settings", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
@pytest.mark.parametrize("options", [(), ("--reference", "online", "--gradient-checkpointing"), ("--bf16",)])
def test_quantised_base_with_adapters(
    train: Train, tmp_path: Path, model_dir: Path, settings: dict[str, Any], options: tuple[Any, ...]
) -> None:
    pytest.importorskip("bitsandbytes")
    config = tf.BitsAndBytesConfig(**settings)
    base = tf.AutoModelForCausalLM.from_pretrained(model_dir, quantization_config=config, device_map={"": "cpu"})
    base.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    options = (*RUN, "--lora-r", 4, "--schedule", "constant", *options)
    assert train(*options, model=tmp_path / "base", output_dir=tmp_path / "whole") == 0
    first, *_, last = read_metrics(tmp_path / "whole", "train")
    assert first["loss"] == pytest.approx(math.log(2), abs=2e-2) and last["loss"] < first["loss"]
    assert all("lora_" in n for n in load_file(tmp_path / "whole" / "adapter_model.safetensors"))
    assert train(*options, "--max-steps", 2, model=tmp_path / "base") == 0
    assert train(*options, "--resume", model=tmp_path / "base") == 0
    whole, resumed = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "out"))
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    # And the adapter is a start for the next run.
    assert train(*RUN, model=tmp_path / "out", output_dir=tmp_path / "next") == 0
