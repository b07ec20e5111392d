"""fused_spo_loss against the formulas spelled out once more, in float64, with full logits."""

import pytest
import torch
from loss_oracle import (
    FORMULAS,
    HIDDEN,
    METRICS,
    OPTIONS,
    PAIRS,
    TOKENS,
    VOCAB,
    assert_near,
    each_objective,
    expected,
    make_batch,
    make_reference,
    make_value,
    oracle_sums,
    pack,
    run,
    split,
)

from spo_kernels import linear_logprob, sequence_logps
from spo_kernels.losses import DPO, SPO, PairLogps
from spo_kernels.testing import Batch, eager_logprob, random_batch, worst_error

# ---- the objectives


@each_objective
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_formula(backend, objective, formula, reduction):
    batch, value = make_batch(), make_value()
    reference = make_reference(batch)
    loss, d_hidden, d_weight, metrics = run(
        batch,
        loss=objective,
        ref_logps=reference,
        pair_inputs={"spo_value": value},
        reduction=reduction,
        backend=backend,
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


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("path", [None, "packed", "factorised", "two_pass"])
def test_pair_logps(backend, path, packed):
    """Each response's log-probability, on request, whichever way the loss is computed."""
    batch = make_batch(bias=True)
    truth, reference, bounds = oracle_sums(batch).detach(), make_reference(batch), None
    if packed:
        batch, bounds, _ = pack(batch, keep_ignored=True)
    options = dict(loss="dpo", ref_logps=reference, cu_seqlens=bounds, backend=backend, path=path)
    logps = run(batch, **options, pair_logps=True)[3]["pair_logps"]
    assert logps.shape == (2 * PAIRS,) and not logps.requires_grad
    assert_near(logps, truth, "pair_logps")
    assert "pair_logps" not in run(batch, **options)[3]


@each_objective
@pytest.mark.parametrize("keep_ignored", [True, False], ids=["with-prompts", "responses-only"])
def test_packed(backend, objective, formula, keep_ignored):
    batch, value = make_batch(bias=True), make_value()
    reference = make_reference(batch)
    packed, bounds, keep = pack(batch, keep_ignored=keep_ignored)
    loss, d_hidden, d_weight, metrics = run(
        packed,
        loss=objective,
        ref_logps=reference,
        pair_inputs={"spo_value": value},
        cu_seqlens=bounds,
        backend=backend,
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
    options = dict(ref_hidden=other.hidden, ref_head=other.head())
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
    ref_head = other.head(**split(options)[0])
    loss, *_ = run(batch, loss="dpo", ref_hidden=other.hidden, ref_head=ref_head, backend=backend, **options)
    assert_near(loss, expected(FORMULAS["dpo"][1], batch, sums, **options)[0], "loss")


def test_packed_reference_from_hidden_states(backend):
    batch = make_batch()
    other = random_batch((2 * PAIRS, TOKENS), VOCAB, HIDDEN, seed=3)
    packed, bounds, keep = pack(batch, keep_ignored=False)
    options = dict(ref_head=other.weight, loss="dpo", backend=backend)
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
    loss, _, _, metrics = run(batch, loss="dpo", ref_hidden=batch.hidden, ref_head=batch.weight, backend=backend)
    assert_near(loss, torch.tensor(2.0).log().double(), "loss")
    assert abs(metrics["rewards/margins"]) < 1e-5


def test_value_is_detached(backend):
    batch = make_batch()
    value = torch.zeros(PAIRS, requires_grad=True)
    options = dict(
        loss=SPO(DPO(), penalty="hinge", value="input"),
        ref_logps=make_reference(batch),
        pair_inputs={"spo_value": value},
    )
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
        states, weight = batch.hidden.double(), batch.weight.double()
        outputs = ("entropy", "correct")
        _, extras = eager_logprob(states, weight, batch.labels, dtype=torch.float64, outputs=outputs, shift=shift)
    *_, metrics = run(
        batch, loss="dpo", ref_logps=make_reference(batch), token_metrics=True, shift=shift, backend=backend
    )
    assert metrics.keys() == METRICS | {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"}
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


# ---- objectives of one's own


def test_what_an_objective_sees(backend):
    batch = make_batch()
    reference, value = make_reference(batch), make_value()
    seen = []

    def objective(pairs):
        seen.append(pairs)
        return 0.0 * pairs.chosen

    run(batch, loss=objective, ref_logps=reference, pair_inputs={"spo_value": value}, backend=backend)
    run(batch, loss=objective, backend=backend)
    full, bare = seen[0], seen[-1]
    assert isinstance(full, PairLogps)
    lengths = (batch.labels != -100).sum(-1)
    assert full.chosen.shape == full.rejected.shape == (PAIRS,) and full.chosen.requires_grad
    assert full.chosen_lengths.tolist() == lengths[:PAIRS].tolist() and full.chosen_lengths.dtype == torch.int64
    assert full.rejected_lengths.tolist() == lengths[PAIRS:].tolist()
    assert torch.equal(torch.cat([full.ref_chosen, full.ref_rejected]), reference)
    assert torch.equal(full.inputs["spo_value"], value)
    assert bare.ref_chosen is None and bare.ref_rejected is None and not bare.inputs


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
