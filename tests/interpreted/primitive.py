"""`linear_logprob` through the kernels of both GPU backends, and what only a GPU does otherwise."""

import os
from copy import copy
from functools import cache

import pytest
import torch
from tile_inputs import ALL_OUTPUTS

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)

from spo_kernels import linear_logprob
from spo_kernels.backends import products, registry
from spo_kernels.engine import tokens
from spo_kernels.testing import (
    Batch,
    Oracle,
    assert_accurate,
    check_linear_logprob,
    eager_logprob,
    evaluate,
    peaked_batch,
    random_batch,
    random_upstream,
)

with_torch = pytest.mark.parametrize("backend", ["torch", "triton", "cuda"], indirect=True)


SOFTCAP, OUTPUTS, SHIFT = {"logit_scale": 0.7, "logit_softcap": 4.0}, {"outputs": ALL_OUTPUTS}, {"shift": True}


@pytest.mark.parametrize(
    ("options", "dtype", "tile"),
    [
        pytest.param(SOFTCAP, torch.float32, None, id="softcap"),
        pytest.param(SOFTCAP, torch.float16, 6000, id="softcap float16 tiles"),
        pytest.param(OUTPUTS, torch.float32, 6000, id="outputs tiles"),
        pytest.param(OUTPUTS, torch.bfloat16, 6000, id="outputs bfloat16 tiles"),
        pytest.param(SHIFT, torch.float32, 6000, id="shift tiles"),
        pytest.param(SHIFT, torch.bfloat16, None, id="shift bfloat16"),
    ],
)
def test_linear_logprob(backend, dtype, tile, options):
    batch = random_batch((3, 5), 131, 12, dtype=dtype, bias=True, ignored=0.3)
    check_linear_logprob(linear_logprob, batch, backend=backend, workspace_bytes=tile, **options)


@pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",)], ids=["trained", "frozen"])
def test_peaked_distributions_and_masked_columns(backend, trained):
    batch = peaked_batch(2, 7, 150, 16)
    bias = torch.zeros(150)
    bias[40:60] = -torch.inf
    batch = Batch(batch.hidden, batch.weight, batch.labels, bias)
    upstream = random_upstream(batch)
    oracle, eager = Oracle(batch, upstream), evaluate(eager_logprob, batch, upstream)
    actual = evaluate(linear_logprob, batch, upstream, trained=trained, backend=backend, workspace_bytes=9000)
    for name in {"weight", "bias"} - set(trained):
        del oracle.values[f"{name}.grad"]
    assert_accurate(actual, oracle, eager)


@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids=["trained", "frozen"])
def test_same_inputs_same_bits(backend, trained):
    batch = random_batch((3, 5), 131, 12, bias=True, ignored=0.3)
    upstream = random_upstream(batch)
    first, second = (evaluate(linear_logprob, batch, upstream, trained=trained, backend=backend) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("names", [("hidden", "labels"), ("weight", "bias", "upstream")], ids=" ".join)
def test_any_layout(backend, names):
    batch = random_batch((3, 5), 43, 12, bias=True, ignored=0.2)
    tensors = {key: getattr(batch, key) for key in ("hidden", "weight", "labels", "bias")}
    strided = {key: torch.stack([value, value], -1)[..., 0] for key, value in tensors.items() if key in names}
    upstream = {"logp": torch.ones(()).expand(3, 5)} if "upstream" in names else None
    check_linear_logprob(linear_logprob, Batch(**tensors | strided), upstream=upstream, backend=backend)


# ---- what only a GPU does otherwise: half-precision operands, graph capture


@pytest.fixture
def half_products(monkeypatch):
    """Products of half-precision operands with a float32 result, which the CPU library lacks."""

    def matmul(self, a, b, out, *, accumulate=False, a_rows=None, b_rows=None, out_rows=None):
        assert a.dtype == b.dtype, "an operand was left to be cast"
        assert a_rows is b_rows is out_rows is None
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=int(accumulate), out=out)

    monkeypatch.setattr(products.VendorProducts, "operand_dtype", lambda self, inputs: inputs.dtype)
    monkeypatch.setattr(products.VendorProducts, "matmul", matmul)


@cache
def half_case(dtype):
    """A batch, its upstream gradients, the truth, and the accuracy of eager products whose operands are rounded too."""
    batch = random_batch((4, 5), 131, 12, dtype=dtype, bias=True, ignored=0.2)
    upstream = random_upstream(batch)
    rounded, exact = (evaluate(eager_logprob, batch, upstream, dtype=d) for d in (dtype, torch.float32))
    return batch, upstream, Oracle(batch, upstream), {**rounded, "logp": exact["logp"]}


@with_torch
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",)], ids=["trained", "frozen"])
def test_half_precision_operands(half_products, backend, dtype, trained):
    """The gradients are as accurate as eager ones whose products round their operands too."""
    batch, upstream, truth, eager = half_case(dtype)
    actual = evaluate(linear_logprob, batch, upstream, trained=trained, backend=backend, workspace_bytes=9000)
    oracle = copy(truth)
    unasked = {f"{name}.grad" for name in ("weight", "bias") if name not in trained}
    oracle.values = {name: value for name, value in truth.values.items() if name not in unasked}
    assert_accurate(actual, oracle, eager)


@with_torch
@pytest.mark.parametrize("size", [1e-6, 1.0, 2.0**14])
def test_upstream_of_any_size_in_float16(half_products, backend, size):
    """Without headroom 1e-6 * p is below float16's smallest number and 2^17 above its largest."""
    batch = random_batch((16,), 256, 16, dtype=torch.float16, spread=0.01)
    batch = Batch(batch.hidden, 1e-2 * (batch.weight + 1.0), batch.labels)
    upstream = {"logp": torch.full((16,), size)}
    actual = evaluate(linear_logprob, batch, upstream, backend=backend)["weight.grad"].double()
    expected = Oracle(batch, upstream).values["weight.grad"]
    if size > 1e-6:
        assert (actual - expected).abs().max() <= 2e-3 * expected.abs().max()
    else:
        assert (actual - expected).abs().max() <= 6e-8


@with_torch
@pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",)], ids=["trained", "frozen"])
@pytest.mark.parametrize(("shift", "outputs"), [(False, ()), (True, ALL_OUTPUTS)], ids=["logp", "shift outputs"])
def test_static_shapes_while_a_graph_is_captured(monkeypatch, backend, trained, shift, outputs):
    """Every row is processed and the ignored ones masked: the same results, whatever those rows hold."""
    batch = random_batch((4, 5), 131, 12, bias=True, ignored=0.4)
    upstream = random_upstream(batch, outputs)
    options = {"trained": trained, "shift": shift, "outputs": outputs, "backend": backend}
    expected = evaluate(linear_logprob, batch, upstream, **options)
    unused = batch.labels == -100
    upstream["logp"][unused] = torch.nan
    if shift:
        unused = unused.roll(-1, dims=-1)
        unused[:, -1] = True
    batch.hidden[unused] = torch.nan
    monkeypatch.setattr(tokens, "capturing", lambda labels: True)
    actual = evaluate(linear_logprob, batch, upstream, **options)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(actual[name].double(), value.double(), rtol=1e-5, atol=1e-6), name
    assert not actual["hidden.grad"][unused].any()


# ---- the choice of a backend


def test_the_interpreter_is_never_an_automatic_choice():
    assert registry.choose_backend(None, torch.device("cpu"), torch.float32) != "triton"
    assert registry.choose_backend("triton", torch.device("cpu"), torch.float32) == "triton"
    with pytest.raises(RuntimeError, match="float64"):
        registry.choose_backend("triton", torch.device("cpu"), torch.float64)
    assert "interpreter" in registry.backend_info()["triton"].detail
