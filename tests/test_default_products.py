"""Calls with the products that are chosen where nobody chooses: the other tests force the library's own."""

import pytest
import torch

from spo_kernels import Sparsity, fused_spo_loss, linear_kl, linear_logprob
from spo_kernels.backends import registry
from spo_kernels.losses import DPO, SPO
from spo_kernels.testing import check_linear_logprob, random_batch

ALL_OUTPUTS = ("lse", "correct", "entropy", "log_sum_p2")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True, params=["auto", "vendor"])
def products(request, monkeypatch):
    """The backend is loaded once for each process: anew with this choice, and anew after it."""
    if not registry.backend_info()["cpp"].available:
        pytest.skip(registry.backend_info()["cpp"].detail)
    monkeypatch.setenv("SPO_CPU_PRODUCT", request.param)
    registry.load_backend.cache_clear()
    yield
    registry.load_backend.cache_clear()


@each_dtype
@pytest.mark.parametrize("workspace_bytes", [None, 40_000])
@pytest.mark.parametrize("outputs", [(), ALL_OUTPUTS], ids=["logp", "outputs"])
@pytest.mark.parametrize("sizes", [(131, 12), (1500, 40)], ids=["small", "larger"])
def test_linear_logprob(dtype, workspace_bytes, outputs, sizes):
    batch = random_batch((4, 9), *sizes, dtype=dtype, bias=True, ignored=0.3)
    check_linear_logprob(linear_logprob, batch, backend="cpp", workspace_bytes=workspace_bytes, outputs=outputs)


@each_dtype
@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids=["trained", "frozen"])
@pytest.mark.parametrize("mode", ["certified", "unbiased"])
def test_sparse(dtype, trained, mode):
    batch = random_batch((40,), 700, 16, dtype=dtype, spread=3.0)
    leaves = {name: getattr(batch, name).clone().requires_grad_(name in trained) for name in ("hidden", "weight")}
    logp = linear_logprob(*leaves.values(), batch.labels, sparsity=Sparsity(mode, 2.0**-8), backend="cpp")
    logp.sum().backward()
    assert all(leaves[name].grad.isfinite().all() for name in trained)


@each_dtype
@pytest.mark.parametrize("path", [None, "two_pass", "packed", "factorised"])
@pytest.mark.parametrize("loss", [DPO(beta=0.3), SPO()], ids=["dpo", "spo"])
def test_fused_spo_loss(dtype, path, loss):
    """As the torch backend computes it."""
    if dtype == torch.float16 and path in ("packed", "factorised"):
        pytest.skip("three products are not for float16")
    batch, found = random_batch((4, 9), 131, 12, dtype=dtype, ignored=0.2), []
    for backend in ("cpp", "torch"):
        hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
        value, _ = fused_spo_loss(
            hidden, weight, batch.labels, loss=loss, ref_logps=torch.zeros(4), path=path, backend=backend
        )
        value.backward()
        found.append((value.detach(), hidden.grad.float(), weight.grad.float()))
    limit = 2e-5 if dtype == torch.float32 else 2e-2
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=limit, atol=limit * float(expected.abs().max()))


@each_dtype
def test_linear_kl(dtype):
    policy, reference = (random_batch((3, 7), 131, 12, dtype=dtype, seed=seed) for seed in (0, 1))
    hidden = policy.hidden.clone().requires_grad_()
    kl = linear_kl(hidden, policy.weight, reference.hidden, reference.weight, policy.labels, backend="cpp")
    kl.sum().backward()
    assert (kl >= 0).all() and hidden.grad.isfinite().all()
