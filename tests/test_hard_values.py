"""`linear_logprob` with values that are easy to get wrong: masked, infinite, NaN, very small or large."""

import pytest
import torch

from spo_kernels import linear_logprob
from spo_kernels.testing import (
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


@pytest.mark.parametrize("outputs", [(), ALL_OUTPUTS], ids=["logp", "all-outputs"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_masked_vocabulary_column(backend, dtype, outputs):
    """bias = -inf removes a class; entropy and gradients stay finite, and so does a label's neighbour."""
    batch = random_batch((6, 5), 37, 12, dtype=dtype, bias=True, ignored=0.2)
    batch.bias[::3] = -torch.inf
    batch.labels[batch.labels % 3 == 0] = 1
    actual = check_linear_logprob(linear_logprob, batch, backend=backend, outputs=outputs)
    assert not actual["weight.grad"][::3].any()


@pytest.mark.parametrize("workspace_bytes", [5_000, None])
def test_leading_block_all_masked(backend, workspace_bytes):
    """The first tiles of the vocabulary hold nothing but -inf: the running maximum must survive that."""
    batch = random_batch((6,), 400, 12, bias=True)
    batch.bias[:350] = -torch.inf
    batch.labels.clamp_(min=350)
    check_linear_logprob(linear_logprob, batch, backend=backend, workspace_bytes=workspace_bytes, outputs=ALL_OUTPUTS)


def test_label_on_a_masked_column(backend):
    batch = random_batch((6,), 20, 12, bias=True)
    batch.bias[4] = -torch.inf
    batch.labels[2] = 4
    actual = check_linear_logprob(linear_logprob, batch, backend=backend)
    assert actual["logp"][2] == -torch.inf


def test_softcap_of_minus_infinity(backend):
    batch = random_batch((6,), 20, 12, bias=True)
    batch.bias[4] = -torch.inf
    check_linear_logprob(linear_logprob, batch, backend=backend, logit_softcap=5.0, outputs=ALL_OUTPUTS)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",), ()], ids=["trained", "frozen", "inference"])
def test_non_finite_hidden_is_not_hidden(backend, value, trained):
    """The row's log-probability is non-finite; every other row keeps its bits."""
    clean = random_batch((9,), 53, 12)
    spoiled = random_batch((9,), 53, 12)
    spoiled.hidden[4, 3] = value

    def logp(batch):
        leaves = [getattr(batch, name).requires_grad_(name in trained) for name in ("hidden", "weight")]
        return linear_logprob(*leaves, batch.labels, backend=backend).detach()

    assert not logp(spoiled)[4].isfinite()
    others = torch.arange(9) != 4
    assert torch.equal(logp(spoiled)[others], logp(clean)[others])


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nan_weight_is_not_hidden(backend, softcap):
    batch = random_batch((9,), 53, 12)
    batch.weight[17, 3] = torch.nan
    logp = linear_logprob(batch.hidden, batch.head(logit_softcap=softcap), batch.labels, backend=backend)
    assert logp.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-3, 1.0, 2.0**20])
@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids=["trained", "frozen"])
def test_upstream_of_any_size(backend, dtype, size, trained):
    """Small ones must not underflow on a flat softmax, nor a loss scale of 2^20 overflow, in 16-bit products."""
    batch = random_batch((64,), 2048, 16, dtype=torch.float64, spread=0.01)
    weight = 1e-2 * (batch.weight + 1.0) if size > 1 else batch.weight + 1.0
    batch = Batch(0.1 * batch.hidden, weight, batch.labels).to(dtype)
    upstream = {"logp": torch.full((64,), size)}
    actual = evaluate(linear_logprob, batch, upstream, trained=trained, backend=backend)
    eager = evaluate(eager_logprob, batch, upstream)
    oracle = Oracle(batch, upstream)
    if "weight" not in trained:
        del oracle.values["weight.grad"]
    assert_accurate(actual, oracle, eager, factor=4.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_inputs_get_float32_logits(backend, dtype):
    """Logits near 300 in bf16 are wrong by 1; float32 logits from the same inputs by 1e-4."""
    batch = random_batch((64,), 300, 64, dtype=dtype, spread=100.0)
    upstream = random_upstream(batch)
    actual = linear_logprob(batch.hidden, batch.weight, batch.labels, backend=backend)
    expected = Oracle(batch, upstream).values["logp"]
    assert (actual - expected).abs().max() < 2e-3
