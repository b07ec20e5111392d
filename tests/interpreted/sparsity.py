"""The sparse backward through the kernels of both GPU backends, beside the torch backend's."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)

from spo_kernels import LMHead, Sparsity, linear_logprob

TOKENS, VOCAB = 8, 1300


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("mode", ["certified", "unbiased"])
def test_same_choice_and_gradients(backend, mode, trained):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, VOCAB, generator=generator) - 4.0 * torch.log1p(torch.arange(VOCAB) / 4.0)
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    bias = torch.linspace(0.0, -2.0, VOCAB)
    found = {}
    for name in ("torch", backend):
        hidden, weight = logits.clone().requires_grad_(), torch.eye(VOCAB).requires_grad_(trained)
        logp, extras = linear_logprob(
            hidden,
            LMHead(weight, bias),
            labels,
            sparsity=Sparsity(mode, 2.0**-5, seed=3),
            outputs=("kept_share", "dropped_mass"),
            backend=name,
            workspace_bytes=3_000_000,
        )
        (logp * torch.linspace(-1.0, 1.0, TOKENS)).sum().backward()
        found[name] = (logp.detach(), extras["kept_share"], extras["dropped_mass"], hidden.grad, weight.grad)
    assert found[backend][1].mean() < 0.6
    assert torch.equal(found["torch"][1], found[backend][1])
    for expected, value in zip(*found.values(), strict=True):
        if expected is not None:
            torch.testing.assert_close(value, expected, rtol=2e-5, atol=2e-6)
