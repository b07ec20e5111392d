"""fused_spo_loss and sequence_logps against the formulas spelled out once more, in float64, with full logits."""

import dataclasses
import itertools

import pytest
import torch

from spo_kernels import fused_spo_loss, linear_logprob, sequence_logps
from spo_kernels.losses import DPO, LOSSES, SPO, PairLogps, build_loss
from spo_kernels.testing import Batch, eager_logprob, random_batch, worst_error

METRICS = {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
}
PAIRS, TOKENS, VOCAB, HIDDEN = 3, 7, 43, 16


def logsigmoid(x):
    return -torch.log1p(torch.exp(-x))


# Each objective, and the same thing from METHODS.md as a function of
# p_w, p_l, q_w, q_l (sums), n_w (tokens) and v (the lower level's value), in float64.
FORMULAS = {
    "dpo": (DPO(), lambda p_w, p_l, q_w, q_l, n_w, v: -logsigmoid(0.1 * (p_w - q_w - (p_l - q_l)))),
    "dpo-beta": (DPO(beta=0.7), lambda p_w, p_l, q_w, q_l, n_w, v: -logsigmoid(0.7 * (p_w - q_w - (p_l - q_l)))),
    "dpo-reference-free": (
        DPO(beta=0.3, reference_free=True),
        lambda p_w, p_l, q_w, q_l, n_w, v: -logsigmoid(0.3 * (p_w - p_l)),
    ),
    "spo": (SPO(), lambda p_w, p_l, q_w, q_l, n_w, v: -logsigmoid(0.1 * (p_w - q_w - p_l + q_l)) - p_w / n_w),
    "spo-sum": (
        SPO(DPO(beta=0.5), weight=0.2, normalization="sum"),
        lambda p_w, p_l, q_w, q_l, n_w, v: -logsigmoid(0.5 * (p_w - q_w - p_l + q_l)) - 0.2 * p_w,
    ),
    "spo-reference-free": (
        SPO(DPO(beta=0.5, reference_free=True), weight=0.2),
        lambda p_w, p_l, q_w, q_l, n_w, v: -logsigmoid(0.5 * (p_w - p_l)) - 0.2 * p_w / n_w,
    ),
    "hinge-reference": (
        SPO(DPO(), weight=2.0, penalty="hinge", epsilon=0.05),
        lambda p_w, p_l, q_w, q_l, n_w, v: (
            -logsigmoid(0.1 * (p_w - q_w - p_l + q_l)) + 2 * (-p_w / n_w + q_w / n_w - 0.05).clamp(min=0)
        ),
    ),
    "hinge-reference-sum": (
        SPO(DPO(), weight=2.0, penalty="hinge", epsilon=0.3, normalization="sum"),
        lambda p_w, p_l, q_w, q_l, n_w, v: (
            -logsigmoid(0.1 * (p_w - q_w - p_l + q_l)) + 2 * (-p_w + q_w - 0.3).clamp(min=0)
        ),
    ),
    "hinge-input": (
        SPO(DPO(), penalty="hinge", value="input"),
        lambda p_w, p_l, q_w, q_l, n_w, v: -logsigmoid(0.1 * (p_w - q_w - p_l + q_l)) + (-p_w / n_w - v).clamp(min=0),
    ),
    "users-own": (
        lambda pairs: (pairs.chosen / pairs.chosen_lengths - pairs.rejected / 7 - 1).square(),
        lambda p_w, p_l, q_w, q_l, n_w, v: (p_w / n_w - p_l / 7 - 1) ** 2,
    ),
}
each_objective = pytest.mark.parametrize(("objective", "formula"), FORMULAS.values(), ids=FORMULAS)


def make_batch(dtype=torch.float32, **options):
    batch = random_batch((2 * PAIRS, TOKENS), VOCAB, HIDDEN, dtype=dtype, ignored=0.25, **options)
    batch.labels[:, 1] = 3  # every sequence has a token
    return batch


def make_reference(batch):
    """Near the policy: each hinge is on for some pairs and off for others, and so is each accuracy."""
    return oracle_sums(batch).detach().float() + torch.tensor([1.5, -2.0, 0.5, -0.5, 1.0, 3.0])


def make_value():
    return torch.tensor([3.0, 4.0, 5.0])


def oracle_sums(batch, **options):
    return eager_logprob(**vars(batch.to(torch.float64)), dtype=torch.float64, **options).sum(-1)


def expected(formula, batch, reference, *, value=None, reduction="mean", **options):
    """Loss, gradients and metrics' ingredients from float64 logits."""
    doubles = batch.to(torch.float64)
    leaves = {name: getattr(doubles, name).detach().clone().requires_grad_() for name in ("hidden", "weight")}
    logp = eager_logprob(labels=batch.labels, bias=doubles.bias, dtype=torch.float64, **leaves, **options)
    counted = batch.labels != options.get("ignore_index", -100)
    if options.get("shift"):
        counted[:, 0] = False
    p_w, p_l = logp.sum(-1).chunk(2)
    q_w, q_l = (0 * p_w.detach(),) * 2 if reference is None else reference.double().chunk(2)
    n_w, _ = counted.sum(-1).chunk(2)
    per_pair = formula(p_w, p_l, q_w, q_l, n_w, None if value is None else value.double())
    loss = {"mean": per_pair.mean, "sum": per_pair.sum, "none": lambda: per_pair}[reduction]()
    loss.sum().backward()
    return loss.detach(), leaves["hidden"].grad, leaves["weight"].grad, (p_w.detach(), p_l.detach(), q_w, q_l)


def run(batch, **options):
    leaves = {name: getattr(batch, name).detach().clone().requires_grad_() for name in ("hidden", "weight")}
    loss, metrics = fused_spo_loss(labels=batch.labels, bias=batch.bias, **leaves, **options)
    loss.sum().backward()
    return loss.detach(), leaves["hidden"].grad, leaves["weight"].grad, metrics


def assert_near(found, truth, name, dtype=torch.float32):
    """Within eight roundings of the largest element: sums of a few dozen float32 terms."""
    assert found.shape == truth.shape, name
    scale = 1 + (truth.abs().max().item() if truth.numel() else 0.0)
    error = worst_error(found, truth)
    assert error <= 16 * scale * torch.finfo(dtype).eps, f"{name}: error {error:.3g}, largest {scale:.3g}"


def pack(batch, *, keep_ignored):
    """Rows of a padded batch end to end, with or without the ignored ones, and the bounds."""
    keep = torch.ones_like(batch.labels, dtype=torch.bool) if keep_ignored else batch.labels != -100
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(-1).cumsum(0)])
    return Batch(batch.hidden[keep], batch.weight, batch.labels[keep], batch.bias), bounds, keep


# ---- the objectives


@each_objective
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_formula(backend, objective, formula, reduction):
    batch, value = make_batch(), make_value()
    reference = make_reference(batch)
    loss, d_hidden, d_weight, metrics = run(
        batch, loss=objective, ref_logps=reference, spo_value=value, reduction=reduction, backend=backend
    )
    truth = expected(formula, batch, reference, value=value, reduction=reduction)
    assert loss.dtype == torch.float32
    assert_near(loss, truth[0], "loss")
    assert_near(d_hidden, truth[1], "hidden.grad")
    assert_near(d_weight, truth[2], "weight.grad")
    assert metrics.keys() >= METRICS


def test_each_hinge_is_on_and_off():
    """The table above would prove little about a hinge that never closes."""
    batch = make_batch()
    p_w, _ = oracle_sums(batch).chunk(2)
    q_w, _ = make_reference(batch).double().chunk(2)
    n_w = (batch.labels[:PAIRS] != -100).sum(-1)
    for gap in (-p_w / n_w + q_w / n_w - 0.05, -p_w + q_w - 0.3, -p_w / n_w - make_value()):
        assert (gap > 0).any() and (gap < 0).any()


@each_objective
@pytest.mark.parametrize("keep_ignored", [True, False], ids=["with-prompts", "responses-only"])
def test_packed(backend, objective, formula, keep_ignored):
    batch, value = make_batch(bias=True), make_value()
    reference = make_reference(batch)
    packed, bounds, keep = pack(batch, keep_ignored=keep_ignored)
    loss, d_hidden, d_weight, metrics = run(
        packed, loss=objective, ref_logps=reference, spo_value=value, cu_seqlens=bounds, backend=backend
    )
    truth = expected(formula, batch, reference, value=value)
    assert_near(loss, truth[0], "loss")
    assert_near(d_hidden, truth[1][keep], "hidden.grad")
    assert_near(d_weight, truth[2], "weight.grad")
    assert_near(metrics["logps/chosen"], truth[3][0].mean(), "logps/chosen")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["dpo", "spo"])
def test_sixteen_bit_inputs(backend, dtype, name):
    objective, formula = FORMULAS[name]
    batch = make_batch(dtype)
    reference = make_reference(batch)
    loss, d_hidden, d_weight, metrics = run(batch, loss=objective, ref_logps=reference, backend=backend)
    truth = expected(formula, batch, reference)
    assert loss.dtype == torch.float32 and d_hidden.dtype == d_weight.dtype == dtype
    assert_near(loss, truth[0], "loss")
    assert_near(metrics["logps/rejected"], truth[3][1].mean(), "logps/rejected")
    for found, wanted in ((d_hidden, truth[1]), (d_weight, truth[2])):
        assert worst_error(found, wanted) <= 2 * torch.finfo(dtype).eps * wanted.abs().max()


OPTIONS = {
    "shift": dict(shift=True),
    "scale-and-softcap": dict(logit_scale=0.5, logit_softcap=3.0),
    "ignore-index": dict(ignore_index=3),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("workspace_bytes", [5_000, None])
def test_options_reach_the_primitive(backend, options, workspace_bytes):
    batch = make_batch(bias=True)
    batch.labels[batch.labels == -100] = options.get("ignore_index", -100)
    reference = make_reference(make_batch())
    objective, formula = FORMULAS["spo-sum"]
    loss, d_hidden, d_weight, _ = run(
        batch, loss=objective, ref_logps=reference, workspace_bytes=workspace_bytes, backend=backend, **options
    )
    truth = expected(formula, batch, reference, **options)
    assert_near(loss, truth[0], "loss")
    assert_near(d_hidden, truth[1], "hidden.grad")
    assert_near(d_weight, truth[2], "weight.grad")


def test_names_and_objects_are_the_same(backend):
    batch = make_batch()
    options = dict(ref_logps=make_reference(batch), backend=backend)
    for name, objective in (("dpo", DPO()), ("spo", SPO())):
        by_name, by_object = run(batch, loss=name, **options), run(batch, loss=objective, **options)
        assert all(torch.equal(*both) for both in zip(by_name[:3], by_object[:3], strict=True))
    assert torch.equal(run(batch, **options)[0], run(batch, loss="spo", **options)[0]), "spo is the default"


def test_extreme_margins(backend):
    """A margin of -1e5 nat: the loss is linear there, not infinite, and the gradient finite."""
    batch = make_batch()
    for sign in (1, -1):
        reference = sign * torch.tensor([1e5] * PAIRS + [-1e5] * PAIRS)
        loss, d_hidden, d_weight, _ = run(batch, loss=DPO(beta=0.5), ref_logps=reference, backend=backend)
        assert loss.isfinite() and d_hidden.isfinite().all() and d_weight.isfinite().all()
        assert abs(loss - (1e5 if sign > 0 else 0.0)) < 20


# ---- the reference


def test_reference_from_hidden_states(backend):
    """Another model: its own width and bias; evaluated in the call, without gradient."""
    batch = make_batch()
    other = random_batch((2 * PAIRS, TOKENS), VOCAB, 9, bias=True, seed=3)
    for tensor in (other.hidden, other.weight, other.bias):
        tensor.requires_grad_()
    sums = oracle_sums(Batch(other.hidden, other.weight, batch.labels, other.bias)).detach()
    objective, formula = FORMULAS["hinge-reference"]
    options = dict(ref_hidden=other.hidden, ref_weight=other.weight, ref_bias=other.bias)
    loss, d_hidden, d_weight, metrics = run(batch, loss=objective, backend=backend, **options)
    truth = expected(formula, batch, sums)
    assert_near(loss, truth[0], "loss")
    assert_near(d_hidden, truth[1], "hidden.grad")
    assert_near(d_weight, truth[2], "weight.grad")
    p_w, _, q_w, _ = truth[3]
    assert_near(metrics["rewards/chosen"], 0.1 * (p_w - q_w).mean(), "rewards/chosen")
    assert other.hidden.grad is None and other.weight.grad is None and other.bias.grad is None


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_reference_sees_the_same_options(backend, options):
    batch = make_batch()
    batch.labels[batch.labels == -100] = options.get("ignore_index", -100)
    other = random_batch((2 * PAIRS, TOKENS), VOCAB, HIDDEN, seed=3)
    sums = oracle_sums(Batch(other.hidden, other.weight, batch.labels), **options)
    loss, *_ = run(batch, loss="dpo", ref_hidden=other.hidden, ref_weight=other.weight, backend=backend, **options)
    assert_near(loss, expected(FORMULAS["dpo"][1], batch, sums, **options)[0], "loss")


def test_packed_reference_from_hidden_states(backend):
    batch = make_batch()
    other = random_batch((2 * PAIRS, TOKENS), VOCAB, HIDDEN, seed=3)
    packed, bounds, keep = pack(batch, keep_ignored=False)
    options = dict(ref_weight=other.weight, loss="dpo", backend=backend)
    loss, *_ = run(packed, ref_hidden=other.hidden[keep], cu_seqlens=bounds, **options)
    assert_near(loss, run(batch, ref_hidden=other.hidden, **options)[0].double(), "loss")


def test_no_reference_when_none_is_needed(backend):
    batch = make_batch()
    for name in ("dpo-reference-free", "spo-reference-free", "users-own"):
        objective, formula = FORMULAS[name]
        loss, d_hidden, *_ = run(batch, loss=objective, backend=backend)
        truth = expected(formula, batch, None)
        assert_near(loss, truth[0], name)
        assert_near(d_hidden, truth[1], name)


def test_reference_equal_to_the_policy(backend):
    """First step of training: margin 0 and loss log 2, to the last bit."""
    batch = make_batch()
    sums = sequence_logps(batch.hidden, batch.weight, batch.labels, backend=backend)
    loss, _, _, metrics = run(batch, loss="dpo", ref_logps=sums, backend=backend)
    assert_near(loss, torch.tensor(2.0).log().double(), "loss")
    loss, _, _, metrics = run(batch, loss="dpo", ref_hidden=batch.hidden, ref_weight=batch.weight, backend=backend)
    assert_near(loss, torch.tensor(2.0).log().double(), "loss")
    assert abs(metrics["rewards/margins"]) < 1e-5


def test_value_is_detached(backend):
    batch = make_batch()
    value = torch.zeros(PAIRS, requires_grad=True)
    options = dict(loss=SPO(DPO(), penalty="hinge", value="input"), ref_logps=make_reference(batch), spo_value=value)
    run(batch, backend=backend, **options)
    assert value.grad is None


# ---- metrics


@pytest.mark.parametrize("name", ["dpo", "dpo-beta", "spo-sum", "hinge-reference"])
def test_metrics(backend, name):
    objective, formula = FORMULAS[name]
    beta = getattr(objective, "beta", None) or objective.base.beta
    batch = make_batch()
    reference = make_reference(batch)
    loss, _, _, metrics = run(batch, loss=objective, ref_logps=reference, backend=backend)
    p_w, p_l, q_w, q_l = expected(formula, batch, reference)[3]
    chosen, rejected = beta * (p_w - q_w), beta * (p_l - q_l)
    truth = {
        "loss": loss.double(),
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "logps/chosen": p_w.mean(),
        "logps/rejected": p_l.mean(),
    }
    assert metrics.keys() == truth.keys()
    for key, value in metrics.items():
        assert value.shape == () and value.dtype == torch.float32 and not value.requires_grad, key
        assert_near(value, truth[key], key)


def test_accuracy_is_neither_0_nor_1_here():
    """So that a constant would fail test_metrics."""
    batch = make_batch()
    p_w, p_l = oracle_sums(batch).chunk(2)
    q_w, q_l = make_reference(batch).double().chunk(2)
    assert 0 < ((p_w - q_w) > (p_l - q_l)).double().mean() < 1


@pytest.mark.parametrize("shift", [False, True])
def test_token_metrics(backend, shift):
    """Over counted tokens only: the mean entropy of all, TRL's top-1 accuracy of the chosen."""
    batch = make_batch()
    best = (batch.hidden[0] @ batch.weight.T).argmax(-1)
    batch.labels[0] = torch.cat([best[:1], best[:3], best[4:]]) if shift else best  # some right answers
    counted = batch.labels != -100
    if shift:
        counted[:, 0] = False
    with torch.no_grad():
        _, extras = eager_logprob(
            **vars(batch.to(torch.float64)), dtype=torch.float64, outputs=("entropy", "correct"), shift=shift
        )
    *_, metrics = run(
        batch, loss="dpo", ref_logps=make_reference(batch), token_metrics=True, shift=shift, backend=backend
    )
    assert metrics.keys() == METRICS | {"entropy", "mean_token_accuracy"}
    assert_near(metrics["entropy"], extras["entropy"][counted].mean(), "entropy")
    chosen = extras["correct"][:PAIRS][counted[:PAIRS]].double().mean()
    assert 0.1 < chosen < 0.9
    assert_near(metrics["mean_token_accuracy"], chosen, "mean_token_accuracy")
    assert not metrics["entropy"].requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_metrics_are_scalars_for_each_reduction(backend, reduction):
    batch = make_batch()
    *_, metrics = run(batch, ref_logps=make_reference(batch), reduction=reduction, backend=backend)
    assert all(value.shape == () and value.isfinite() for value in metrics.values())


def test_token_metrics_change_no_gradient(backend):
    batch = make_batch()
    options = dict(ref_logps=make_reference(batch), backend=backend)
    plain, with_metrics = run(batch, **options), run(batch, token_metrics=True, **options)
    for found, wanted in zip(with_metrics[:3], plain[:3], strict=True):
        assert_near(found, wanted.double(), "with token_metrics")


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
    options = dict(ref_logps=reference, spo_value=make_value(), loss=objective, reduction="none", backend=backend)
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
        ref_weight=batch.weight,
        spo_value=make_value(),
        loss=objective,
        backend=backend,
    )
    assert not loss.isfinite()
    assert not metrics["loss"].isfinite()


@pytest.mark.parametrize(("penalty", "where"), [("nll", "chosen"), ("hinge", "chosen"), ("hinge", "sft_value")])
def test_penalty_lets_nan_through(penalty, where):
    """On a base that never looks at it: a clamp must not turn NaN into 0."""
    ones = torch.ones(2)
    values = {"chosen": -5 * ones, "rejected": ones, "ref_chosen": ones, "ref_rejected": ones, "sft_value": ones}
    values[where] = torch.tensor([torch.nan, -5.0])
    lengths = torch.tensor([3, 3])
    pairs = PairLogps(**values, chosen_lengths=lengths, rejected_lengths=lengths)
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
    loss, _ = fused_spo_loss(labels=batch.labels, ref_logps=reference, backend=backend, **leaves)
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
        batch, ref_hidden=other.hidden, ref_weight=other.weight, token_metrics=True, backend=backend
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


# ---- sequence_logps


@pytest.mark.parametrize("bounds_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_sequence_logps(backend, layout, shift, dtype, bounds_dtype):
    batch = make_batch(dtype)
    batch.labels[2] = -100
    options = dict(shift=shift, backend=backend)
    leaf = batch.hidden.requires_grad_()
    if layout == "padded":
        sums = sequence_logps(leaf, batch.weight, batch.labels, **options)
    else:
        bounds = torch.arange(0, 2 * PAIRS * TOKENS + 1, TOKENS, dtype=bounds_dtype)
        sums = sequence_logps(leaf.flatten(0, 1), batch.weight, batch.labels.flatten(), cu_seqlens=bounds, **options)
    assert sums.shape == (2 * PAIRS,) and sums.dtype == torch.float32
    assert sums[2] == 0
    assert_near(sums.detach(), oracle_sums(batch, shift=shift).detach(), "sums")
    coefficients = torch.arange(1.0, 2 * PAIRS + 1)
    sums.backward(coefficients)
    found, leaf.grad = leaf.grad, None
    double = batch.hidden.detach().double().requires_grad_()
    oracle_sums(Batch(double, batch.weight, batch.labels), shift=shift).backward(coefficients.double())
    assert worst_error(found, double.grad) <= 2 * torch.finfo(dtype).eps * double.grad.abs().max()


def test_packed_shift_stays_inside_its_sequence(backend):
    """The last hidden state of a sequence predicts nothing, least of all the next one's first label."""
    batch = random_batch((9,), VOCAB, HIDDEN)
    bounds = torch.tensor([0, 4, 4, 5, 9])
    found = sequence_logps(batch.hidden, batch.weight, batch.labels, cu_seqlens=bounds, shift=True, backend=backend)
    for sequence, (start, stop) in enumerate(itertools.pairwise(bounds)):
        part = Batch(batch.hidden[start:stop], batch.weight, batch.labels[start:stop])
        assert_near(found[sequence], oracle_sums(part, shift=True), f"sequence {sequence}")
    assert found[1] == 0 and found[2] == 0


def test_no_sequences(backend):
    batch = random_batch((0,), VOCAB, HIDDEN)
    bounds = torch.zeros(1, dtype=torch.int64)
    found = sequence_logps(batch.hidden, batch.weight, batch.labels, cu_seqlens=bounds, backend=backend)
    assert found.shape == (0,)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_long_sums_keep_their_last_digits(backend, layout):
    """32,768 tokens: the sum is good to a few float32 roundings, not to one for each token."""
    tokens = 1 << 15
    batch = random_batch((2, tokens), 17, 8, dtype=torch.bfloat16)
    hidden, labels, bounds = batch.hidden, batch.labels, None
    if layout == "packed":
        hidden, labels, bounds = hidden.flatten(0, 1), labels.flatten(), torch.arange(3) * tokens
    found = sequence_logps(hidden, batch.weight, labels, cu_seqlens=bounds, backend=backend)
    truth = oracle_sums(batch)
    assert ((found - truth) / truth).abs().max() < 5e-7


# ---- the registry and the objects


def test_registry():
    assert {"dpo", "spo"} <= set(LOSSES)
    assert build_loss("dpo") == DPO() and build_loss("dpo", beta=0.3) == DPO(beta=0.3)
    assert build_loss("spo") == SPO()
    built = build_loss("spo", base="dpo", beta=0.3, weight=0.5, penalty="hinge", epsilon=0.1)
    assert built == SPO(DPO(beta=0.3), weight=0.5, penalty="hinge", epsilon=0.1)
    assert build_loss("spo", base=DPO(beta=0.2)) == SPO(DPO(beta=0.2))


def test_objectives_are_frozen():
    for objective in (DPO(), SPO()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            objective.beta = 1.0


def test_the_reconstruction_says_so():
    assert "reconstruct" in SPO.__doc__.lower() and "not verified" in SPO.__doc__.lower()


def test_what_an_objective_sees(backend):
    batch = make_batch()
    reference, value = make_reference(batch), make_value()
    seen = []

    def objective(pairs):
        seen.append(pairs)
        return 0.0 * pairs.chosen

    run(batch, loss=objective, ref_logps=reference, spo_value=value, backend=backend)
    run(batch, loss=objective, backend=backend)
    full, bare = seen[0], seen[-1]
    assert isinstance(full, PairLogps)
    lengths = (batch.labels != -100).sum(-1)
    assert full.chosen.shape == full.rejected.shape == (PAIRS,) and full.chosen.requires_grad
    assert full.chosen_lengths.tolist() == lengths[:PAIRS].tolist() and full.chosen_lengths.dtype == torch.int64
    assert full.rejected_lengths.tolist() == lengths[PAIRS:].tolist()
    assert torch.equal(torch.cat([full.ref_chosen, full.ref_rejected]), reference)
    assert torch.equal(full.sft_value, value)
    assert bare.ref_chosen is None and bare.ref_rejected is None and bare.sft_value is None


def test_an_objective_with_its_own_parameters(backend):
    """A learned temperature gets its gradient through the callable."""
    batch = make_batch()
    beta = torch.tensor(0.1, requires_grad=True)

    def objective(pairs):
        return -torch.nn.functional.logsigmoid(beta * (pairs.chosen - pairs.rejected))

    run(batch, loss=objective, backend=backend)
    p_w, p_l = oracle_sums(batch).chunk(2)
    margin = (p_w - p_l).detach()
    assert_near(beta.grad, (-margin * torch.sigmoid(-0.1 * margin)).mean(), "beta.grad")


def test_agrees_with_the_primitive_and_plain_autograd(backend):
    """The drop-in promise: the same number as linear_logprob, a sum and three lines of torch."""
    batch = make_batch()
    reference = make_reference(batch)
    leaves = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    chosen, rejected = (linear_logprob(*leaves, batch.labels, backend=backend).sum(-1) - reference).chunk(2)
    by_hand = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    by_hand.backward()
    d_hidden, d_weight = (leaf.grad.clone() for leaf in leaves)
    loss, found_hidden, found_weight, _ = run(batch, loss="dpo", ref_logps=reference, backend=backend)
    assert_near(loss, by_hand.detach().double(), "loss")
    assert_near(found_hidden, d_hidden.double(), "hidden.grad")
    assert_near(found_weight, d_weight.double(), "weight.grad")
