"""The mean logit against float64, and what it costs."""

import pytest
import torch

from spo_kernels import LMHead
from spo_kernels.integrations import mean_logit as module
from spo_kernels.integrations.mean_logit import mean_logit
from spo_kernels.testing import TensorMeter, random_batch

VOCAB, HIDDEN = 301, 24


def exact(batch, scale, softcap):
    logits = batch.hidden.double() @ batch.weight.double().T + (0 if batch.bias is None else batch.bias.double())
    logits = scale * logits
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).mean(-1)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(module, "_TOKENS", 7)
    monkeypatch.setattr(module, "_VOCAB", 64)


# a bfloat16 product is rounded where a softcap follows: by 2^-9 of logits up to 10, less in the mean
@pytest.mark.parametrize(
    ("dtype", "softcap", "tolerance"),
    [
        (torch.float32, None, 2e-6),
        (torch.float32, 1.5, 2e-6),
        (torch.bfloat16, None, 2e-6),
        (torch.bfloat16, 1.5, 1e-3),
        (torch.float64, None, 1e-14),
        (torch.float64, 1.5, 1e-14),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 30])
def test_equals_float64(small_tiles, tokens, bias, dtype, softcap, tolerance):
    batch = random_batch((tokens,), VOCAB, HIDDEN, bias=bias, spread=2.0).to(dtype)
    found = mean_logit(batch.hidden, batch.head(logit_scale=0.7, logit_softcap=softcap))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), exact(batch, 0.7, softcap), rtol=0, atol=tolerance)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_under_autocast(small_tiles, softcap):
    """Without a softcap nothing is rounded."""
    batch = random_batch((30,), VOCAB, HIDDEN, bias=True, spread=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = mean_logit(batch.hidden, batch.head(logit_softcap=softcap))
    tolerance = 2e-6 if softcap is None else 1e-3
    torch.testing.assert_close(found.double(), exact(batch, 1.0, softcap), rtol=0, atol=tolerance)


def test_carries_no_gradient():
    batch = random_batch((5,), VOCAB, HIDDEN)
    assert not mean_logit(batch.hidden.requires_grad_(), LMHead(batch.weight.requires_grad_())).requires_grad


@pytest.mark.parametrize(("softcap", "products"), [(None, 0), (1.5, 1)])
def test_cost(softcap, products):
    """No matrix product without a softcap, one with it, and never the logits."""
    tokens, vocab = 2048, 16384
    batch = random_batch((tokens,), vocab, HIDDEN)
    with TensorMeter() as meter:
        mean_logit(batch.hidden, batch.head(logit_softcap=softcap))
    assert meter.flops == products * 2 * tokens * vocab * HIDDEN
    assert meter.peak < 4 * tokens * vocab / (2 if softcap else 16)
