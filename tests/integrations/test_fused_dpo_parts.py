"""`FusedDPOTrainer` computes a batch in several forwards: what stays as it was, and what is not split."""

import copy

import pytest
import torch

pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 or newer is not installed")
from spo_kernels.engine.kept import HeadLater
from spo_kernels.integrations import token_batches, trl

from .same_run import assert_same
from .test_fused_dpo_settings import HINGE, batch_of, trainer
from .tiny import Run, dataset, make_model


@pytest.mark.parametrize(
    ("layout", "tokens", "asked"), [("auto", 26, True), ("packed", 40, True), ("padded", 50, True), ("auto", 26, False)]
)
def test_a_budget_of_tokens_leaves_gradient_and_metrics_as_they_are(tmp_path, monkeypatch, layout, tokens, asked):
    """Forwards of one, two or three pairs of four; the reference's as well, columns of the data beside them.

    A CPU has a budget where none was asked for, which may be less than a pair's tokens.
    """
    data = dataset("pairs").add_column("offset", [0.25 * i for i in range(16)])
    settings = {"library": trl, "data": data, "objective": "odpo", "layout": layout, "steps": 3}
    whole = Run("FusedDPO", "llama", tmp_path, **settings)
    if not asked:
        monkeypatch.setattr(token_batches, "CPU_TOKENS", tokens)
    split = Run("FusedDPO", "llama", tmp_path, **settings, **({"tokens_per_batch": tokens} if asked else {}))
    assert len(whole.losses) == 3 and len(split.losses) > 3
    shares = [loss / sum(split.losses) for loss in split.losses]
    assert max(shares) > 1.2 * min(shares)
    split.losses = whole.losses
    assert_same(split, whole)
    if not asked:
        return
    with pytest.raises(ValueError, match=r"tokens_per_batch = 3: a forward of 3 tokens does not hold the longest"):
        Run("FusedDPO", "llama", tmp_path, tokens_per_batch=3, **settings)


def test_parts_of_a_batch_add_to_one_gradient_of_the_head(tmp_path, monkeypatch):
    """All but the first; but where something waits for the gradient of each, none."""
    monkeypatch.setattr(token_batches, "CPU_TOKENS", 1)
    added, later = [], HeadLater.__call__

    def noted(self, head_out, factor):
        added.append(head_out.adds)
        later(self, head_out, factor)

    monkeypatch.setattr(HeadLater, "__call__", noted)
    gradients, seen = [], []
    for hooked in (False, True):
        made = trainer(tmp_path)
        made.current_gradient_accumulation_steps = 1  # what `train` sets
        weight = made.model.get_output_embeddings().weight
        if hooked:
            weight.register_hook(seen.append)
        made.training_step(made.model, batch_of(made))
        gradients.append(weight.grad)
    assert added == [True] * 3 and len(seen) == 4
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_padding_in_front_is_no_token_of_a_part(tmp_path, monkeypatch):
    """GPT-2 counts it in its positions: a part has the columns in front that the whole batch has."""
    model = make_model("gpt2")
    losses = []
    for tokens in (10**6, 1):
        monkeypatch.setattr(token_batches, "CPU_TOKENS", tokens)
        made = trainer(tmp_path, model=copy.deepcopy(model))
        made.current_gradient_accumulation_steps = 1
        batch = batch_of(made)
        real = batch["attention_mask"].bool()
        for name, value in batch.items():
            moved = torch.zeros_like(value)
            moved[real.flip(-1)] = value[real]
            batch[name] = moved
        losses.append(made.training_step(made.model, batch).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_an_optimizer_in_a_hook_takes_a_step_a_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(token_batches, "CPU_TOKENS", 1)
    steps = []
    for tokens in (None, 40):
        made = trainer(tmp_path, tokens_per_batch=tokens)
        made.current_gradient_accumulation_steps = 1
        made.model.get_output_embeddings().weight.register_post_accumulate_grad_hook(steps.append)
        if tokens is None:
            made.training_step(made.model, batch_of(made))
            assert len(steps) == 1
            continue
        with pytest.raises(ValueError, match="tokens_per_batch makes several backwards of a batch, and a hook"):
            made.training_step(made.model, batch_of(made))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"objective": "bco"}),
        ("llama", {"objective": "spo", "objective_args": HINGE, "spo_inner_steps": 1, "spo_inner_lr": 0.1}),
        ("mixtral", {}),
    ],
    ids=["coupled", "inner-steps", "router"],
)
def test_what_depends_on_a_forward_is_not_split_on_a_cpu(tmp_path, monkeypatch, kind, settings):
    monkeypatch.setattr(token_batches, "CPU_TOKENS", 1)
    run = Run("FusedDPO", kind, tmp_path, library=trl, steps=2, **settings)
    assert len(run.losses) == 2
