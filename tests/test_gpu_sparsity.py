"""The sparse backward on a GPU: its certificate, its choice, and what it leaves alone. `pytest -m gpu`."""

import pytest
import torch
from gpu_inputs import DEVICE, each_backend, each_dtype, on_gpu

from spo_kernels import Sparsity, linear_logprob
from spo_kernels.engine.workspace import block_width

pytestmark = on_gpu
VOCAB = 8 * 1024 + 100


def concentrated(tokens, dtype):
    """Logits that fall with the id, given to an identity head, and labels all over."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, VOCAB, generator=generator) - 1.6 * torch.log1p(torch.arange(VOCAB) / 4.0)
    labels = torch.randint(VOCAB, (tokens,), generator=generator)
    return logits.to(DEVICE, dtype), labels.to(DEVICE)


def gradients(logits, labels, sparsity, backend, trained=True):
    hidden = logits.clone().requires_grad_()
    head = torch.eye(VOCAB, dtype=logits.dtype, device=DEVICE).requires_grad_(trained)
    names = ("dropped_mass", "kept_share")
    logp, extras = linear_logprob(hidden, head, labels, sparsity=sparsity, outputs=names, backend=backend)
    logp.sum().backward()
    return logp.detach(), hidden.grad, head.grad, extras


@each_backend
@each_dtype
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_certificate(backend, dtype, trained):
    """Entries are exact or left out, and what is left out has less mass than the tolerance, for every token."""
    tolerance = 2.0**-6
    logits, labels = concentrated(48, dtype)
    exact = gradients(logits, labels, "exact", backend, trained)
    sparse = gradients(logits, labels, Sparsity("certified", tolerance), backend, trained)
    torch.testing.assert_close(sparse[0], exact[0], rtol=1e-5, atol=1e-5)
    assert sparse[3]["kept_share"].mean() < 0.6
    assert 0 < sparse[3]["dropped_mass"].max() <= tolerance
    missing = (exact[1].double() - sparse[1].double()).abs()
    rounding = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert (missing.sum(1) <= tolerance + rounding).all()
    assert (missing > 0).any()
    if trained:
        difference = (exact[2].double() - sparse[2].double()).norm() / exact[2].double().norm()
        assert difference < 0.05


@each_backend
def test_same_seed_same_bits(backend):
    logits, labels = concentrated(48, torch.float32)
    first, second, other = (
        gradients(logits, labels, Sparsity("unbiased", 2.0**-4, seed), backend)[1] for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    width = block_width(48, VOCAB, DEVICE.type)
    whole = torch.stack([(piece != 0).any(1) for piece in first.split(width, 1)], 1)
    assert not whole.all()
