"""The CUDA path on a GPU against float64, in every dtype. `pytest -m gpu`; see gpu_inputs.py for a dry run."""

import pytest
import torch
from gpu_inputs import DEVICE, DRY, each_backend, each_dtype, each_kernel_backend, moved, on_device, on_gpu

from spo_kernels import fused_spo_loss, linear_logprob, sequence_logps
from spo_kernels.backends.contract import LogitTransform, Tile, TokenGrads, TokenStats
from spo_kernels.backends.registry import load_backend
from spo_kernels.backends.torch_backend import TorchBackend
from spo_kernels.losses import DPO, SPO
from spo_kernels.testing import (
    Batch,
    Oracle,
    assert_accurate,
    eager_logprob,
    evaluate,
    peaked_batch,
    random_batch,
    random_upstream,
)

ALL_OUTPUTS = ("lse", "correct", "entropy", "log_sum_p2")
pytestmark = on_gpu
TRAINED = {"trained": ("hidden", "weight", "bias"), "frozen": ("hidden",), "weight": ("weight",)}
each_head = pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)


def held_to_oracle(batch, trained, backend, workspace_bytes=None, **options):
    """Values and gradients against float64, relative to what eager float32 logits give."""
    upstream = random_upstream(batch, options.get("outputs", ()))
    oracle = Oracle(batch, upstream, **options)
    eager = evaluate(eager_logprob, batch, upstream, **options)
    actual = on_device(
        linear_logprob, batch, upstream, trained=trained, backend=backend, workspace_bytes=workspace_bytes, **options
    )
    for name in {"hidden", "weight", "bias"} - set(trained):
        oracle.values.pop(f"{name}.grad", None)
    assert_accurate(actual, oracle, eager)
    return actual


# ---- accuracy


@each_backend
@each_dtype
@each_head
@pytest.mark.parametrize("workspace_bytes", [None, 60_000], ids=["one-tile", "tiles"])
@pytest.mark.parametrize(
    "options",
    [{}, {"logit_scale": 0.7, "logit_softcap": 6.0}, {"outputs": ALL_OUTPUTS}, {"shift": True}],
    ids=["plain", "softcap", "outputs", "shift"],
)
def test_primitive(backend, dtype, trained, workspace_bytes, options):
    batch = random_batch((4, 33), 1031, 48, dtype=dtype, bias=True, ignored=0.3, spread=2.0)
    held_to_oracle(batch, trained, backend, workspace_bytes, **options)


@each_backend
@each_dtype
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 8), (5, 17, 16), (64, 8192, 64), (65, 8193, 72)], ids=str)
def test_odd_and_aligned_sizes(backend, dtype, size):
    tokens, vocab, width = size
    batch = random_batch((tokens,), vocab, width, dtype=dtype, spread=2.0)
    held_to_oracle(batch, ("hidden", "weight"), backend)


@each_backend
@each_dtype
def test_peaked_with_a_masked_vocabulary(backend, dtype):
    batch = peaked_batch(2, 64, 2048, 64, dtype=dtype)
    bias = torch.zeros(2048, dtype=dtype)
    bias[100:900] = -torch.inf
    labels = batch.labels.where((batch.labels < 100) | (batch.labels >= 900), batch.labels % 100)
    held_to_oracle(Batch(batch.hidden, batch.weight, labels, bias), TRAINED["trained"], backend)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sequence_sums(backend, dtype):
    """0.01 nat over 512 peaked tokens; logits rounded to bfloat16 are wrong by about 0.9."""
    tokens = 64 if DRY else 512
    batch = peaked_batch(4, tokens, 2048 if DRY else 32768, 256, dtype=dtype)
    truth = eager_logprob(batch.hidden.double(), batch.weight.double(), batch.labels, dtype=torch.float64).sum(-1)
    there = moved(batch)
    ours = sequence_logps(there.hidden, there.weight, there.labels, backend=backend).cpu()
    assert (ours.double() - truth).abs().max() < 0.01


@each_backend
@pytest.mark.parametrize("size", [1e-6, 1.0, 2.0**14])
def test_upstream_of_any_size_in_float16(backend, size):
    """Tiles enter the products in float16, whose range is 6e-8 to 65504."""
    batch = random_batch((64,), 2048, 16, dtype=torch.float16, spread=0.01)
    batch = Batch(0.1 * batch.hidden, 1e-2 * (batch.weight + 1.0), batch.labels)
    upstream = {"logp": torch.full((64,), size)}
    actual = on_device(linear_logprob, batch, upstream, backend=backend)["weight.grad"].double()
    expected = Oracle(batch, upstream).values["weight.grad"]
    # half a step of float16 near 0, or its relative precision
    assert (actual - expected).abs().max() <= max(6e-8, 2e-3 * expected.abs().max())


@each_backend
@each_dtype
@each_head
def test_same_inputs_same_bits(backend, dtype, trained):
    batch = random_batch((4, 65), 1031, 48, dtype=dtype, bias=True, ignored=0.2)
    upstream = random_upstream(batch)
    runs = [on_device(linear_logprob, batch, upstream, trained=trained, backend=backend) for _ in range(3)]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]) and torch.equal(value, runs[2][name]), name


@each_backend
@pytest.mark.parametrize("loss", [DPO(), SPO(), SPO(penalty="hinge", normalization="sum")], ids=["dpo", "spo", "hinge"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("path", [None, "two_pass", "packed", "factorised"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@each_dtype
def test_fused_spo_loss(backend, loss, packed, path, weighted, dtype):
    """Against the same call in float64 on the CPU, in every way that a trained head can go."""
    if dtype == torch.float16 and path in ("packed", "factorised"):
        pytest.skip("a float16 head takes two passes; tests/test_paths.py has the error")
    batch = random_batch((4, 9), 700, 32, dtype=dtype, ignored=0.2)
    shape = (36,) if packed else (4, 9)
    results = []
    for device, kind, name in ((torch.device("cpu"), torch.float64, "torch"), (DEVICE, dtype, backend)):
        hidden = batch.hidden.reshape(*shape, 32).to(device, kind).requires_grad_()
        weight = batch.weight.to(device, kind).requires_grad_()
        value, metrics = fused_spo_loss(
            hidden,
            weight,
            batch.labels.reshape(shape).to(device),
            loss=loss,
            ref_logps=torch.linspace(-60, -50, 4, device=device),
            cu_seqlens=torch.tensor([0, 9, 20, 20, 36], device=device) if packed else None,
            token_weights=torch.linspace(0, 2, 36, device=device).reshape(shape) if weighted else None,
            path=path if kind == dtype else "two_pass",
            backend=name,
        )
        value.backward()
        results.append({"loss": value, **metrics, "dh": hidden.grad, "dw": weight.grad})
    for name, expected in results[0].items():
        ours, expected = results[1][name].detach().cpu().double(), expected.detach().double()
        # gradients of 16-bit inputs are rounded once themselves, and each of their terms once, of kept tiles twice
        tolerance = 2 * torch.finfo(dtype).eps if name in ("dh", "dw") else 1e-5
        assert (ours - expected).norm() <= max(tolerance, 1e-5) * expected.norm() + 1e-6, name


@each_kernel_backend
@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 511, 513, 4095, 8191, 8192, 8193, 20000])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.8, 20.0)], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_of_any_width(backend, columns, transform, dtype):
    """The kernels against the torch tiles in float64, with the operand in place and in half precision."""
    rows = 3
    tile = 5 * torch.randn(rows, columns, device=DEVICE)
    labels = torch.tensor([0, columns - 1, columns], device=DEVICE)
    out = None if dtype == torch.float32 else torch.empty(rows, columns, dtype=dtype, device=DEVICE)
    found = []
    for owner, x, target in ((TorchBackend(), tile.double(), None), (load_backend(backend), tile.clone(), out)):
        stats = TokenStats.start(rows, x, True)
        rescale = torch.empty(rows, dtype=x.dtype, device=DEVICE)
        products = x.clone()
        given = Tile(x, labels, transform, out=target)
        owner.tile_stats(given, stats, rescale=rescale)
        operand = given.written.double()
        lse = stats.max + stats.sum.log()
        grads = TokenGrads(lse_value=lse, logp=torch.ones_like(lse))
        given = Tile(products, labels, transform, out=target)
        owner.tile_grad(given, grads)
        gradient = given.written.double()
        found.append([value.double() for value in (*vars(stats).values(), rescale)] + [operand, gradient])
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
