"""linear_kl against full logits in float64, and TDPO through fused_spo_loss on top of it."""

import pytest
import torch

from spo_kernels import LMHead, fused_spo_loss
from spo_kernels.engine.inputs import ModelInputs
from spo_kernels.engine.label_layout import LabelLayout
from spo_kernels.engine.tokens import Tokens
from spo_kernels.kl import linear_kl
from spo_kernels.losses import TDPO, PairLogps
from spo_kernels.testing import TensorMeter, eager_logprob, random_batch

ROWS, TOKENS, VOCAB, HIDDEN, REF_HIDDEN = 4, 6, 43, 9, 5
NAMES = ("hidden", "weight", "bias")


def make_inputs(dtype=torch.float64, seed=0, spread=2.0):
    policy = random_batch((ROWS, TOKENS), VOCAB, HIDDEN, dtype=dtype, bias=True, seed=seed, spread=spread, ignored=0.3)
    other = random_batch((ROWS, TOKENS), VOCAB, REF_HIDDEN, dtype=dtype, bias=True, seed=seed + 1, spread=spread)
    reference = {"ref_hidden": other.hidden, "ref_weight": other.weight, "ref_bias": other.bias}
    return {"hidden": policy.hidden, "weight": policy.weight, "bias": policy.bias} | reference, policy.labels


def log_probs(hidden, weight, bias, dtype, logit_scale=1.0, logit_softcap=None):
    logits = logit_scale * (hidden.to(dtype) @ weight.to(dtype).T + bias.to(dtype))
    logits = logits if logit_softcap is None else logit_softcap * torch.tanh(logits / logit_softcap)
    return logits.log_softmax(-1)


def eager_kl(inputs, labels, dtype=torch.float64, shift=False, **transform):
    log_q = log_probs(*(inputs[name] for name in NAMES), dtype, **transform)
    log_p = log_probs(*(inputs[f"ref_{name}"] for name in NAMES), dtype, **transform)
    kl = (log_p.exp() * (log_p - log_q).masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    if shift:
        kl = torch.cat([torch.zeros_like(kl[:, :1]), kl[:, :-1]], 1)
    keep = labels != -100
    if shift:
        keep = keep & (torch.arange(labels.shape[1]) > 0)
    return kl.masked_fill(~keep, 0.0)


def with_gradients(function, inputs, labels, upstream, trained=NAMES, **options):
    leaves = {name: inputs[name].detach().clone().requires_grad_(name in trained) for name in NAMES}
    kl = function(inputs | leaves, labels, **options)
    (kl * upstream.to(kl.dtype)).sum().backward()
    return [kl.detach(), *(leaves[name].grad for name in trained)]


def heads(inputs, **transform):
    """Both models as the public functions take them."""
    return {
        f"{prefix}{name}": value
        for prefix in ("", "ref_")
        for name, value in (
            ("hidden", inputs[f"{prefix}hidden"]),
            ("head", LMHead(inputs[f"{prefix}weight"], inputs[f"{prefix}bias"], **transform)),
        )
    }


def fused_kl(inputs, labels, logit_scale=1.0, logit_softcap=None, **options):
    models = heads(inputs, logit_scale=logit_scale, logit_softcap=logit_softcap)
    return linear_kl(labels=labels, **models, **options)


def upstream():
    return torch.randn(ROWS, TOKENS, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


OPTIONS = {
    "plain": {},
    "shift": {"shift": True},
    "scale": {"logit_scale": 0.6},
    "softcap": {"logit_scale": 1.5, "logit_softcap": 2.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("workspace_bytes", [None, 2_000], ids=["one-tile", "many-tiles"])
def test_value_and_gradients(options, workspace_bytes):
    inputs, labels = make_inputs()
    exact = with_gradients(eager_kl, inputs, labels, upstream(), **options)
    options = options | {"backend": "torch", "workspace_bytes": workspace_bytes}
    found = with_gradients(fused_kl, inputs, labels, upstream(), **options)
    for value, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-11, atol=1e-13)
    assert exact[0].max() > 0.5


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")], ids="-".join)
def test_each_part_alone(trained):
    inputs, labels = make_inputs()
    exact = with_gradients(eager_kl, inputs, labels, upstream(), trained)
    for value, truth in zip(with_gradients(fused_kl, inputs, labels, upstream(), trained), exact, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("workspace_bytes", [None, 20_000], ids=["one-tile", "many-tiles"])
def test_narrow_inputs(backend, dtype, workspace_bytes):
    """The divergence as good as from float32 logits of the same inputs; gradients to two roundings of their dtype."""
    inputs, labels = make_inputs(dtype)
    exact = with_gradients(eager_kl, inputs, labels, upstream())
    plain = eager_kl(inputs, labels, torch.float32)
    found = with_gradients(fused_kl, inputs, labels, upstream(), backend=backend, workspace_bytes=workspace_bytes)
    assert found[0].dtype == torch.float32
    limit = 2 * (plain - exact[0]).abs().max() + 8 * torch.finfo(torch.float32).eps * exact[0].max()
    assert (found[0] - exact[0]).abs().max() <= limit
    for value, truth in zip(found[1:], exact[1:], strict=True):
        assert value.dtype == dtype
        assert (value.double() - truth.double()).abs().max() <= 2 * max(
            torch.finfo(dtype).eps, 1e-6
        ) * truth.abs().max()


def test_the_same_model(backend):
    inputs, labels = make_inputs(torch.float32)
    same = {name: inputs[name] for name in NAMES} | {f"ref_{name}": inputs[name] for name in NAMES}
    kl, *gradients = with_gradients(fused_kl, same, labels, upstream(), backend=backend)
    assert kl.abs().max() < 1e-6 and all(gradient.abs().max() < 1e-5 for gradient in gradients)


def test_classes_that_cannot_occur():
    """Where the reference gives no probability the policy may give any, none included; the reverse is infinite."""
    inputs, labels = make_inputs()
    inputs["ref_bias"][[3, 5]] = inputs["bias"][5] = -torch.inf
    exact = eager_kl(inputs, labels)
    found = with_gradients(fused_kl, inputs, labels, torch.ones(ROWS, TOKENS), workspace_bytes=2_000)
    torch.testing.assert_close(found[0], exact, rtol=1e-11, atol=1e-13)
    assert all(value.isfinite().all() for value in found)
    inputs["ref_bias"][5] = 0.0
    assert (fused_kl(inputs, labels)[labels != -100] == torch.inf).all()


def test_near_certain_tokens():
    """Large logits, both models almost sure: off by roundings of a probability, not of a logit."""
    inputs = {"hidden": torch.ones(1, 1), "weight": torch.tensor([[4000.0]] + [[3991.0]] * 20)}
    inputs |= {"ref_hidden": torch.ones(1, 1), "ref_weight": torch.tensor([[4000.0]] + [[3990.0]] * 20)}
    found = []
    for dtype in (torch.float64, torch.float32):
        of = {name: values.to(dtype).requires_grad_(name == "weight") for name, values in inputs.items()}
        kl = linear_kl(of["hidden"], of["weight"], of["ref_hidden"], of["ref_weight"], torch.zeros(1).long())
        kl.sum().backward()
        found.append((kl.detach(), of["weight"].grad))
    roundings = 8 * torch.finfo(torch.float32).eps
    assert (found[1][0] - found[0][0]).abs() <= roundings
    assert (found[1][1] - found[0][1]).abs().max() <= roundings


def test_extreme_logits():
    inputs, labels = make_inputs(torch.float32, spread=1.0)
    inputs["hidden"] *= 3000
    inputs["ref_hidden"] *= 3000
    exact = eager_kl(inputs, labels)
    found = with_gradients(fused_kl, inputs, labels, torch.ones(ROWS, TOKENS))
    assert all(value.isfinite().all() for value in found) and exact.max() > 1000
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-5, atol=1e-2)


def test_nothing_to_compare():
    inputs, labels = make_inputs()
    for value in with_gradients(fused_kl, inputs, torch.full_like(labels, -100), upstream()):
        assert not value.any()
    empty = {name: value[:0] if name.endswith("hidden") else value for name, value in inputs.items()}
    assert fused_kl(empty, labels[:0]).shape == (0, TOKENS)


def test_poisoned_buffers(poisoned_buffers):
    inputs, labels = make_inputs()
    assert all(value.isfinite().all() for value in with_gradients(fused_kl, inputs, labels, upstream()))


def test_no_logits(backend):
    tokens, vocab, width, workspace = 256, 4096, 16, 512 << 10
    inputs = {name: random_batch((tokens,), vocab, width, seed=seed) for seed, name in enumerate(("", "ref_"))}
    hidden, weight = inputs[""].hidden.requires_grad_(), inputs[""].weight.requires_grad_()
    with TensorMeter() as meter:
        kl = linear_kl(
            hidden,
            weight,
            inputs["ref_"].hidden,
            inputs["ref_"].weight,
            inputs[""].labels,
            workspace_bytes=workspace,
            backend=backend,
        )
        assert meter.live <= 8 * tokens * 8
        kl.sum().backward()
    assert meter.peak <= workspace + weight.nbytes + 4 * hidden.nbytes + 32 * tokens * 8
    assert meter.peak < tokens * vocab * 4 / 2


def test_double_backward_is_refused():
    inputs, labels = make_inputs()
    inputs["hidden"].requires_grad_()
    with pytest.raises(RuntimeError, match="linear_kl does not support double backward"):
        torch.autograd.grad(fused_kl(inputs, labels).sum(), inputs["hidden"], create_graph=True)


def test_the_operators():
    """Schema and fakes, on the raw operators."""
    inputs, labels = make_inputs(torch.float32)
    layout, found = LabelLayout(labels, -100, True), heads(inputs, logit_scale=0.7, logit_softcap=3.0)
    sides = [ModelInputs.resolve(found[f"{p}hidden"], found[f"{p}head"], labels, p) for p in ("", "ref_")]
    tensors = [value for side in sides for value in side.tensors()]
    common = (*tensors, *Tokens.find(layout, layout.counted(), VOCAB), True, None, "torch")
    kl, *lses = torch.ops.spo_kernels.linear_kl_fwd(*common)
    torch.library.opcheck(torch.ops.spo_kernels.linear_kl_fwd.default, common)
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(
            torch.ops.spo_kernels.linear_kl_bwd.default, (*common, *lses, torch.ones_like(kl), *needs)
        )


# ---- TDPO


def eager_tdpo(inputs, labels, objective):
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in NAMES}
    found = heads(inputs | leaves)
    sums = [
        eager_logprob(found[f"{prefix}hidden"], found[f"{prefix}head"], labels, dtype=torch.float64).sum(-1).chunk(2)
        for prefix in ("", "ref_")
    ]
    kl = eager_kl(inputs | leaves, labels).sum(-1).chunk(2)
    lengths = (labels != -100).sum(-1).chunk(2)
    pairs = PairLogps(*sums[0], *sums[1], *lengths, inputs={"chosen_kl": kl[0], "rejected_kl": kl[1]})
    loss = objective(pairs).mean()
    loss.backward()
    return [loss.detach(), *(leaves[name].grad for name in NAMES)]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_tdpo(variant, packed):
    inputs, labels = make_inputs()
    objective = TDPO(beta=0.3, alpha=0.7, variant=variant)
    exact = eager_tdpo(inputs, labels, objective)
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in NAMES}
    arguments = heads(inputs | leaves) | {"labels": labels}
    if packed:
        keep = labels != -100
        arguments |= {name: arguments[name][keep] for name in ("hidden", "ref_hidden", "labels")}
        arguments["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(-1).cumsum(0)])
    loss, metrics = fused_spo_loss(**arguments, loss=objective)
    loss.backward()
    for value, truth in zip([loss.detach(), *(leaves[name].grad for name in NAMES)], exact, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-11, atol=1e-13)
    assert all(not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("name", ["tdpo", "wpo"])
def test_compile_fullgraph(name):
    """Objectives that need something of every token, in one graph."""
    torch._dynamo.reset()
    inputs, labels = make_inputs(torch.float32)

    def run(function):
        leaves = {name: inputs[name].clone().requires_grad_() for name in NAMES}
        loss, metrics = function(**heads(inputs | leaves), labels=labels, loss=name, backend="torch")
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves.values()), *metrics.values()]

    compiled = run(torch.compile(fused_spo_loss, backend="aot_eager", fullgraph=True))
    for found, expected in zip(compiled, run(fused_spo_loss), strict=True):
        torch.testing.assert_close(found, expected)


def test_tdpo_stops_one_gradient():
    ones, lengths = torch.ones(2), torch.ones(2, dtype=torch.int64)
    for variant, flows in (("tdpo1", True), ("tdpo2", False)):
        chosen, rejected = (torch.ones(2, requires_grad=True) for _ in range(2))
        inputs = {"chosen_kl": chosen, "rejected_kl": rejected}
        pairs = PairLogps(-ones, -ones, -ones, -ones, lengths, lengths, inputs=inputs)
        TDPO(variant=variant)(pairs).sum().backward()
        assert (chosen.grad is not None) == flows and rejected.grad is not None


def test_tdpo_needs_the_whole_reference():
    inputs, labels = make_inputs()
    both = heads(inputs)
    arguments = {name: both[name] for name in ("hidden", "head")} | {"labels": labels, "loss": "tdpo"}
    for reference in ({"ref_logps": torch.zeros(ROWS)}, {}):
        with pytest.raises(
            ValueError, match="needs the KL divergence from the reference: pass ref_hidden and ref_head"
        ):
            fused_spo_loss(**arguments, **reference)
    inputs["weight"].requires_grad_()
    with pytest.raises(
        ValueError, match="path = 'packed' cannot be taken: its objective needs kl, which has a gradient"
    ):
        fused_spo_loss(**both, labels=labels, loss="tdpo", path="packed")


WRONG = {
    "vocabulary": (
        {"ref_head": torch.zeros(7, REF_HIDDEN, dtype=torch.float64)},
        ValueError,
        "ref_head must have head's vocabulary, V = 43 rows, got 7",
    ),
    "precision": (
        {"ref_hidden": torch.zeros(ROWS, TOKENS, REF_HIDDEN), "ref_head": torch.zeros(VOCAB, REF_HIDDEN)},
        TypeError,
        "ref_hidden is torch.float32, but hidden is torch.float64",
    ),
    "ref-shape": ({"ref_hidden": torch.zeros(3, REF_HIDDEN)}, ValueError, "ref_hidden must have the labels' leading"),
    "ref-list": ({"ref_head": [1.0]}, TypeError, r"ref_head must be a weight \[V, H\] or an LMHead, got list"),
    "ref-weight-list": ({"ref_head": LMHead([1.0])}, TypeError, r"ref_head\.weight must be a torch.Tensor, got list"),
    "one-softcap": (
        {
            "head": LMHead(torch.zeros(VOCAB, HIDDEN).double(), logit_softcap=3.0),
            "ref_head": torch.zeros(VOCAB, REF_HIDDEN),
        },
        ValueError,
        "ref_head is a plain weight, but head has logit_scale = 1.0 and logit_softcap = 3.0",
    ),
    "label": ({"labels": torch.full((ROWS, TOKENS), VOCAB)}, IndexError, r"labels\[0, 0\] = 43 is outside \[0, 43\)"),
    "workspace": (
        {"workspace_bytes": 1},
        ValueError,
        "workspace_bytes = 1 is too small: one token and one vocabulary column of hidden size 9 need",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG)
def test_bad_input(changes, error, message):
    inputs, labels = make_inputs()
    with pytest.raises(error, match=message):
        linear_kl(**(heads(inputs) | {"labels": labels} | changes))


def test_bad_variant():
    with pytest.raises(ValueError, match="variant must be one of 'tdpo1', 'tdpo2', got '3'"):
        TDPO(variant="3")
