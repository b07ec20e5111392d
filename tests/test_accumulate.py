"""`LMHead(accumulate=True)`: the weight's gradient is added to the one that exists, with no second `[V, H]`."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from spo_kernels import LMHead, fused_spo_loss, linear_logprob
from spo_kernels.testing import TensorMeter

PAIRS, T, V, H = 2, 24, 512, 32
STEPS = 4


def micro_batches(dtype: torch.dtype, width: int = H) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    hidden = torch.randn(STEPS, 2 * PAIRS, T, width).to(dtype)
    labels = torch.randint(V, (STEPS, 2 * PAIRS, T))
    # ragged, and one response that is empty
    labels[:, 1, 5:], labels[:, 2] = -100, -100
    return list(zip(hidden, labels, strict=True))


def accumulated(
    dtype: torch.dtype, accumulate: bool, *, bias: bool = False, vocab: int = V, width: int = H, **options: Any
) -> list[Tensor]:
    """Gradients of weight, bias and the last hidden states after four backwards."""
    torch.manual_seed(1)
    weight = (0.3 * torch.randn(vocab, width)).to(dtype).requires_grad_()
    head = LMHead(weight, torch.randn(vocab).to(dtype).requires_grad_() if bias else None, accumulate=accumulate)
    for hidden, labels in micro_batches(dtype, width):
        hidden = hidden.clone().requires_grad_()
        loss, _ = fused_spo_loss(hidden, head, labels, loss="simpo", shift=True, **options)
        (0.7 * loss).backward()
    grads = [weight.grad, hidden.grad, *([head.bias.grad] if head.bias is not None else [])]
    return [grad for grad in grads if grad is not None]


# in two passes, of several slices; and in three products, all tokens of a call in one tile
WORKSPACES = {"two passes": 128 << 10, "three products": None}


@pytest.mark.parametrize("workspace", WORKSPACES.values(), ids=WORKSPACES)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("dtype", "digits"), [(torch.float32, 2**-18), (torch.bfloat16, 2**-6), (torch.float16, 2**-8)], ids=str
)
def test_the_sum_of_gradients_is_the_same(
    dtype: torch.dtype, digits: float, bias: bool, backend: str, workspace: int | None
) -> None:
    options = {"bias": bias, "backend": backend, "workspace_bytes": workspace}
    ours, theirs = (accumulated(dtype, accumulate, **options) for accumulate in (True, False))
    assert len(ours) == 2 + bias
    for our, their in zip(ours, theirs, strict=True):
        largest = float(their.float().abs().max())
        torch.testing.assert_close(our, their, rtol=digits, atol=digits * largest)


def test_a_sparse_backward_adds_too() -> None:
    options = {"sparsity": "certified", "workspace_bytes": 128 << 10}
    ours, theirs = (accumulated(torch.float32, accumulate, **options) for accumulate in (True, False))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-6)


SIZE = 2048 * 256 * 4


def second_step(accumulate: bool, workspace: int) -> tuple[TensorMeter, TensorMeter]:
    """The forward and the backward of a head whose weight has a gradient from the step before."""
    torch.manual_seed(1)
    head = LMHead((0.3 * torch.randn(2048, 256)).requires_grad_(), accumulate=accumulate)
    for hidden, labels in micro_batches(torch.float32, 256)[:2]:
        with TensorMeter() as forward:
            options: dict[str, Any] = {"loss": "simpo", "shift": True, "workspace_bytes": workspace}
            loss, _ = fused_spo_loss(hidden.requires_grad_(), head, labels, **options)
        with TensorMeter() as backward:
            (0.7 * loss).backward()
    return forward, backward


@pytest.mark.parametrize(("workspace", "products"), [(SIZE // 4, 4), (SIZE, 3)], ids=WORKSPACES)
def test_one_gradient_less(workspace: int, products: int) -> None:
    """Beside the gradient that exists there is no addend of its size; in as many products as without."""
    ours, theirs = (second_step(accumulate, workspace) for accumulate in (True, False))
    assert max(meter.largest for meter in ours) < SIZE
    made_in = 0 if products == 3 else 1
    assert theirs[made_in].peak - ours[made_in].peak >= SIZE
    tokens = sum(int((labels[..., 1:] != -100).sum()) for _, labels in micro_batches(torch.float32))
    for accumulate in (True, False):
        # the meter sees torch's products alone
        with TensorMeter() as meter:
            accumulated(torch.float32, accumulate, vocab=2048, width=256, workspace_bytes=workspace, backend="torch")
        assert meter.flops == 2 * tokens * 2048 * 256 * products


def with_a_gradient() -> tuple[Tensor, LMHead, Tensor]:
    """Hidden states, a head whose weight has one, and labels."""
    hidden, labels = micro_batches(torch.float32)[0]
    weight = torch.randn(V, H, requires_grad=True)
    weight.grad = torch.randn(V, H)
    return hidden.requires_grad_(), LMHead(weight, accumulate=True), labels


def test_where_the_tile_does_not_hold_all_tokens() -> None:
    hidden, head, labels = with_a_gradient()
    options: dict[str, Any] = {"loss": "simpo", "workspace_bytes": 192 << 10}
    with pytest.raises(ValueError, match=r"path = 'packed' cannot be taken: .* too small for all tokens, as long as"):
        fused_spo_loss(hidden, head, labels, path="packed", **options)
    with pytest.raises(ValueError, match=r"path = 'factorised' cannot be taken: a head with accumulate=True adds to"):
        fused_spo_loss(hidden, head, labels, path="factorised", **options)
    head.weight.grad = None
    fused_spo_loss(hidden, head, labels, path="packed", **options)[0].backward()


def test_a_gradient_that_is_gone_before_the_backward() -> None:
    hidden, head, labels = with_a_gradient()
    loss, plain = (
        2 * fused_spo_loss(hidden, each, labels, loss="simpo", path="packed")[0] for each in (head, head.weight)
    )
    head.weight.grad = None
    found = torch.autograd.grad(loss, [hidden, head.weight])
    torch.testing.assert_close(found, torch.autograd.grad(plain, [hidden, head.weight]))


def test_what_was_changed_before_the_backward_is_noticed() -> None:
    hidden, head, labels = with_a_gradient()
    states = hidden * 1
    loss = fused_spo_loss(states, head, labels, loss="simpo", path="packed")[0]
    with torch.no_grad():
        states.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_it_is_added_once() -> None:
    hidden, head, labels = with_a_gradient()
    loss = fused_spo_loss(hidden, head, labels, loss="simpo", path="packed")[0]
    loss.backward(retain_graph=True)
    once = head.weight.grad
    assert once is not None
    once = once.clone()
    with pytest.raises(RuntimeError, match="given out once"):
        loss.backward()
    assert head.weight.grad is not None and torch.equal(head.weight.grad, once)


def test_the_first_backward_makes_the_gradient() -> None:
    hidden, labels = micro_batches(torch.float32)[0]
    weight = torch.randn(V, H, requires_grad=True)
    head = LMHead(weight, accumulate=True)
    fused_spo_loss(hidden, head, labels, loss="simpo", path="packed")[0].backward()
    assert weight.grad is not None
    before, kept = weight.grad.clone(), weight.grad.data_ptr()
    linear_logprob(hidden, head, labels).sum().backward()
    assert weight.grad.data_ptr() == kept and not torch.equal(weight.grad, before)
    (grad,) = torch.autograd.grad(linear_logprob(hidden, weight, labels).sum(), weight)
    torch.testing.assert_close(weight.grad, before + grad, rtol=1e-4, atol=1e-5)


def test_where_it_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, labels = micro_batches(torch.float32)[0]
    weight = torch.randn(V, H, requires_grad=True)
    head = LMHead(weight, accumulate=True)

    def refused(head: LMHead, reason: str) -> None:
        with pytest.raises(ValueError, match=rf"^head.weight: accumulate=True cannot be used: .*{reason}"):
            linear_logprob(hidden, head, labels)

    refused(replace(head, weight=weight * 2), "it is no leaf")
    with torch.autocast("cpu", torch.bfloat16):
        refused(head, "autocast casts it")
    hook = weight.register_hook(lambda grad: None)
    refused(head, "a hook on it")
    hook.remove()
    hook = weight.register_post_accumulate_grad_hook(lambda _: None)
    refused(head, "a hook on it")
    hook.remove()
    weight.grad = torch.zeros(V, H).to_sparse()
    refused(head, "its .grad is sparse, or was made under inference_mode")
    with torch.inference_mode():
        made = torch.zeros(V, H)
    weight.grad = made
    refused(head, "its .grad is sparse, or was made under inference_mode")
    weight.grad = torch.zeros(H, V).t()
    refused(head, "its .grad is not laid out row by row")
    weight.grad = None
    linear_logprob(hidden, replace(head, weight=weight.detach()), labels)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    refused(head, "several processes")
