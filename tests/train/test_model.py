"""Backbone and head give each architecture's own log-probs; what can't be taken apart is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf

from spo_kernels import LMHead, linear_logprob, sequence_logps
from spo_kernels.head import logit_transform
from spo_kernels.integrations.hidden import hidden_states
from spo_kernels.train.errors import TrainError
from spo_kernels.train.lora import add_lora
from spo_kernels.train.model import check_against_own_logits, check_head, check_layout, freeze_unused

from .test_encode import config

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.1}
CONFIGS = {
    "llama": (tf.LlamaConfig, {}, (1.0, None)),
    "llama tied": (tf.LlamaConfig, {"tie_word_embeddings": True}, (1.0, None)),
    "mistral": (tf.MistralConfig, {"sliding_window": 4}, (1.0, None)),
    "qwen2": (tf.Qwen2Config, {}, (1.0, None)),
    "qwen3": (tf.Qwen3Config, {"head_dim": 8}, (1.0, None)),
    "gemma2": (tf.Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 3.0}, (1.0, 3.0)),
    "gemma3": (
        tf.Gemma3TextConfig,
        {"head_dim": 8, "final_logit_softcapping": 3.0},
        (1.0, 3.0),
    ),
    "cohere": (tf.CohereConfig, {"logit_scale": 0.25}, (0.25, None)),
    "cohere2": (tf.Cohere2Config, {"logit_scale": 0.25, "head_dim": 8}, (0.25, None)),
    "granite": (tf.GraniteConfig, {"logits_scaling": 4.0}, (0.25, None)),
    "minicpm3": (
        tf.MiniCPM3Config,
        {"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
        | {"v_head_dim": 8, "dim_model_base": 8},
        (1.0, None),
    ),
    "recurrent gemma": (
        tf.RecurrentGemmaConfig,
        {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8, "head_dim": 8, "logits_soft_cap": 3.0},
        (1.0, 3.0),
    ),
    "phi (head bias)": (tf.PhiConfig, {}, (1.0, None)),
    "gpt2": (tf.GPT2Config, None, (1.0, None)),
}


def build(name: str) -> Any:
    kind, extra, _ = CONFIGS[name]
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(kind(**GPT2) if extra is None else kind(**{**SIZES, **extra}))
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model.eval()


def tokens(n: int = 16) -> torch.Tensor:
    return torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_and_gradients_equal_the_models_own(name: str) -> None:
    model = build(name)
    head = LMHead.of(model)
    assert (head.logit_scale, head.logit_softcap) == CONFIGS[name][2]
    check_against_own_logits(model, tokens())
    input_ids = tokens(40).view(2, 20)
    labels = input_ids.clone()
    labels[0, :7], labels[1, 15:] = -100, -100

    ours = linear_logprob(hidden_states(model, input_ids=input_ids), head, labels, shift=True)
    ours_grads = torch.autograd.grad(ours.sum(), list(model.parameters()))
    logp = model(input_ids=input_ids).logits[:, :-1].log_softmax(-1)
    theirs = logp.gather(-1, labels[:, 1:, None].clamp_min(0))[..., 0] * (labels[:, 1:] != -100)
    theirs_grads = torch.autograd.grad(theirs.sum(), list(model.parameters()))
    torch.testing.assert_close(ours[:, 1:], theirs, rtol=1e-4, atol=1e-4)
    for (n, _), a, b in zip(model.named_parameters(), ours_grads, theirs_grads, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item() + 1e-6, msg=lambda m, n=n: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_right_padding_needs_no_mask(name: str) -> None:
    model, row = build(name), tokens(12)[None]
    padded = hidden_states(model, input_ids=torch.nn.functional.pad(row, (0, 9)))
    torch.testing.assert_close(padded[:, :12], hidden_states(model, input_ids=row), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_lora_wrapped_model(name: str) -> None:
    pytest.importorskip("peft")
    model = add_lora(build(name), config(lora_r=4))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    check_against_own_logits(model, tokens())
    with model.disable_adapter():
        off = hidden_states(model, input_ids=tokens()[None])
    assert not torch.allclose(off, hidden_states(model, input_ids=tokens()[None]))
    assert not LMHead.of(model).weight.requires_grad


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"model_type": "granite", "logits_scaling": 8.0}, 0.125),
        ({"model_type": "hyperclovax", "logits_scaling": 8.0}, 8.0),
        ({"model_type": "falcon_h1", "lm_head_multiplier": 0.5}, 0.5),
        ({"model_type": "muse_glimmer_text", "output_multiplier": 0.25}, 0.25),
        ({"model_type": "minicpm3", "logits_scaling": 4.0}, 1.0),
        ({"model_type": "mpt", "logit_scale": 0.25}, 1.0),
        ({"model_type": "mpt", "logit_scale": "inv_sqrt_d_model"}, 1.0),
    ],
)
def test_scales_by_configuration(settings: dict[str, Any], scale: float) -> None:
    text = SimpleNamespace(**settings)
    assert logit_transform(SimpleNamespace(get_text_config=lambda: text)) == (scale, None)


def test_text_of_a_vision_model() -> None:
    """The language model is trained, the vision tower is frozen."""
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision |= {"image_size": 28, "patch_size": 14}
    text = {**SIZES, "head_dim": 8, "final_logit_softcapping": None}
    model = tf.AutoModelForCausalLM.from_config(tf.Gemma3Config(text_config=text, vision_config=vision))
    check_against_own_logits(model, tokens())
    freeze_unused(model, tokens())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("language_model" in name or "lm_head" in name), name


def test_lora_on_the_head() -> None:
    pytest.importorskip("peft")
    model = add_lora(build("llama"), config(lora_r=4, lora_targets="q_proj,lm_head"))
    torch.nn.init.normal_(model.get_base_model().lm_head.lora_B["default"].weight, std=0.3)
    check_against_own_logits(model, tokens())
    freeze_unused(model, tokens())
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def _bloom() -> Any:
    """Its positions are those of the row."""
    return tf.AutoModelForCausalLM.from_config(tf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2))


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_a_layout_that_a_model_cannot_take(layout: str) -> None:
    check_layout(build("llama"), config(layout=layout))
    check_layout(_bloom(), config(stage="sft", layout=layout))
    with pytest.raises(TrainError, match=f"--layout {layout}: .*BloomForCausalLM runs padded batches only"):
        check_layout(_bloom(), config(layout=layout))


def test_unknown_lora_target_is_refused() -> None:
    pytest.importorskip("peft")
    with pytest.raises(TrainError, match="--lora-targets nothing"):
        add_lora(build("llama"), config(lora_r=4, lora_targets="nothing"))


def test_model_without_a_head_is_refused() -> None:
    with pytest.raises(TrainError, match="LlamaModel has no output embeddings"):
        check_head(build("llama").model)


def test_quantised_head_is_refused() -> None:
    model = build("llama")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(TrainError, match=r"the head's weight is quantised \(torch\.int8\)"):
        check_head(model)
    model.lm_head = torch.nn.Identity()
    with pytest.raises(TrainError, match="the head is a Identity"):
        check_head(model)


def test_unknown_logit_transform_is_refused() -> None:
    model = build("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.05)
    with pytest.raises(TrainError, match="differ from its own logits"):
        check_against_own_logits(model, tokens())


def test_ignored_softcap_is_refused() -> None:
    model = build("llama")
    model.config.final_logit_softcapping = 3.0
    with pytest.raises(TrainError, match="LlamaForCausalLM: its logits are not those of its head and configuration"):
        check_against_own_logits(model, tokens())


def test_projection_between_backbone_and_head_is_trained() -> None:
    """It belongs to neither and text reaches it; what text does not reach is frozen."""
    sizes = {k: SIZES[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    model = tf.AutoModelForCausalLM.from_config(tf.BertConfig(**sizes, intermediate_size=48, is_decoder=True))
    model.extra = torch.nn.Linear(3, 3)
    check_against_own_logits(model, tokens())
    freeze_unused(model, tokens())
    assert all(p.requires_grad == ("extra" not in name) for name, p in model.named_parameters())


def test_attention_to_later_tokens_is_refused() -> None:
    model = build("llama")
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output + output.mean(1, keepdim=True))
    with pytest.raises(TrainError, match="later tokens change earlier hidden states"):
        check_against_own_logits(model, tokens())


def test_bfloat16_weights_pass_the_check() -> None:
    model = build("gemma2").to(torch.bfloat16)
    check_against_own_logits(model, tokens())
    hidden = hidden_states(model, input_ids=tokens()[None])
    sums = sequence_logps(hidden, LMHead.of(model), tokens()[None], shift=True)
    assert sums.dtype == torch.float32
