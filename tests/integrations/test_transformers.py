"""Hidden states and the fused model against the models' own logits, alone and in the wrappers of training."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import SIZES

from spo_kernels import LMHead, Sparsity, linear_logprob
from spo_kernels.extras.token_weights import ld_dpo_weights
from spo_kernels.integrations.layout import lay_pairs
from spo_kernels.integrations.transformers import FusedPreferenceModel, PairCollator, hidden_states
from spo_kernels.losses import DPO, SPO
from spo_kernels.sparsity import of_next_batch

tf = pytest.importorskip("transformers")

DEEP = {**SIZES, "num_hidden_layers": 2}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
GPT2 = {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.3}
CONFIGS = {
    "llama": (tf.LlamaConfig, DEEP),
    "tied": (tf.LlamaConfig, {**DEEP, "tie_word_embeddings": True}),
    "gemma2": (tf.Gemma2Config, {**DEEP, "final_logit_softcapping": 3.0}),
    "cohere": (tf.CohereConfig, {**DEEP, "logit_scale": 0.25}),
    "granite": (tf.GraniteConfig, {**DEEP, "logits_scaling": 4.0}),
    "gpt2": (tf.GPT2Config, {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "mixtral": (tf.MixtralConfig, {**DEEP, **EXPERTS}),
}
PAIRS = [
    {"prompt_ids": [1, 5, 9], "chosen_ids": [7, 8, 2], "rejected_ids": [11, 2]},
    {"prompt_ids": [1, 4], "chosen_ids": [30, 2], "rejected_ids": [31, 32, 33, 34, 2]},
    {"prompt_ids": [1, 40, 41, 42], "chosen_ids": [2], "rejected_ids": [50, 51]},
]
REFERENCE = torch.tensor([-9.0, -8.0, -4.0, -7.0, -16.0, -8.0])


def build(name: str, seed: int = 0) -> Any:
    kind, settings = CONFIGS[name]
    torch.manual_seed(seed)
    return tf.AutoModelForCausalLM.from_config(kind(**settings))


def batch_of(records: list[dict[str, list[int]]] = PAIRS) -> dict[str, torch.Tensor]:
    return PairCollator(0)(records)


def full_logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sums `[2B]` by the model's own logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    logp = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return (logp * (labels != -100)).sum(-1)


def lora(model: Any, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    names = {"gpt2": ["c_attn"]}.get(model.config.model_type, ["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM", **settings))
    for key, parameter in wrapped.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    return wrapped


@pytest.mark.parametrize("adapted", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_with_the_head_they_give_the_models_own_logits(name: str, adapted: bool) -> None:
    model = build(name)
    model = (lora(model) if adapted else model).eval()
    batch = batch_of()
    labels = batch.pop("labels")
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *given: seen.append(given[2].shape))
    hidden = hidden_states(model, **batch)
    hook.remove()
    assert seen == [(6, 1, 61)], "the head runs on the last position"
    logp = linear_logprob(hidden, LMHead.of(model), labels, shift=True)
    torch.testing.assert_close(logp.sum(-1), full_logits(model, {**batch, "labels": labels}), rtol=1e-4, atol=1e-5)


class Shifted(tf.LlamaForCausalLM):  # type: ignore[misc]
    """Its logits are not what its configuration says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


def test_logits_that_are_not_the_heads_are_refused() -> None:
    """A scale in place, a cap, and padding that is cut."""
    changes = {
        "differ by": [lambda x: x.mul_(1.1), lambda x: 5 * torch.tanh(x / 5)],
        "cuts its 61 logits to 60": [lambda x: x[..., :60]],
    }
    for said, some in changes.items():
        for change in some:
            torch.manual_seed(0)
            model = Shifted(tf.LlamaConfig(**DEEP))
            model.change = change
            with pytest.raises(ValueError, match=f"^Shifted.*{said}"):
                FusedPreferenceModel(model, "dpo")(**batch_of(), ref_logps=REFERENCE)


def test_left_padding_and_positions() -> None:
    model = build("llama").eval()
    ids, mask = torch.tensor([[0, 0, 1, 5, 7]]), torch.tensor([[0, 0, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 2]])
    padded = hidden_states(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(padded[:, 2:], hidden_states(model, input_ids=ids[:, 2:]), rtol=1e-4, atol=1e-5)


def test_through_ddp_and_compile() -> None:
    model = build("gemma2").eval()
    batch = batch_of()
    del batch["labels"]
    expected = hidden_states(model, **batch)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for outer in (wrapped, torch.compile(model), torch.compile(wrapped)):
            torch.testing.assert_close(hidden_states(outer, **batch), expected, rtol=0, atol=0)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("loss", [DPO(beta=0.3), SPO(DPO(beta=0.3), weight=0.5)], ids=["dpo", "spo"])
def test_loss_and_gradients_are_those_of_full_logits(name: str, loss: Any) -> None:
    models, batch = [build(name), build(name)], batch_of()
    ours, metrics = FusedPreferenceModel(models[0], loss)(**batch, ref_logps=REFERENCE)
    sums = full_logits(models[1], batch)
    chosen, rejected = sums.chunk(2)
    margin = chosen - rejected - (REFERENCE[:3] - REFERENCE[3:])
    theirs = -F.logsigmoid(0.3 * margin)
    if isinstance(loss, SPO):
        lengths = (batch["labels"][:3, 1:] != -100).sum(-1)
        theirs = theirs - 0.5 * chosen / lengths
    theirs = theirs.mean()
    if name == "mixtral":
        given = {key: batch[key] for key in ("input_ids", "attention_mask")}
        router_loss = models[1](**given, output_router_logits=True).aux_loss
        torch.testing.assert_close(metrics["aux_loss"], router_loss.detach())
        theirs = theirs + 0.5 * router_loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["logps/chosen"], chosen.detach().mean(), rtol=1e-4, atol=1e-5)
    for value in (ours, theirs):
        value.backward()
    theirs_by_name = dict(models[1].named_parameters())
    for key, parameter in models[0].named_parameters():
        expected = theirs_by_name[key].grad
        scale = float(expected.abs().max())
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5 * scale + 1e-7, msg=key)


def test_options_that_are_the_same_for_each_call() -> None:
    """ld_alpha makes the token weights, "sum" counts the auxiliary loss for each pair, "unbiased" draws each time."""
    model, batch = build("mixtral").eval(), {**batch_of(), "ref_logps": REFERENCE}
    weights = ld_dpo_weights(batch["labels"], 0.5, shift=True)
    mean, _ = FusedPreferenceModel(model)(**batch, token_weights=weights)
    total, metrics = FusedPreferenceModel(model, ld_alpha=0.5, reduction="sum", pair_logps=True)(**batch)
    torch.testing.assert_close(total, 3 * mean)
    assert not torch.isclose(mean, FusedPreferenceModel(model)(**batch)[0], rtol=1e-3)
    torch.testing.assert_close(metrics["pair_logps"][:3].mean(), metrics["logps/chosen"])
    sparse = FusedPreferenceModel(model, sparsity=Sparsity("unbiased", 0.9))
    assert "sparsity/kept" in sparse.train()(**batch)[1] and "sparsity/kept" not in sparse.eval()(**batch)[1]
    seeds = [of_next_batch(Sparsity("unbiased"), training=True).seed for _ in range(2)]
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_gradients_that_are_written_once(name: str) -> None:
    """Three micro-batches; a tied weight also has the embedding's gradient."""
    models = [build(name), build(name)]
    for model, accumulate in zip(models, (True, False), strict=True):
        policy = FusedPreferenceModel(model, "simpo", accumulate=accumulate)
        for pair in PAIRS:
            policy(**batch_of([pair]))[0].backward()
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5 * float(theirs.grad.abs().max()))


def test_where_the_reference_comes_from() -> None:
    """Adapters off, another model, and sums that were computed before: one loss."""
    base, adapted = build("llama").eval(), lora(build("llama"), lora_dropout=0.5).eval()
    batch = batch_of()
    sums = full_logits(base, batch).detach()
    losses = [
        FusedPreferenceModel(adapted, "dpo")(**batch, ref_logps=sums)[0],
        FusedPreferenceModel(adapted, "dpo", reference="adapters_off")(**batch)[0],
        FusedPreferenceModel(adapted, "dpo", reference=base)(**batch)[0],
    ]
    assert not torch.isclose(losses[0], torch.tensor(2.0).log(), atol=1e-3)
    for reference in ("adapters_off", base):
        with pytest.raises(ValueError, match="either ref_logps or, where the module is made, reference=, not both"):
            FusedPreferenceModel(adapted, "dpo", reference=reference)(**batch, ref_logps=sums)
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-4, atol=1e-6)
    module = FusedPreferenceModel(adapted, "dpo", reference=base)
    assert not any(p.requires_grad for p in base.parameters())
    assert len(list(module.parameters())) == len(list(adapted.parameters()))


@pytest.mark.parametrize("own", [True, False], ids=["adapters off", "another model"])
def test_the_reference_has_no_dropout_and_training_mode_comes_back(own: bool) -> None:
    adapted = lora(build("llama"), lora_dropout=0.9)
    other = lora(build("llama"), lora_dropout=0.9).train()
    module = FusedPreferenceModel(adapted, "dpo", reference="adapters_off" if own else other).train()
    laid = lay_pairs(adapted, **batch_of())
    references = [module._reference_inputs(laid)["ref_hidden"] for _ in range(2)]
    assert torch.equal(*references) and adapted.training


def test_errors_name_what_to_do() -> None:
    model = build("llama")
    batch = batch_of()
    with pytest.raises(ValueError, match="labels belong to the loss"):
        hidden_states(model, **batch)
    with pytest.raises(TypeError, match="with a head, got LlamaModel"):
        hidden_states(model.model, input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match='"adapters_off" needs a PEFT model, got LlamaForCausalLM'):
        FusedPreferenceModel(model, reference="adapters_off")
    with pytest.raises(ValueError, match='reference must be "adapters_off", a model or None'):
        FusedPreferenceModel(model, reference="base")
    with pytest.raises(ValueError, match="a model or None, got True"):
        FusedPreferenceModel(model, reference=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reference is the model itself"):
        FusedPreferenceModel(model, reference=model)
    assert model.training and all(p.requires_grad for p in model.parameters())
    with pytest.raises(TypeError, match="takes no wokspace; its options are layout, accumulate, ld_alpha, sparsity"):
        FusedPreferenceModel(model, wokspace=3)
    with pytest.raises(TypeError, match="pad_token_id must be an int, got None"):
        PairCollator(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass ref_logps, or make the module with reference="):
        FusedPreferenceModel(model, "dpo")(**batch)
    with pytest.raises(TypeError, match="positional"):  # transformers' order, with the mask second
        FusedPreferenceModel(model, "dpo")(batch["input_ids"], batch["attention_mask"], batch["labels"])
    for layout in ("padded", "shared"):
        module, rows = FusedPreferenceModel(model, "dpo", layout=layout), list(batch["labels"].shape)
        with pytest.raises(ValueError, match=re.escape(f"ref_logps must have shape [6] or {rows}, got [3, 2]")):
            module(**batch, ref_logps=REFERENCE.view(3, 2))
    assert FusedPreferenceModel(model, "simpo")(**batch)[0].isfinite()
    short = {**batch, "attention_mask": batch["attention_mask"][:, :-1]}
    with pytest.raises(ValueError, match=r"attention_mask must have input_ids' shape \[6, \d+\], got \[6, \d+\]"):
        FusedPreferenceModel(model, "simpo")(**short)
    with pytest.raises(ValueError, match="loss = 'dpp' is unknown"):
        FusedPreferenceModel(model, "dpp")
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(build("llama"), peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="virtual tokens"):
        hidden_states(tuned, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def test_shifted_labels_are_noticed_once(recwarn: pytest.WarningsRecorder) -> None:
    module, batch = FusedPreferenceModel(build("llama"), "simpo"), batch_of()
    module(**batch)
    assert not [w for w in recwarn if "look shifted" in str(w.message)]
    shifted = {**batch, "labels": batch["labels"].roll(-1, 1)}
    module = FusedPreferenceModel(build("llama"), "simpo")
    for _ in range(2):
        module(**shifted)
    assert len([w for w in recwarn if "look shifted" in str(w.message)]) == 1


def test_labels_of_which_none_counts_are_noticed(recwarn: pytest.WarningsRecorder) -> None:
    batch = batch_of()
    for labels, said in ((batch["labels"], 0), (torch.full_like(batch["labels"], -100), 1)):
        module = FusedPreferenceModel(build("llama"), "simpo")
        module(**{**batch, "labels": labels})
        assert len([w for w in recwarn if "no label counts in this batch" in str(w.message)]) == said


def test_labels_on_padding_are_noticed(recwarn: pytest.WarningsRecorder) -> None:
    """A row without padding has no place for them, so the layouts' losses would differ in silence."""
    batch = batch_of()
    for labels, said in ((batch["labels"], 0), (batch["input_ids"], 1)):
        FusedPreferenceModel(build("llama"), "simpo")(**{**batch, "labels": labels})
        assert len([w for w in recwarn if "where attention_mask is 0" in str(w.message)]) == said
