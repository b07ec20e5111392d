"""linear_logprob against the float64 oracle: shapes, options, layouts, gradients."""

import itertools

import pytest
import torch
from least_workspace import least_workspace
from test_same_bits import same_bits
from torch.utils.checkpoint import checkpoint

from spo_kernels import LMHead, linear_logprob
from spo_kernels.testing import (
    DIFFERENTIABLE,
    Batch,
    Oracle,
    assert_accurate,
    check_linear_logprob,
    eager_logprob,
    evaluate,
    random_batch,
    random_upstream,
)

ALL_OUTPUTS = ("lse", "entropy", "correct", "log_sum_p2")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


# Everything that random_batch takes, then the options of the call.
CASES = {
    "plain": (dict(shape=(7, 11), vocab=101, hidden_size=24), {}),
    "bias": (dict(shape=(5, 6), vocab=67, hidden_size=16, bias=True), {}),
    "scale": (dict(shape=(5, 6), vocab=67, hidden_size=16), dict(logit_scale=0.0625)),
    "negative-scale": (dict(shape=(5, 6), vocab=67, hidden_size=16), dict(logit_scale=-1.5)),
    "softcap": (dict(shape=(5, 6), vocab=67, hidden_size=16, spread=4.0), dict(logit_softcap=5.0)),
    "ignored": (dict(shape=(5, 6), vocab=67, hidden_size=16, ignored=0.5), {}),
    "shift": (dict(shape=(5, 6), vocab=67, hidden_size=16, ignored=0.3), dict(shift=True)),
    "shift-flat": (dict(shape=(9,), vocab=67, hidden_size=16), dict(shift=True)),
    "everything": (
        dict(shape=(3, 4, 5), vocab=131, hidden_size=33, bias=True, ignored=0.3, spread=4.0),
        dict(logit_scale=0.7, logit_softcap=8.0, shift=True),
    ),
    "one-token": (dict(shape=(1,), vocab=19, hidden_size=8), {}),
    "no-leading-dimension": (dict(shape=(), vocab=19, hidden_size=8), {}),
    "five-dimensions": (dict(shape=(2, 1, 3, 1, 2), vocab=19, hidden_size=8), {}),
    "one-class": (dict(shape=(4,), vocab=1, hidden_size=8), {}),
    "one-feature": (dict(shape=(4,), vocab=19, hidden_size=1), {}),
    "prime-sizes": (dict(shape=(127,), vocab=257, hidden_size=61), {}),
    "all-ignored": (dict(shape=(3, 4), vocab=19, hidden_size=8, bias=True, ignored=1.0), {}),
    "no-rows": (dict(shape=(0,), vocab=19, hidden_size=8, bias=True), {}),
    "no-sequences": (dict(shape=(0, 4), vocab=19, hidden_size=8), {}),
    "no-tokens": (dict(shape=(4, 0), vocab=19, hidden_size=8), dict(shift=True)),
    "peaked": (dict(shape=(8, 8), vocab=67, hidden_size=32, spread=30.0), {}),
    "extreme": (dict(shape=(8, 8), vocab=67, hidden_size=32, spread=1e4), {}),
    "extreme-softcap": (dict(shape=(8, 8), vocab=67, hidden_size=32, spread=1e4), dict(logit_softcap=30.0)),
    "ignore-index-is-a-class": (
        dict(shape=(6, 6), vocab=19, hidden_size=8, ignored=0.3, ignore_index=7),
        dict(ignore_index=7),
    ),
}
each_case = pytest.mark.parametrize(("inputs", "options"), CASES.values(), ids=CASES)


@each_case
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_float64(backend, inputs, options, dtype):
    batch = random_batch(**inputs, dtype=dtype)
    check_linear_logprob(linear_logprob, batch, backend=backend, outputs=ALL_OUTPUTS, **options)
    check_linear_logprob(linear_logprob, batch, backend=backend, **options)


@each_case
def test_float64(inputs, options):
    batch = random_batch(**inputs, dtype=torch.float64)
    check_linear_logprob(linear_logprob, batch, backend="torch", outputs=ALL_OUTPUTS, **options)


@each_case
@pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",)], ids=["trained", "frozen"])
def test_every_output_element_is_written(backend, poisoned_buffers, inputs, options, trained):
    assert torch.empty(3).isnan().all()
    batch = random_batch(**inputs)
    upstream = random_upstream(batch)
    # several tiles, also of the largest case: room for a quarter of its logits
    options = dict(options, backend=backend, workspace_bytes=max(5000, batch.labels.numel() * inputs["vocab"]))
    actual = evaluate(linear_logprob, batch, upstream, trained=trained, **options)
    for name, value in actual.items():
        assert value.isfinite().all(), f"{name} holds what torch.empty left there"


@pytest.mark.parametrize("room", [1, 1.3, 4, 20, 1e6])
@pytest.mark.parametrize("outputs", [(), ALL_OUTPUTS], ids=["logp", "all-outputs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_workspace_gives_the_answer(backend, room, outputs, dtype):
    """From the least that is accepted, where a tile is one cell, to everything in one tile."""
    batch = random_batch((2, 5), 67, 23, dtype=dtype, bias=True, ignored=0.2, spread=4.0)
    options = dict(outputs=outputs, logit_scale=0.7, logit_softcap=9.0, backend=backend)
    workspace_bytes = int(room * least_workspace(linear_logprob, batch, **options))
    check_linear_logprob(linear_logprob, batch, workspace_bytes=workspace_bytes, **options)


def test_one_byte_less_is_refused(backend):
    """The least that the error states is the least, backward included."""
    batch = random_batch((4,), 37, 23)
    least = least_workspace(linear_logprob, batch, backend=backend)
    check_linear_logprob(linear_logprob, batch, backend=backend, workspace_bytes=least)
    with pytest.raises(ValueError, match=f"workspace_bytes = {least - 1} is too small"):
        linear_logprob(batch.hidden, batch.weight, batch.labels, backend=backend, workspace_bytes=least - 1)


@pytest.mark.parametrize("workspace_bytes", [6_000, None])
@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",), ("weight",)], ids="-".join)
def test_first_and_last_class(backend, workspace_bytes, trained):
    """The label in the first and the last column, and every row the same: block edges have nowhere to hide."""
    batch = random_batch((64,), 512, 32, spread=4.0)
    batch.labels.copy_(torch.tensor([0, 511]).repeat(32))
    upstream = random_upstream(batch)
    actual = evaluate(
        linear_logprob, batch, upstream, trained=trained, backend=backend, workspace_bytes=workspace_bytes
    )
    full = evaluate(eager_logprob, batch, upstream)
    oracle = Oracle(batch, upstream)
    for name in {"hidden.grad", "weight.grad"} - actual.keys():
        del oracle.values[name]
    assert_accurate(actual, oracle, full)


# ---- optional outputs


def subsets(names):
    return [chosen for size in range(len(names) + 1) for chosen in itertools.combinations(names, size)]


@pytest.mark.parametrize("names", subsets(ALL_OUTPUTS)[1:], ids="-".join)
def test_only_the_outputs_asked_for(backend, names):
    batch = random_batch((4, 5), 37, 12, bias=True, ignored=0.3)
    actual = check_linear_logprob(linear_logprob, batch, backend=backend, outputs=names)
    assert set(names) == actual.keys() - {"logp", "hidden.grad", "weight.grad", "bias.grad"}
    for name in names:
        assert not actual[name][batch.labels == -100].any(), f"{name} is not 0 at ignored positions"


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient_of_one_output_alone(backend, name):
    """No gradient comes from the others: a loss made of the entropy alone must work."""
    batch = random_batch((4, 5), 37, 12, bias=True, ignored=0.3, spread=4.0)
    upstream = {name: random_upstream(batch, (name,))[name]}
    outputs = () if name == "logp" else (name,)
    check_linear_logprob(linear_logprob, batch, upstream=upstream, backend=backend, outputs=outputs)


def test_outputs_may_be_a_list(backend):
    batch = random_batch((4,), 37, 12)
    _, extras = linear_logprob(batch.hidden, batch.weight, batch.labels, outputs=["lse"], backend=backend)
    assert list(extras) == ["lse"]


@pytest.mark.parametrize("workspace_bytes", [5_000, None])
def test_correct_counts_ties(backend, workspace_bytes):
    """Small integers: every logit is exact, so ties are real."""
    hidden = torch.eye(4)
    weight = torch.tensor([[3.0, 1, 0, 2], [3, 0, 0, 1], [1, 1, 0, 2], [0, 0, 0, 2]]).repeat(512, 1)
    labels = torch.tensor([5, 0, 2047, 1])  # tie for first; tie for first; all equal; not the best
    _, extras = linear_logprob(
        hidden, weight, labels, outputs=("correct",), backend=backend, workspace_bytes=workspace_bytes
    )
    assert extras["correct"].tolist() == [True, True, True, False]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_correct_is_top_1(backend, dtype):
    batch = random_batch((400,), 7, 12, dtype=dtype, ignored=0.1)
    logits = batch.hidden.double() @ batch.weight.double().T
    top = logits.topk(2).values
    clear = (top[:, 0] - top[:, 1] > 1e-3) & (batch.labels != -100)
    _, extras = linear_logprob(batch.hidden, batch.weight, batch.labels, outputs=("correct",), backend=backend)
    assert clear.sum() > 300
    assert extras["correct"][clear].tolist() == (logits.argmax(-1) == batch.labels)[clear].tolist()
    assert not extras["correct"][batch.labels == -100].any()


# ---- layouts


def _strided(tensor):
    """The same values as every second column of something wider."""
    wide = torch.full((*tensor.shape, 2), torch.nan if tensor.is_floating_point() else 10**9).to(tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


def _transposed(tensor):
    """The same values, first and last dimension stored the other way round."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def _offset(tensor):
    """The same values from the middle of a larger buffer, at an odd address."""
    flat = torch.zeros(tensor.numel() + 3, dtype=tensor.dtype)
    flat[3:] = tensor.flatten()
    return flat[3:].view(tensor.shape)


LAYOUTS = {"strided": _strided, "transposed": _transposed, "offset": _offset}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["hidden", "weight", "labels", "bias", "all", "upstream"])
def test_any_layout(backend, layout, dtype, name):
    batch = random_batch((5, 7), 43, 19, dtype=dtype, bias=True, ignored=0.2)
    tensors = {key: getattr(batch, key) for key in ("hidden", "weight", "labels", "bias")}
    laid_out = {key: layout(value) if name in (key, "all") else value for key, value in tensors.items()}
    upstream = random_upstream(batch)
    if name in ("upstream", "all"):
        upstream = {"logp": layout(upstream["logp"])}
    check_linear_logprob(linear_logprob, Batch(**laid_out), upstream=upstream, backend=backend)


@pytest.mark.parametrize("width", [5, 0], ids=["column", "expanded"])
@pytest.mark.parametrize("shape", [(7,), (7, 1)], ids=str)
def test_labels_that_are_flat_already(backend, shape, width):
    """Where every label counts they go to the kernels as they lie, and flatten() copies none of one column."""
    batch = random_batch(shape, 43, 19)
    labels = torch.randint(43, (7, width))[:, 0] if width else batch.labels.view(7)[:1].expand(7)
    batch = Batch(batch.hidden, batch.weight, labels.unflatten(0, shape))
    check_linear_logprob(linear_logprob, batch, backend=backend)


@pytest.mark.parametrize("name", ["hidden", "labels", "upstream"])
def test_expanded(backend, name):
    """Stride 0: one row seen many times, and the upstream gradient that sum() makes."""
    batch = random_batch((5, 7), 43, 19)
    hidden, labels = batch.hidden, batch.labels
    if name == "hidden":
        hidden = hidden[:1].expand(5, 7, 19)
    if name == "labels":
        labels = labels[:, :1].expand(5, 7)
    upstream = {"logp": torch.ones(()).expand(5, 7)} if name == "upstream" else None
    check_linear_logprob(linear_logprob, Batch(hidden, batch.weight, labels), upstream=upstream, backend=backend)


@pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",)], ids=["trained", "frozen"])
def test_inputs_are_left_alone(backend, trained):
    batch = random_batch((5, 7), 43, 19, bias=True, ignored=0.2)
    before = {name: getattr(batch, name).clone() for name in ("hidden", "weight", "labels", "bias")}
    upstream = random_upstream(batch)
    sent = upstream["logp"].clone()
    evaluate(linear_logprob, batch, upstream, trained=trained, backend=backend, outputs=ALL_OUTPUTS, shift=True)
    for name, value in before.items():
        assert torch.equal(getattr(batch, name), value), name
    assert torch.equal(upstream["logp"], sent)


# ---- autograd

PARAMETERS = ("hidden", "weight", "bias")


@pytest.mark.parametrize("outputs", [(), ALL_OUTPUTS], ids=["logp", "all-outputs"])
@pytest.mark.parametrize("trained", subsets(PARAMETERS), ids=lambda names: "-".join(names) or "none")
def test_each_combination_of_gradients(backend, trained, outputs):
    batch = random_batch((5, 7), 43, 19, bias=True, ignored=0.2)
    upstream = random_upstream(batch, outputs)
    eager = evaluate(eager_logprob, batch, upstream, outputs=outputs)
    oracle = Oracle(batch, upstream, outputs=outputs)
    for name in {"hidden", "weight", "bias"} - set(trained):
        del oracle.values[f"{name}.grad"]
    if trained:
        actual = evaluate(linear_logprob, batch, upstream, trained=trained, backend=backend, outputs=outputs)
    else:
        result = linear_logprob(batch.hidden, batch.head(), batch.labels, backend=backend, outputs=outputs)
        actual = dict(result[1], logp=result[0]) if outputs else {"logp": result}
        assert not any(value.requires_grad for value in actual.values())
    assert_accurate(actual, oracle, eager)


EVERY_FLOW = ("lse", "entropy", "log_sum_p2")
ALL_TRANSFORMS = dict(logit_scale=0.5, logit_softcap=3.0)


@pytest.mark.parametrize(
    ("trained", "outputs", "transform", "shift"),
    [
        *((trained, EVERY_FLOW, ALL_TRANSFORMS, True) for trained in subsets(PARAMETERS)[1:]),
        *((PARAMETERS, outputs, {}, False) for outputs in ((), EVERY_FLOW)),
        (PARAMETERS, (), ALL_TRANSFORMS, True),
    ],
    ids=str,
)
def test_gradcheck(trained, outputs, transform, shift):
    batch = random_batch((2, 3), 6, 2, dtype=torch.float64, bias=True, ignored=0.3)
    leaves = [getattr(batch, name).requires_grad_(name in trained) for name in ("hidden", "weight", "bias")]

    def function(hidden, weight, bias):
        head = LMHead(weight, bias, **transform)
        result = linear_logprob(
            hidden, head, batch.labels, outputs=outputs, workspace_bytes=200, backend="torch", shift=shift
        )
        return (result[0], *result[1].values()) if outputs else result

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",), ("weight",)], ids="-".join)
def test_backward_twice_accumulates(backend, trained):
    batch = random_batch((5, 7), 43, 19, bias=True, ignored=0.2)
    leaves = {name: getattr(batch, name).requires_grad_(name in trained) for name in ("hidden", "weight", "bias")}
    logp = linear_logprob(batch.hidden, batch.head(), batch.labels, backend=backend)
    upstream = random_upstream(batch)["logp"]
    logp.backward(upstream, retain_graph=True)
    once = {name: leaves[name].grad.clone() for name in trained}
    logp.backward(upstream)
    for name in trained:
        assert torch.equal(leaves[name].grad, 2 * once[name]), name
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        logp.backward(upstream)


@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids=["trained", "frozen"])
def test_retained_graph_with_another_upstream(backend, trained):
    """The second backward must not see what the first left in a kept buffer."""
    batch = random_batch((5, 7), 43, 19)
    first, second = (random_upstream(batch, seed=seed) for seed in (1, 2))
    leaves = {name: getattr(batch, name).requires_grad_(name in trained) for name in ("hidden", "weight")}
    logp = linear_logprob(batch.hidden, batch.weight, batch.labels, backend=backend)
    logp.backward(first["logp"], retain_graph=True)
    for leaf in leaves.values():
        leaf.grad = None
    logp.backward(second["logp"])
    actual = {f"{name}.grad": leaves[name].grad.clone() for name in trained}
    for leaf in leaves.values():
        leaf.requires_grad_(False).grad = None
    fresh = evaluate(linear_logprob, batch, second, trained=trained, backend=backend)
    assert same_bits(actual, {name: fresh[name] for name in actual})


def test_changing_the_weight_before_backward_is_refused(backend):
    """As everywhere in autograd: a silently wrong gradient would be worse."""
    batch = random_batch((5,), 43, 19)
    weight = batch.weight.requires_grad_().clone()
    logp = linear_logprob(batch.hidden.requires_grad_(), weight, batch.labels, backend=backend)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        logp.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("outputs", [(), ALL_OUTPUTS], ids=["logp", "all-outputs"])
def test_without_grad(backend, mode, outputs):
    batch = random_batch((5, 7), 43, 19, bias=True, ignored=0.2)
    upstream = random_upstream(batch, outputs)
    full = evaluate(eager_logprob, batch, upstream, outputs=outputs)
    oracle = Oracle(batch, upstream, outputs=outputs)
    for tensor in (batch.hidden, batch.weight, batch.bias):
        tensor.requires_grad_()
    with mode():
        result = linear_logprob(batch.hidden, batch.head(), batch.labels, backend=backend, outputs=outputs)
    actual = dict(result[1], logp=result[0]) if outputs else {"logp": result}
    for name in ("hidden", "weight", "bias"):
        del oracle.values[f"{name}.grad"]
    assert_accurate(actual, oracle, full)
    assert not any(value.requires_grad for value in actual.values())


@pytest.mark.parametrize("trained", [True, False])
def test_inside_checkpointing(trained):
    """Which gives out saved tensors a single time."""
    batch = random_batch((24,), 64, 8)
    found = []
    for inside in (True, False):
        hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_(trained)

        def loss(hidden, weight=weight):
            return linear_logprob(hidden, weight, batch.labels).sum()

        value = checkpoint(loss, hidden, use_reentrant=False) if inside else loss(hidden)
        value.backward()
        found.append([value.detach(), hidden.grad, weight.grad])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True) if pair[0] is not None)
