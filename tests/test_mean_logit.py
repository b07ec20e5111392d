"""The mean logit of each token: a product with the sum of the head's rows, or in the pass where there is a softcap."""

import pytest
import torch

from spo_kernels import Sparsity, fused_spo_loss, linear_logprob
from spo_kernels.testing import TensorMeter, random_batch

VOCAB, HIDDEN = 301, 24
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6, torch.float64: 1e-14}


def exact(batch, scale, softcap):
    logits = batch.hidden.double() @ batch.weight.double().T + (0 if batch.bias is None else batch.bias.double())
    logits = scale * logits
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).mean(-1)


@pytest.mark.parametrize("trained", [(), ("hidden",), ("hidden", "weight")], ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_float64(backend, bias, dtype, softcap, trained):
    """With small tiles, so that several pass; ignored tokens have 0."""
    if dtype == torch.float64 and backend != "torch":
        pytest.skip("only the torch backend has float64 tiles")
    batch = random_batch((2, 20), VOCAB, HIDDEN, bias=bias, spread=2.0, ignored=0.3).to(dtype)
    for name in trained:
        getattr(batch, name).requires_grad_()
    head = batch.head(logit_scale=0.7, logit_softcap=softcap)
    options = {"outputs": ("mean_logit",), "workspace_bytes": 32 << 10, "backend": backend}
    _, found = linear_logprob(batch.hidden, head, batch.labels, **options)
    expected = exact(batch, 0.7, softcap).masked_fill(batch.labels == -100, 0.0)
    mean = found["mean_logit"]
    assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and not mean.requires_grad
    torch.testing.assert_close(mean.double(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("sparsity", ["certified", Sparsity("unbiased")], ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_beside_a_sparse_backward(softcap, sparsity):
    batch = random_batch((64,), 2048, HIDDEN, spread=2.0)
    head = batch.head(logit_softcap=softcap)
    _, found = linear_logprob(
        batch.hidden.requires_grad_(), head, batch.labels, outputs=("mean_logit",), sparsity=sparsity
    )
    torch.testing.assert_close(found["mean_logit"].double(), exact(batch, 1.0, softcap), rtol=0, atol=2e-6)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("path", ["packed", "factorised", "two_pass"])
def test_of_both_sides_of_pairs(path, softcap):
    batch = random_batch((6, 14), VOCAB, HIDDEN, bias=True, spread=2.0, ignored=0.3)
    batch.hidden.requires_grad_()
    batch.weight.requires_grad_()
    head = batch.head(logit_scale=0.7, logit_softcap=softcap)
    options = {"ref_logps": torch.zeros(6), "loss": "dpo", "token_metrics": True, "path": path}
    _, metrics = fused_spo_loss(batch.hidden, head, batch.labels, **options)
    means, counted = exact(batch, 0.7, softcap), batch.labels != -100
    for side, values, which in zip(("chosen", "rejected"), means.chunk(2), counted.chunk(2), strict=True):
        assert metrics[f"logits/{side}"].item() == pytest.approx(values[which].mean().item(), abs=2e-6)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("trained", [(), ("hidden",)], ids=str)
def test_costs_no_product_and_keeps_the_workspace(backend, trained, softcap):
    """A vector's product, `2 N H` operations, without a softcap; no [N, V] tensor ever."""
    tokens, vocab, workspace = 128, 2048, 256 << 10
    batch = random_batch((tokens,), vocab, HIDDEN)
    for name in trained:
        getattr(batch, name).requires_grad_()
    meters = []
    for outputs in ((), ("mean_logit",)):
        with TensorMeter() as meter:
            linear_logprob(
                batch.hidden,
                batch.head(logit_softcap=softcap),
                batch.labels,
                outputs=outputs,
                workspace_bytes=workspace,
                backend=backend,
            )
        meters.append(meter)
    without, with_means = meters
    assert with_means.flops - without.flops <= 2 * tokens * HIDDEN < 2 * tokens * vocab * HIDDEN / 1000
    # statistics, and a copy of some rows of the head while they are summed
    assert with_means.peak <= workspace + 3 * tokens * HIDDEN * 4 + 20 * tokens * 8 + 3 * vocab * HIDDEN * 4
    assert with_means.largest < tokens * vocab * 4 / 2


def test_under_autocast():
    batch = random_batch((30,), VOCAB, HIDDEN, spread=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = linear_logprob(batch.hidden, batch.weight, batch.labels, outputs=("mean_logit",))
    expected = exact(batch.to(torch.bfloat16), 1.0, None)
    torch.testing.assert_close(found["mean_logit"].double(), expected, rtol=0, atol=2e-6)
