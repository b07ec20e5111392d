"""fused_spo_loss where there is little to learn from, and its part in autograd."""

import pytest
import torch
from loss_oracle import (
    FORMULAS,
    HIDDEN,
    METRICS,
    PAIRS,
    TOKENS,
    VOCAB,
    assert_near,
    expected,
    logsigmoid,
    make_batch,
    make_reference,
    make_value,
    oracle_sums,
    pack,
    run,
)

from spo_kernels import fused_spo_loss
from spo_kernels.losses import SPO, PairLogps
from spo_kernels.testing import random_batch

# ---- nothing to learn from


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("layout", ["padded", "packed", "padded-no-tokens"])
def test_empty_batch(backend, layout, reduction):
    shape = {"padded": (0, 5), "packed": (0,), "padded-no-tokens": (0, 0)}[layout]
    batch = random_batch(shape, VOCAB, HIDDEN)
    options = dict(cu_seqlens=torch.zeros(1, dtype=torch.int64)) if layout == "packed" else {}
    loss, d_hidden, d_weight, metrics = run(
        batch, ref_logps=torch.zeros(0), reduction=reduction, backend=backend, **options
    )
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert loss.sum() == 0
    assert d_hidden.shape == batch.hidden.shape
    assert d_weight.shape == batch.weight.shape and not d_weight.any()
    assert metrics.keys() >= METRICS and all(value.shape == () for value in metrics.values())


@pytest.mark.parametrize("name", ["dpo", "spo", "spo-sum", "hinge-reference", "hinge-input"])
@pytest.mark.parametrize("empty", ["chosen", "rejected", "both"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_zero_length_responses(backend, name, empty, layout):
    """They have log-probability 0 and a mean NLL of 0, and no NaN reaches the other pairs."""
    objective, _ = FORMULAS[name]
    batch = make_batch()
    rows = {"chosen": [1], "rejected": [1 + PAIRS], "both": [1, 1 + PAIRS]}[empty]
    batch.labels[rows] = -100
    reference = make_reference(batch)
    reference[rows] = 0.0
    options = dict(
        ref_logps=reference, pair_inputs={"spo_value": make_value()}, loss=objective, reduction="none", backend=backend
    )
    if layout == "packed":
        packed, bounds, _ = pack(batch, keep_ignored=False)
        loss, d_hidden, d_weight, metrics = run(packed, cu_seqlens=bounds, **options)
    else:
        loss, d_hidden, d_weight, metrics = run(batch, **options)
        assert not d_hidden[rows].any()
    assert loss.isfinite().all() and d_hidden.isfinite().all() and d_weight.isfinite().all()
    assert all(value.isfinite() for value in metrics.values())
    p_w, p_l = oracle_sums(batch).chunk(2)
    q_w, q_l = reference.double().chunk(2)
    margin = (p_w - q_w - p_l + q_l)[1]
    if empty == "both":
        assert margin == 0
    beta = getattr(objective, "beta", None) or objective.base.beta
    penalty = torch.zeros((), dtype=torch.float64)
    if empty == "rejected" and name != "dpo":
        size = (batch.labels[1] != -100).sum() if objective.normalization == "mean" else 1
        nll = -p_w[1] / size
        v = {"reference": -q_w[1] / size, "input": make_value()[1].double()}[objective.value]
        penalty = nll if objective.penalty == "nll" else (nll - v - objective.epsilon).clamp(min=0)
        penalty = objective.weight * penalty
    elif name == "hinge-input":
        penalty = (0 - make_value()[1].double()).clamp(min=0)
    assert_near(loss[1], -logsigmoid(beta * margin) + penalty, "loss")


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_all_ignored(backend, layout):
    batch = make_batch()
    batch.labels.fill_(-100)
    options = dict(ref_logps=torch.zeros(2 * PAIRS), token_metrics=True, backend=backend)
    if layout == "packed":
        batch, options["cu_seqlens"], _ = pack(batch, keep_ignored=True)
    loss, d_hidden, d_weight, metrics = run(batch, **options)
    assert_near(loss, torch.tensor(2.0).log().double(), "loss")
    assert not d_hidden.any() and not d_weight.any()
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["dpo", "spo", "hinge-reference", "hinge-input"])
@pytest.mark.parametrize("where", ["policy-chosen", "policy-rejected", "reference-chosen", "reference-rejected"])
def test_non_finite_input_gives_a_non_finite_loss(backend, value, name, where):
    """Never a finite loss that is silently wrong, in the hinge's clamp either."""
    objective, _ = FORMULAS[name]
    batch = make_batch()
    row = 0 if where.endswith("-chosen") else PAIRS
    hidden = {"policy": batch.hidden.clone(), "reference": batch.hidden.clone()}
    hidden[where.split("-")[0]][row, 1, 2] = value
    loss, metrics = fused_spo_loss(
        hidden["policy"],
        batch.weight,
        batch.labels,
        ref_hidden=hidden["reference"],
        ref_head=batch.weight,
        pair_inputs={"spo_value": make_value()},
        loss=objective,
        backend=backend,
    )
    assert not loss.isfinite()
    assert not metrics["loss"].isfinite()


@pytest.mark.parametrize(("penalty", "where"), [("nll", "chosen"), ("hinge", "chosen"), ("hinge", "spo_value")])
def test_penalty_lets_nan_through(penalty, where):
    """On a base that never looks at it: a clamp must not turn NaN into 0."""
    ones = torch.ones(2)
    values = {"chosen": -5 * ones, "rejected": ones, "ref_chosen": ones, "ref_rejected": ones, "spo_value": ones}
    values[where] = torch.tensor([torch.nan, -5.0])
    lengths = torch.tensor([3, 3])
    inputs = {"spo_value": values.pop("spo_value")}
    pairs = PairLogps(**values, chosen_lengths=lengths, rejected_lengths=lengths, inputs=inputs)
    losses = SPO(base=lambda pairs: pairs.rejected, penalty=penalty, value="input")(pairs)
    assert losses[0].isnan() and losses[1].isfinite()


# ---- autograd and layout


def test_gradients_accumulate_and_scale(backend):
    batch = make_batch()
    reference = make_reference(batch)
    once = run(batch, ref_logps=reference, backend=backend)
    weight = batch.weight.clone().requires_grad_()
    for factor in (1.0, 2.0):
        loss, _ = fused_spo_loss(batch.hidden, weight, batch.labels, ref_logps=reference, backend=backend)
        (factor * loss).backward()
    assert_near(weight.grad, 3 * once[2].double(), "weight.grad")


@pytest.mark.parametrize("trained", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "weight")], ids="-".join)
def test_each_part_alone(backend, trained):
    batch = make_batch(bias=True)
    reference = make_reference(batch)
    leaves = {name: getattr(batch, name).requires_grad_(name in trained) for name in ("hidden", "weight", "bias")}
    loss, _ = fused_spo_loss(batch.hidden, batch.head(), batch.labels, ref_logps=reference, backend=backend)
    truth = expected(FORMULAS["spo"][1], batch, reference)
    assert_near(loss.detach(), truth[0], "loss")
    assert loss.requires_grad == bool(trained)
    if trained:
        loss.backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in trained), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation(backend, mode):
    batch = make_batch()
    reference = make_reference(batch)
    batch.hidden.requires_grad_()
    with mode():
        loss, _ = fused_spo_loss(
            batch.hidden, batch.weight, batch.labels, ref_logps=reference, token_metrics=True, backend=backend
        )
    assert not loss.requires_grad
    assert_near(loss, expected(FORMULAS["spo"][1], batch, reference)[0], "loss")


def test_same_bits_again(backend):
    batch = make_batch()
    first, second = (run(batch, ref_logps=make_reference(batch), backend=backend) for _ in range(2))
    assert all(torch.equal(*both) for both in zip(first[:3], second[:3], strict=True))
    assert all(torch.equal(first[3][key], second[3][key]) for key in first[3])


def test_poisoned_buffers(backend, poisoned_buffers):
    batch = make_batch()
    batch.labels[2] = -100
    other = random_batch((2 * PAIRS, TOKENS), VOCAB, HIDDEN, seed=3)
    loss, d_hidden, d_weight, metrics = run(
        batch, ref_hidden=other.hidden, ref_head=other.weight, token_metrics=True, backend=backend
    )
    for value in (loss, d_hidden, d_weight, *metrics.values()):
        assert value.isfinite().all()


def test_autocast(backend):
    batch = make_batch()
    reference = make_reference(batch)
    low = fused_spo_loss(
        batch.hidden.bfloat16(), batch.weight.bfloat16(), batch.labels, ref_logps=reference, backend=backend
    )
    with torch.autocast("cpu", torch.bfloat16):
        mixed = fused_spo_loss(
            batch.hidden.bfloat16(), batch.weight, batch.labels, ref_logps=reference, backend=backend
        )
    assert mixed[0].dtype == torch.float32
    assert torch.equal(mixed[0], low[0])
