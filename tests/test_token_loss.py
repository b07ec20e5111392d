"""A loss per token in three products: the numbers of four, counted, for any grouping."""

import pytest
import torch

from spo_kernels import LMHead, backend_info, linear_logprob, linear_token_loss
from spo_kernels.engine import kept_space
from spo_kernels.extras.policy_gradient import clipped_surrogate
from spo_kernels.testing import TensorMeter, random_batch

VOCAB, HIDDEN, SHAPE = 389, 24, (4, 37)
KINDS = [(torch.float64, "torch"), (torch.float32, "torch"), (torch.float32, "cpp"), (torch.bfloat16, "cpp")]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1.2e-2}


@pytest.fixture
def in_groups(monkeypatch):
    """Of 20 to 40 tokens."""
    monkeypatch.setitem(kept_space._WANTED_ROWS, "cpu", 40)
    monkeypatch.setitem(kept_space._LEAST_ROWS, "cpu", 20)


def leaves(dtype, bias=True):
    batch = random_batch(SHAPE, VOCAB, HIDDEN, dtype=dtype, bias=bias, ignored=0.3)
    given = [batch.hidden, batch.weight, *([batch.bias] if bias else [])]
    return [leaf.requires_grad_() for leaf in given], batch.labels


def grpo(labels):
    """A clipped surrogate, whose tokens are weighted by where they are."""
    generator = torch.Generator().manual_seed(3)
    old_logp = torch.randn(SHAPE, generator=generator) - 6.0
    advantages = torch.randn(SHAPE[0], generator=generator)
    tokens = (labels != -100).sum()

    def surrogate(logp, at):
        return clipped_surrogate(logp, old_logp[at], advantages[at[0]]) / tokens

    return surrogate


def two_passes(given, labels, token_loss, upstream=1.0, **options):
    head = LMHead(given[1], given[2] if len(given) > 2 else None, logit_softcap=9.0)
    logp = linear_logprob(given[0], head, labels, **options)
    counted = labels != -100
    if options.get("shift"):
        counted[:, 0] = False
    at = counted.nonzero(as_tuple=True)
    loss = token_loss(logp[at], at).sum()
    (upstream * loss).backward()
    return loss.detach(), logp.detach(), [leaf.grad for leaf in given]


@pytest.mark.usefixtures("poisoned_buffers", "in_groups")
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("dtype, backend", KINDS, ids=str)
def test_the_numbers_of_two_passes(dtype, backend, shift):
    if not backend_info()[backend].available:
        pytest.skip(backend_info()[backend].detail)
    given, labels = leaves(dtype)
    options = {"backend": backend, "shift": shift}
    expected_loss, expected_logp, expected = two_passes(given, labels, grpo(labels), 1.7, **options)
    again, calls = [leaf.detach().requires_grad_() for leaf in given], []
    surrogate = grpo(labels)

    def counted(logp, at):
        calls.append(logp.numel())
        assert logp.dtype == expected_logp.dtype
        return surrogate(logp, at)

    loss, logp = linear_token_loss(
        again[0], LMHead(*again[1:], logit_softcap=9.0), labels, counted, workspace_bytes=1 << 18, **options
    )
    (1.7 * loss).backward()
    assert len(calls) > 1 and max(calls) <= 40
    torch.testing.assert_close(loss.detach(), expected_loss)
    assert torch.equal(logp != 0, expected_logp != 0) and not logp.requires_grad
    torch.testing.assert_close(logp, expected_logp)
    for found, wanted in zip((leaf.grad for leaf in again), expected, strict=True):
        assert found.dtype == wanted.dtype
        error = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
        assert error <= TOLERANCE[dtype], error.item()


@pytest.mark.parametrize("grouped", [False, True])
def test_three_products(monkeypatch, grouped):
    """Of the tokens that count; the linear_logprob that it stands for takes four."""
    if grouped:
        monkeypatch.setitem(kept_space._WANTED_ROWS, "cpu", 40)
        monkeypatch.setitem(kept_space._LEAST_ROWS, "cpu", 20)
    given, labels = leaves(torch.float32, bias=False)
    one = 2 * int((labels != -100).sum()) * VOCAB * HIDDEN
    with TensorMeter() as meter:
        loss, _ = linear_token_loss(*given, labels, grpo(labels), backend="torch")
        loss.backward()
    assert meter.flops / one == 3.0
    with TensorMeter() as meter:
        two_passes(given, labels, grpo(labels), backend="torch")
    assert meter.flops / one == 4.0


@pytest.mark.parametrize("workspace", [None, 40_000], ids=["three products", "two passes"])
def test_a_head_that_adds_to_its_gradient(workspace):
    given, labels = leaves(torch.float32, bias=False)
    hidden, weight = given
    options = {"backend": "torch", "workspace_bytes": workspace}
    expected = torch.autograd.grad(1.7 * linear_token_loss(*given, labels, grpo(labels), **options)[0], given)
    weight.grad = torch.ones_like(weight)
    kept = weight.grad.data_ptr()
    one = 2 * int((labels != -100).sum()) * VOCAB * HIDDEN
    with TensorMeter() as meter:
        loss, _ = linear_token_loss(hidden, LMHead(weight, accumulate=True), labels, grpo(labels), **options)
        (1.7 * loss).backward()
    assert meter.flops / one == (3.0 if workspace is None else 4.0)
    assert weight.grad.data_ptr() == kept
    torch.testing.assert_close((hidden.grad, weight.grad - 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["frozen", "float16", "a small workspace", "no gradient", "nothing counts"])
def test_elsewhere_the_expression_itself(case):
    dtype = torch.float16 if case == "float16" else torch.float32
    given, labels = leaves(dtype, bias=False)
    options = {"workspace_bytes": 40_000} if case == "a small workspace" else {}
    given[1].requires_grad_(case != "frozen")
    if case == "nothing counts":
        labels.fill_(-100)
    with torch.set_grad_enabled(case != "no gradient"):
        loss, logp = linear_token_loss(*given, labels, grpo(labels), **options)
    assert not logp.requires_grad
    if case == "no gradient":
        assert not loss.requires_grad
        return
    loss.backward(retain_graph=True)
    loss.backward()  # gradients are not given out once here
    assert given[0].grad.isfinite().all()


def test_what_is_refused():
    given, labels = leaves(torch.float32, bias=False)
    scale = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match=r"token_loss uses a tensor that requires a gradient.*detach it"):
        linear_token_loss(*given, labels, lambda logp, at: scale * logp)
    with pytest.raises(ValueError, match=r"one loss for each of 98 tokens, \[98\], got \[\]"):
        linear_token_loss(*given, labels, lambda logp, at: logp.mean())
    with pytest.raises(TypeError, match="token_loss must return a tensor, got float"):
        linear_token_loss(*given, labels, lambda logp, at: 0.5)
    with pytest.raises(TypeError, match="token_loss must be a function, got str"):
        linear_token_loss(*given, labels, "grpo")
    loss, _ = linear_token_loss(*given, labels, lambda logp, at: -logp)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_token_loss.*given out once.*linear_logprob"):
        loss.backward()


@pytest.mark.parametrize("constant", [lambda logp, at: -logp.detach(), lambda logp, at: (logp < -1).long()])
def test_losses_without_a_gradient(constant):
    """As `torch.Tensor.backward` refuses them, and not a model that stays as it is."""
    given, labels = leaves(torch.float32, bias=False)
    with pytest.raises(ValueError, match="token_loss gave losses that do not depend on the log-probabilities"):
        linear_token_loss(*given, labels, constant)


def test_one_group_without_a_gradient(monkeypatch):
    """Where no token of a group has an advantage, say; the others' gradients are theirs."""
    given, labels = leaves(torch.float32, bias=False)
    calls = []

    def first_only(logp, at):
        calls.append(logp)
        return -logp if len(calls) == 1 else torch.zeros(logp.shape)

    monkeypatch.setitem(kept_space._WANTED_ROWS, "cpu", 40)
    monkeypatch.setitem(kept_space._LEAST_ROWS, "cpu", 20)
    loss, _ = linear_token_loss(*given, labels, first_only)
    loss.backward()
    assert len(calls) > 1 and given[1].grad.any()
