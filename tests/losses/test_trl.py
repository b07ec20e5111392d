"""The same loss and gradients as TRL's own code, run on a tiny random model."""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 or newer is not installed")
pytest.importorskip("transformers")

from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from spo_kernels import fused_spo_loss
from spo_kernels.losses import build_loss, needs_reference

from .points import as_pairs, differentiate, random_points

VOCAB = 40
DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")
# TRL's loss_type, its other settings, and our hyperparameters of the same name
SETTINGS = {
    "sigmoid": ({"beta": 0.3}, {}),
    "hinge": ({"beta": 0.2}, {}),
    "ipo": ({"beta": 0.5}, {}),
    "exo_pair": ({"beta": 0.3, "label_smoothing": 0.05}, {}),
    "nca_pair": ({"beta": 0.2}, {}),
    "robust": ({"beta": 0.3, "label_smoothing": 0.2}, {}),
    "bco_pair": ({"beta": 0.2}, {}),
    "sppo_hard": ({"beta": 0.1}, {}),
    "aot": ({"beta": 0.2, "label_smoothing": 0.1}, {}),
    "aot_unpaired": ({"beta": 0.2, "label_smoothing": 0.1}, {}),
    "apo_zero": ({"beta": 0.2}, {}),
    "apo_down": ({"beta": 0.2}, {}),
    "discopop": ({"beta": 0.1}, {"discopop_tau": 0.5}),
    "sft": ({}, {}),
    "sigmoid_norm": ({"beta": 1.5}, {}),
}
DIVERGENCE_BASES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")


def make_model(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": 0, "<end>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<end>")


@pytest.fixture(scope="module")
def pairs():
    """Prompts, chosen and rejected responses of different lengths."""
    generator = torch.Generator().manual_seed(0)
    words = [f"w{i}" for i in torch.randint(2, VOCAB, (100,), generator=generator).tolist()]
    rows, used = [], 0
    for lengths in ((3, 2, 5), (2, 6, 1), (4, 3, 3), (1, 5, 4)):
        row = {}
        for key, length in zip(("prompt", "chosen", "rejected"), lengths, strict=True):
            row[key] = ("" if key == "prompt" else " ") + " ".join(words[used : used + length])
            used += length
        rows.append(row)
    return Dataset.from_list(rows)


def run_trl(tokenizer, pairs, folder, **settings):
    """The trainer, its batch, and its loss; gradients are in its model."""
    disable_progress_bars()
    args = DPOConfig(output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, **settings)
    trainer = DPOTrainer(make_model(0), make_model(1), args, train_dataset=pairs, processing_class=tokenizer)
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    return trainer, batch, loss.detach()


def run_ours(objective, batch):
    """Our loss on the same batch, from the hidden states of the same models; gradients are in the model."""
    policy, reference = make_model(0), make_model(1)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    options = {}
    if needs_reference(objective):
        with torch.no_grad():
            hidden = reference.model(**inputs).last_hidden_state
        options = {"ref_hidden": hidden, "ref_head": reference.lm_head.weight}
    hidden = policy.model(**inputs).last_hidden_state
    loss, metrics = fused_spo_loss(hidden, policy.lm_head.weight, labels, loss=objective, shift=True, **options)
    loss.backward()
    return policy, loss.detach(), metrics


def assert_same(trainer, loss, ours, our_loss):
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
    wanted = dict(trainer.model.named_parameters())
    assert any(parameter.grad.abs().max() > 1e-4 for parameter in wanted.values())
    for name, parameter in ours.named_parameters():
        gradient = wanted[name].grad
        error = (parameter.grad - gradient).abs().max()
        assert error <= 2e-5 * gradient.abs().max(), f"{name}.grad: error {error:.3g}"


def our_objective(loss_type, settings, extra, **more):
    renamed = {"tau" if key == "discopop_tau" else key: value for key, value in extra.items()}
    return build_loss(more.pop("name", loss_type), **settings, **renamed, **more)


def test_every_loss_of_trl_has_a_row():
    offered = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))
    assert offered == set(SETTINGS)


@pytest.mark.parametrize("loss_type", SETTINGS)
def test_loss_type(tokenizer, pairs, tmp_path, loss_type):
    settings, extra = SETTINGS[loss_type]
    trainer, batch, loss = run_trl(tokenizer, pairs, tmp_path, loss_type=[loss_type], **settings, **extra)
    ours, our_loss, metrics = run_ours(our_objective(loss_type, settings, extra), batch)
    assert_same(trainer, loss, ours, our_loss)
    if loss_type != "sft":
        for key in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected"):
            theirs = trainer._metrics["train"][key][0]
            assert metrics[key].item() == pytest.approx(theirs, rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss_type", DIVERGENCE_BASES)
def test_f_divergence(tokenizer, pairs, tmp_path, loss_type, divergence):
    settings, extra = SETTINGS[loss_type]
    trainer, batch, loss = run_trl(
        tokenizer,
        pairs,
        tmp_path,
        loss_type=[loss_type],
        f_divergence_type=divergence,
        f_alpha_divergence_coef=0.7,
        **settings,
        **extra,
    )
    objective = our_objective(
        loss_type, settings, extra, name="f_divergence", base=loss_type, divergence=divergence, coefficient=0.7
    )
    ours, our_loss, _ = run_ours(objective, batch)
    assert_same(trainer, loss, ours, our_loss)


def test_mpo(tokenizer, pairs, tmp_path):
    trainer, batch, loss = run_trl(
        tokenizer, pairs, tmp_path, loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]
    )
    ours, our_loss, _ = run_ours(build_loss("mpo"), batch)
    assert_same(trainer, loss, ours, our_loss)


CPO_FORMS = {
    "sigmoid": ("cpo", {"beta": 0.2, "label_smoothing": 0.1, "alpha": 0.0}, {"beta": 0.2, "label_smoothing": 0.1}),
    "hinge": ("cpo", {"beta": 0.05, "form": "hinge", "alpha": 0.0}, {"beta": 0.05}),
    "ipo": ("cpo", {"beta": 0.5, "form": "ipo", "alpha": 0.0}, {"beta": 0.5}),
    "simpo": ("simpo", {"beta": 2.0, "gamma": 0.7}, {"beta": 2.0, "simpo_gamma": 0.7}),
    "alphapo": (
        "alphapo",
        {"beta": 2.5, "gamma": 0.1, "alpha": 0.25},
        {"beta": 2.5, "simpo_gamma": 0.1, "alpha": 0.25, "loss_type": "simpo"},
    ),
}


def trl_log_probs(points, loss_type):
    """What TRL's reference-free trainers pass on: sums, or means per token."""
    logps = as_pairs(points)
    if loss_type in ("sigmoid", "hinge"):
        return logps, logps.chosen, logps.rejected
    return logps, logps.chosen / logps.chosen_lengths, logps.rejected / logps.rejected_lengths


def compare_at_points(objective, theirs, points, logps):
    wanted = theirs, *torch.autograd.grad(theirs.sum(), (logps.chosen, logps.rejected))
    for found, truth in zip(differentiate(objective, as_pairs(points)), wanted, strict=True):
        torch.testing.assert_close(found, truth.detach().to(found.dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", CPO_FORMS)
def test_cpo_trainer(loss_type):
    from trl.experimental.cpo import CPOTrainer

    name, hyperparameters, settings = CPO_FORMS[loss_type]
    defaults = {"alpha": 0.0, "label_smoothing": 0.0, "loss_type": loss_type}
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), **{**defaults, **settings})
    points = random_points()
    logps, chosen, rejected = trl_log_probs(points, loss_type)
    losses, *_ = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    compare_at_points(build_loss(name, **hyperparameters), losses, points, logps)


def test_orpo_trainer():
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=0.3)
    points = random_points()
    logps, chosen, rejected = trl_log_probs(points, "orpo")
    ratio, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    compare_at_points(build_loss("orpo", beta=0.3), -ratio - chosen, points, logps)
