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
        loss.backward()
    grads = [weight.grad, hidden.grad, *([head.bias.grad] if head.bias is not None else [])]
    return [grad for grad in grads if grad is not None]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("dtype", "digits"), [(torch.float32, 2**-18), (torch.bfloat16, 2**-6), (torch.float16, 2**-8)], ids=str
)
def test_the_sum_of_gradients_is_the_same(dtype: torch.dtype, digits: float, bias: bool, backend: str) -> None:
    # a workspace of several slices
    options = {"bias": bias, "backend": backend, "workspace_bytes": 128 << 10}
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


def test_one_gradient_less() -> None:
    """Of what four backwards hold at most: the sum alone, not the sum and an addend."""
    size = 2048 * 256 * 4
    options = {"vocab": 2048, "width": 256, "workspace_bytes": size // 4}
    peaks = []
    for accumulate in (True, False):
        with TensorMeter() as meter:
            accumulated(torch.float32, accumulate, **options)
        peaks.append(meter.peak)
    assert peaks[1] - peaks[0] >= size, peaks


def test_the_first_backward_makes_the_gradient() -> None:
    hidden, labels = micro_batches(torch.float32)[0]
    weight = torch.randn(V, H, requires_grad=True)
    head = LMHead(weight, accumulate=True)
    fused_spo_loss(hidden, head, labels, loss="simpo", path="packed")[0].backward()
    assert weight.grad is not None
    with pytest.raises(ValueError, match=r"path = 'packed' cannot be taken: a head with accumulate=True adds to"):
        fused_spo_loss(hidden, head, labels, loss="simpo", path="packed")
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
    linear_logprob(hidden, replace(head, weight=weight.detach()), labels)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    refused(head, "several processes")
