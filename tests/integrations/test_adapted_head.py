"""Heads that PEFT has adapted, against PEFT's own forward with full logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spo_kernels import LMHead, LoRA, Sparsity, fused_spo_loss, linear_kl, linear_logprob
from spo_kernels.integrations.transformers import FusedPreferenceModel, hidden_states
from spo_kernels.testing import TensorMeter
from tests.integrations.test_transformers import REFERENCE, batch_of, build, full_logits

peft = pytest.importorskip("peft")


class Halve(torch.nn.Module):
    """A dropout that draws nothing."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * 0.5 if self.training else hidden


def lora(kind: str, **settings: Any) -> Any:
    """An adapter on the head and one below it, neither of them zero."""
    settings = {"r": 4, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM", **settings}
    return randomised(peft.get_peft_model(build(kind), peft.LoraConfig(**settings)))


def randomised(model: Any) -> Any:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def two_active() -> Any:
    model = lora("llama", r=3, lora_alpha=5)
    model.add_adapter("more", peft.LoraConfig(r=2, target_modules=["lm_head"], use_rslora=True))
    model.base_model.set_adapter(["default", "more"])
    return randomised(model)


def with_dropout() -> Any:
    model = lora("llama", lora_dropout=0.3)
    head = model.get_base_model().lm_head
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Dropout):
            parent, _, key = name.rpartition(".")
            model.get_submodule(parent)[key] = Halve()
    assert isinstance(head.lora_dropout["default"], Halve)
    return model.train()


def trained_copy() -> Any:
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = randomised(peft.get_peft_model(build("llama"), settings))
    torch.nn.init.normal_(model.get_base_model().lm_head.modules_to_save["default"].weight, std=0.3)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "one": lambda: lora("llama"),
    "rank-stabilised": lambda: lora("llama", use_rslora=True),
    "two active": two_active,
    "dropout": with_dropout,
    "softcap, tied": lambda: lora("gemma2"),
    "scale": lambda: lora("cohere"),
    "trained copy": trained_copy,
}


def eager_loss(model: Any, batch: dict[str, torch.Tensor], reference: torch.Tensor) -> torch.Tensor:
    chosen, rejected = (full_logits(model, batch) - reference).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, model: Any) -> None:
    """Loss and the gradients of all that is trained, 1e-5 of the largest."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(ours, list(trained.values()), allow_unused=True)
    expected = torch.autograd.grad(theirs, list(trained.values()), allow_unused=True)
    for name, a, b in zip(trained, found, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()), msg=name)


@pytest.mark.parametrize("path", ["packed", "factorised", "two_pass"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_pefts(name: str, path: str) -> None:
    model, batch = MODELS[name](), batch_of()
    ours, _ = FusedPreferenceModel(model, path=path)(**batch, ref_logps=REFERENCE)
    assert_same(ours, eager_loss(model, batch, REFERENCE), model)


@pytest.mark.parametrize("name", ["two active", "trained copy"])
def test_the_reference_has_adapters_off(name: str) -> None:
    model, batch = MODELS[name](), batch_of()
    with torch.no_grad(), model.disable_adapter():
        reference = full_logits(model, batch)
    ours, _ = FusedPreferenceModel(model, reference="adapters_off")(**batch)
    assert not torch.isclose(ours, torch.tensor(2.0).log(), atol=1e-2)
    assert_same(ours, eager_loss(model, batch, reference), model)


def test_merged() -> None:
    model, batch = lora("llama"), batch_of()
    before = eager_loss(model, batch, REFERENCE)
    model.merge_adapter()
    ours, _ = FusedPreferenceModel(model)(**batch, ref_logps=REFERENCE)
    torch.testing.assert_close(ours, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("columns", [1, 8, 61])
def test_optional_outputs_and_small_slices(columns: int) -> None:
    """Entropy carries a gradient too, which the backward recomputes logits for."""
    model, batch = two_active(), batch_of()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logp, extra = linear_logprob(
        hidden_states(model, **inputs), LMHead.of(model), batch["labels"], outputs=("entropy", "lse"),
        workspace_bytes=4600 + 400 * columns,
    )  # fmt: skip
    logits = model(**inputs).logits
    counted = batch["labels"] != -100
    p = logits.log_softmax(-1)
    theirs = p.gather(-1, batch["labels"].clamp_min(0)[..., None])[..., 0] - 0.3 * (p.exp() * p).sum(-1)
    theirs = (theirs + 0.1 * logits.logsumexp(-1))[counted].sum()
    assert_same((logp + 0.3 * extra["entropy"] + 0.1 * extra["lse"])[counted].sum(), theirs, model)


def test_divergence_from_the_base() -> None:
    model, batch = two_active(), batch_of()
    inputs, labels = {key: batch[key] for key in ("input_ids", "attention_mask")}, batch["labels"]
    with torch.no_grad(), model.disable_adapter():
        reference = hidden_states(model, **inputs), LMHead.of(model)
        log_p = model(**inputs).logits.log_softmax(-1)
    ours = linear_kl(hidden_states(model, **inputs), LMHead.of(model), *reference, labels).sum()
    log_q = model(**inputs).logits.log_softmax(-1)
    assert_same(ours, (log_p.exp() * (log_p - log_q)).sum(-1)[labels != -100].sum(), model)


def test_sparse_backward() -> None:
    """What is left out is known, and small."""
    torch.manual_seed(0)
    hidden, labels = 3 * torch.randn(64, 32), torch.randint(4096, (64,))
    weight, a, b = torch.randn(4096, 32), torch.randn(3, 32, requires_grad=True), torch.randn(4096, 3)
    head, leaves = LMHead(weight, lora=(LoRA(a, b.requires_grad_(), 0.3),)), (hidden.requires_grad_(), a, b)
    found = []
    for sparsity in ("exact", Sparsity("certified", 1e-6)):
        logp, extra = linear_logprob(hidden, head, labels, outputs=("kept_share",), sparsity=sparsity)
        found.append(torch.autograd.grad(logp.sum(), leaves))
    assert extra["kept_share"].mean() < 0.9
    for exact, sparse in zip(*found, strict=True):
        torch.testing.assert_close(sparse, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


def test_half_precision_base_with_float32_adapters() -> None:
    model, batch = lora("llama").to(torch.bfloat16), {**batch_of(), "ref_logps": REFERENCE}
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.float()
    loss, _ = FusedPreferenceModel(model)(**batch)
    loss.backward()
    head = model.get_base_model().lm_head
    assert head.lora_A["default"].weight.grad.dtype == head.lora_B["default"].weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, eager_loss(model, batch, REFERENCE).float(), rtol=2e-2, atol=2e-2)


def test_what_is_no_sum_of_two_products_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'default' is a DoraLinearVariant"):
        LMHead.of(lora("llama", use_dora=True))
    settings = peft.LoHaConfig(r=2, target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"carries an adapter of peft\.tuners\.loha"):
        LMHead.of(peft.get_peft_model(build("llama"), settings))
    wrong = LMHead(torch.zeros(7, 4), lora=(LoRA(torch.zeros(2, 4), torch.zeros(7, 3)),))
    with pytest.raises(ValueError, match=r"head\.lora\[0\] must have .* V = 7, got \[2, 4\] and \[7, 3\]"):
        linear_logprob(torch.zeros(3, 4), wrong, torch.zeros(3, dtype=torch.int64))
    model = lora("llama")
    model.get_base_model().lm_head.base_layer.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"head\.weight is trained and carries adapters"):
        FusedPreferenceModel(model)(**batch_of(), ref_logps=REFERENCE)


@pytest.mark.parametrize("config", [peft.PrefixTuningConfig, peft.PromptTuningConfig])
def test_virtual_tokens_are_right_or_refused(config: Any) -> None:
    model = peft.get_peft_model(build("llama"), config(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    batch = {**batch_of(), "ref_logps": REFERENCE}
    if config is peft.PromptTuningConfig:
        with pytest.raises(ValueError, match="virtual tokens"):
            FusedPreferenceModel(model)(**batch)
    else:
        assert_same(FusedPreferenceModel(model)(**batch)[0], eager_loss(model, batch, REFERENCE), model)


@pytest.mark.parametrize(("path", "workspace"), [("factorised", 8 << 20), ("two_pass", 256 << 10)])
def test_no_gradient_of_the_weight_and_no_copy(path: str, workspace: int) -> None:
    """Beside the budget: the adapter's gradients, and extended hidden states with theirs. A trained head has dW."""
    vocab, width, rank = 8192, 64, 4
    torch.manual_seed(0)
    hidden, labels = torch.randn(4, 24, width), torch.randint(vocab, (4, 24))
    weight, a, b = torch.randn(vocab, width) / 8, torch.randn(rank, width) / 8, torch.randn(vocab, rank)
    full = weight.clone()
    heads = (LMHead(full), [full]), (LMHead(weight, lora=(LoRA(a, b, 2.0),)), [a, b])
    peaks = []
    for head, trained in heads:
        leaves = [leaf.requires_grad_() for leaf in (hidden, *trained)]
        with TensorMeter() as meter:
            loss, _ = fused_spo_loss(
                hidden, head, labels, loss="dpo", ref_logps=torch.zeros(4), path=path, workspace_bytes=workspace
            )
            torch.autograd.grad(loss, leaves)
        peaks.append(meter.peak)
    assert peaks[0] > weight.nbytes
    own = workspace + b.nbytes + 4 * hidden.nbytes
    assert peaks[1] <= (peaks[0] - weight.nbytes if path == "factorised" else own)
