"""Which models take a row without padding, by which way, and what the others do."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers as tf
from transformers.masking_utils import flash_attention_mask

from spo_kernels.integrations.hidden import hidden_states
from spo_kernels.integrations.layout import lay_pairs, ways
from spo_kernels.integrations.transformers import FusedPreferenceModel
from tests.integrations.packing import DEEP, SHARED, WINDOW, assert_same, batch_of, build, gradients
from tests.integrations.test_transformers import lora

FALCON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def other(kind: str, **settings: Any) -> Any:
    """A model of a family that CONFIGS does not have."""
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(getattr(tf, kind)(**{"vocab_size": 61, **settings}))


def prefix_tuned() -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(build("llama"), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "mamba": (lambda: other("MambaConfig", hidden_size=16, num_hidden_layers=1), "recurrent, Mamba, linear attention"),
    "linear attention": (lambda: other("Qwen3NextConfig", **DEEP), "recurrent, Mamba, linear attention"),
    "convolution": (lambda: other("Lfm2Config", **DEEP, full_attn_idxs=[1]), "layers are of kind conv"),
    "alibi": (lambda: other("FalconConfig", **FALCON, alibi=True), "ALiBi biases count places"),
    "local": (
        lambda: other("GPTNeoConfig", hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["local"], 1]]),
        "local attention counts places",
    ),
    "temperature": (
        lambda: other("Llama4TextConfig", **DEEP, num_local_experts=2, intermediate_size_mlp=16),
        "attention temperature counts places",
    ),
    "router loss": (
        lambda: other("MixtralConfig", **DEEP, num_local_experts=2, output_router_logits=True),
        "output_router_logits",
    ),
    "prefix tuning": (prefix_tuned, "virtual tokens"),
    "no positions": (
        lambda: other("RoFormerConfig", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                      num_attention_heads=2, is_decoder=True),
        "takes no position_ids",
    ),
    "a window that it ignores": (lambda: build("llama", sliding_window=5), "hidden states differ by"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_who_cannot_says_why(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(ways.NotExact, match=reason):
        ways.way_of(make())


def test_auto_stays_padded_with_one_warning() -> None:
    model = other("BloomConfig", hidden_size=16, n_layer=1, n_head=2)
    expected = gradients(model, "padded", batch_of(), "simpo")
    with pytest.warns(UserWarning, match="^BloomForCausalLM runs padded batches only: its ALiBi") as seen:
        for _ in range(2):
            found = gradients(model, "auto", batch_of(), "simpo")
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(seen) == 1
    with pytest.raises(ValueError, match="layout = 'shared': BloomForCausalLM runs padded batches only: its ALiBi"):
        gradients(model, "shared", batch_of(), "simpo")


def test_auto_shares_and_is_silent() -> None:
    model = build("gemma2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        laid = lay_pairs(model, **batch_of())
    assert laid.row is not None and laid.row.input_ids.numel() == SHARED


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_half_precision_shares_too(name: str) -> None:
    """Under autocast the comparison is in the weights' float32; weights in bfloat16 differ by more."""
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build(name)
        assert lay_pairs(model, **batch_of()).row is not None
        assert_close_in_bfloat16(model)
    model = build(name).bfloat16()
    assert ways.way_of(model) is ways.by_segments
    assert_close_in_bfloat16(model)


def assert_close_in_bfloat16(model: Any) -> None:
    shared, padded = (
        FusedPreferenceModel(model, "simpo", layout=layout)(**batch_of())[0] for layout in ("shared", "padded")
    )
    torch.testing.assert_close(shared, padded, rtol=0.05, atol=0)


def test_a_forward_that_is_given_more_stays_padded() -> None:
    model, batch = build("llama"), batch_of()
    positions = torch.arange(batch["labels"].shape[1])[None]
    with pytest.warns(UserWarning, match="its forward is given position_ids"):
        assert lay_pairs(model, **batch, position_ids=positions).row is None
    with pytest.raises(ValueError, match="layout must be one of 'auto', 'padded', 'packed', 'shared', got 'packd'"):
        FusedPreferenceModel(model, layout="packd")


def test_a_reference_that_takes_padded_batches_only() -> None:
    model, reference = build("llama"), other("BloomConfig", hidden_size=16, n_layer=1, n_head=2)
    with pytest.warns(UserWarning, match="BloomForCausalLM runs padded batches only"):
        shared = gradients(model, "shared", batch_of(), reference=reference)
    assert_same(shared, gradients(model, "padded", batch_of(), reference=reference))


def test_an_attention_that_transformers_does_not_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = other("FalconConfig", **FALCON)
    assert ways.way_of(model) is ways.by_dense_masks
    padded = gradients(model, "padded", batch_of(), "simpo")
    assert_same(gradients(model, "shared", batch_of(), "simpo"), padded)
    monkeypatch.setattr(ways, "MASK_BYTES", SHARED**2 * 4 - 1)
    with pytest.warns(UserWarning, match=f"a mask of {SHARED} x {SHARED} tokens takes more than"):
        assert_same(gradients(model, "auto", batch_of(), "simpo"), padded)


def flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """Flash attention as transformers calls it: causal from the last key backwards, no mask but one of padding."""
    assert attention_mask is None or attention_mask.ndim == 2
    assert attention_mask is not None or "position_ids" not in options, "it would look for sequences in them"
    queries, keys = query.shape[2], key.shape[2]
    back = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    seen = (back >= 0) & (back < (options.get("sliding_window") or keys))
    if attention_mask is not None:
        seen = seen & (attention_mask[:, None, None].bool() | (back == 0))
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
    found = nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=options["scaling"])
    return found.transpose(1, 2), None


@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_flash_attention_gets_no_mask(name: str) -> None:
    tf.AttentionInterface.register("flash_stand_in", flash)
    tf.AttentionMaskInterface.register("flash_stand_in", flash_attention_mask)
    model, plain = build(name), build(name)
    model.config._attn_implementation = "flash_stand_in"
    assert ways.way_of(model) is ways.by_segments
    assert_same(gradients(model, "shared", batch_of(), "simpo"), gradients(plain, "padded", batch_of(), "simpo"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_and_adapters(reentrant: bool) -> None:
    """Checkpointing calls the attention again in the backward; the reference is the model without its adapters."""
    model = lora(build("gemma2"))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    assert_same(*(gradients(model, layout, batch_of(), reference="adapters_off") for layout in ("shared", "padded")))


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_elsewhere_the_model_is_what_it_was(name: str, tmp_path: Path) -> None:
    """With a padded batch, in generation, copied, and saved."""
    model = build(name).eval()
    batch = {key: value for key, value in batch_of().items() if key != "labels"}
    prompt = {"input_ids": torch.tensor([[1, 5, 9, 14, 6, 8, 12]]), "max_new_tokens": 4, "do_sample": False}
    before, said = hidden_states(model, **batch), model.generate(**prompt)
    own = model.config._attn_implementation
    assert ways.way_of(model) is ways.by_segments and model.config._attn_implementation != own
    assert torch.equal(hidden_states(model, **batch), before)
    assert torch.equal(model.generate(**prompt), said)
    assert model.config.sliding_window == WINDOW["sliding_window"]
    copied = copy.deepcopy(model)
    assert_same(*(gradients(each, "shared", batch_of(), "simpo") for each in (copied, model)))
    model.save_pretrained(tmp_path)
    assert tf.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == own
    assert "spo_segments" not in (tmp_path / "config.json").read_text()
