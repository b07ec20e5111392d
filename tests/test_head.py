"""`LMHead`: read from real models, whatever wraps them, and equal to the models' own logits."""

import pytest
import torch
from tiny_models import SIZES

from spo_kernels import LMHead, fused_spo_loss, linear_logprob

tf = pytest.importorskip("transformers")

CONFIGS = {
    "llama": (tf.LlamaConfig, {}, 1.0, None),
    "gemma2": (tf.Gemma2Config, {"final_logit_softcapping": 3.0}, 1.0, 3.0),
    "cohere": (tf.CohereConfig, {"logit_scale": 0.25}, 0.25, None),
    "granite": (tf.GraniteConfig, {"logits_scaling": 4.0}, 0.25, None),
    "phi": (tf.PhiConfig, {}, 1.0, None),  # a head with a bias
}
LABELS = torch.tensor([[3, 9, 60, 4, 7, 0]])


def build(name):
    kind, extra, *_ = CONFIGS[name]
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(kind(**{**SIZES, **extra})).eval()
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_of_gives_the_models_own_logits(name):
    model = build(name)
    head = LMHead.of(model)
    assert (head.logit_scale, head.logit_softcap) == CONFIGS[name][2:]
    assert head.weight is model.get_output_embeddings().weight
    assert (head.bias is None) == (name != "phi")
    hidden = model.get_decoder()(input_ids=LABELS).last_hidden_state
    ours = linear_logprob(hidden, head, LABELS, shift=True)[:, 1:]
    theirs = model(input_ids=LABELS).logits[:, :-1].log_softmax(-1).gather(-1, LABELS[:, 1:, None])[..., 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_inside_peft_and_its_own_gradient():
    peft = pytest.importorskip("peft")
    model = build("gemma2")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    head = LMHead.of(wrapped)
    assert head.weight is model.get_output_embeddings().weight and head.logit_softcap == 3.0
    assert not head.weight.requires_grad


def test_inside_ddp_and_compile():
    model = build("cohere")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for outer in (wrapped, torch.compile(wrapped)):
            head = LMHead.of(outer)
            assert head.weight is model.get_output_embeddings().weight and head.logit_scale == 0.25
    finally:
        torch.distributed.destroy_process_group()


def test_what_is_no_language_model():
    with pytest.raises(TypeError, match=r"a transformers causal language model, got Linear"):
        LMHead.of(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"LlamaModel has no output embeddings"):
        LMHead.of(build("llama").get_decoder())
    model = build("llama")
    model.get_output_embeddings().weight = torch.nn.Parameter(torch.zeros(61, 16, dtype=torch.int8), False)
    with pytest.raises(ValueError, match=r"weight is quantised \(torch.int8\)"):
        LMHead.of(model)
    with pytest.raises(TypeError, match=r"head must be a weight \[V, H\] or an LMHead, got LlamaForCausalLM"):
        linear_logprob(torch.zeros(6, 16), build("llama"), LABELS[0])


def test_each_head_has_its_own_transform():
    """A plain reference head beside a policy's softcap would silently be another model."""
    hidden, weight, labels = torch.randn(2, 3, 4), torch.randn(7, 4), torch.randint(7, (2, 3))
    capped = LMHead(weight, logit_softcap=2.0)
    with pytest.raises(ValueError, match=r"ref_head is a plain weight, but head has logit_scale = 1.0 and logit_soft"):
        fused_spo_loss(hidden, capped, labels, ref_hidden=hidden, ref_head=weight)
    same, _ = fused_spo_loss(hidden, capped, labels, loss="dpo", ref_hidden=hidden, ref_head=capped)
    plain, _ = fused_spo_loss(hidden, capped, labels, loss="dpo", ref_hidden=hidden, ref_head=LMHead(weight))
    assert abs(same.item() - 0.693147) < 1e-6 != abs(plain.item() - 0.693147)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39, "1", True, None])
def test_a_scale_that_is_no_number(scale):
    with pytest.raises(ValueError, match=r"logit_scale must be a finite number"):
        LMHead(torch.zeros(2, 2), logit_scale=scale)


@pytest.mark.parametrize("cap", [0.0, -1.0, 1e-44, float("inf"), "30"])
def test_a_softcap_that_is_no_cap(cap):
    with pytest.raises(ValueError, match=r"logit_softcap must be a number of at least 1e-30 or None"):
        LMHead(torch.zeros(2, 2), logit_softcap=cap)
