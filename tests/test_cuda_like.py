"""Every public call on tensors that only say they are on a GPU: what it waits for, launches, multiplies and aligns."""

from collections import Counter

import pytest
import torch
from cuda_like import CudaLike, EmulatedKernels, pretend_a_gpu
from gpu_calls import CALLS, near

from spo_kernels import fused_spo_loss
from spo_kernels.engine import workspace
from spo_kernels.testing import random_batch

DTYPES = [torch.float32, torch.bfloat16]
each_call = pytest.mark.parametrize("name", CALLS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def gpu(monkeypatch):
    return pretend_a_gpu(monkeypatch)


@pytest.fixture(params=["torch", "cuda"])
def backend(request):
    """What runs between the products: torch's operations, or the CUDA kernels, emulated."""
    if request.param == "cuda":
        request.getfixturevalue("kernels")
    return request.param


@pytest.fixture
def kernels(emulated_cuda, monkeypatch):
    """The emulated backend's, noted."""
    noted = EmulatedKernels(emulated_cuda._native)
    monkeypatch.setattr(emulated_cuda, "_native", noted)
    return noted


def on_cpu(name, dtype):
    return CALLS[name][0](lambda value: value, dtype, "torch")


@each_dtype
@each_call
def test_every_call(gpu, backend, name, dtype):
    """As on a CPU, with the waits of the table, and every matrix aligned although the vocabulary is odd."""
    call, waits = CALLS[name]
    near(call(CudaLike, dtype, backend), on_cpu(name, dtype), dtype)
    assert gpu.waits == waits
    assert gpu.misaligned == set()


@each_call
def test_every_call_while_a_graph_is_recorded(gpu, backend, name):
    """Without a wait, which would end the recording, and with as many products as otherwise."""
    call, _ = CALLS[name]
    call(CudaLike, torch.bfloat16, backend)
    eager = len(gpu.products)
    with gpu.capture():
        found = call(CudaLike, torch.bfloat16, backend)
    near(found, on_cpu(name, torch.bfloat16), torch.bfloat16)
    if "small" not in name:  # all labels are more tokens than those that count
        assert len(gpu.products) == 2 * eager


def trained_step(labels=None, **options):
    """A pair loss by what is the default, bfloat16."""
    batch = random_batch((4, 6), 256, 16, dtype=torch.bfloat16, ignored=0.3)
    labels = batch.labels if labels is None else labels
    hidden, weight = (CudaLike(value).requires_grad_() for value in (batch.hidden, batch.weight))
    reference = CudaLike(torch.zeros(4))
    given = {"loss": "dpo", "ref_logps": reference, "backend": "cuda", **options}
    loss, _ = fused_spo_loss(hidden, weight, CudaLike(labels), **given)
    return loss


def test_a_recorded_step_takes_three_products(gpu, kernels):
    """As many tokens as there are labels, where the host does not know how many count."""
    with gpu.capture():
        torch.autograd.backward([trained_step()])
    assert sum(rows * depth * columns for rows, depth, columns in gpu.products) == 3 * 24 * 16 * 256


@pytest.mark.parametrize("ignore_index", [-100, None])
def test_a_recording_launches_what_a_step_without_ignored_labels_did(gpu, kernels, ignore_index):
    """So that no kernel is compiled inside it."""
    labels, options = torch.randint(256, (4, 6)), {"ignore_index": ignore_index}
    torch.autograd.backward([trained_step(labels, **options)])
    warm = set(kernels.specialised)
    kernels.specialised.clear()
    with gpu.capture():
        torch.autograd.backward([trained_step(labels, **options)])
    assert kernels.specialised == warm != set()


def launches(gpu, monkeypatch, columns, path):
    """Of the forward and of the backward, where slices of the vocabulary have so many columns."""
    for name, value in (("_BLOCK_COLUMNS", columns), ("_EXPONENTIAL_CELLS", 0), ("_CELLS", 0)):
        monkeypatch.setattr(workspace, name, {"cuda": value})
    gpu.launches.clear()
    loss = trained_step(path=path)
    forward = Counter(gpu.launches)
    gpu.launches.clear()
    torch.autograd.backward([loss])
    return forward, Counter(gpu.launches)


TILE = {"tile_stats": 1, "sub": 1, "scale_rows": 1}  # beside products; labels are counted from the slice's first class


@pytest.mark.parametrize(
    "path, forward, backward",
    [
        # the maximum so far is kept
        ("packed", TILE | {"mm": 2, "addmm": 1, "clone": 1}, {}),
        ("two_pass", TILE | {"mm": 1, "addmm": 1}, {"mm": 2, "tile_grad": 1, "sub": 1}),
    ],
)
def test_launches_of_a_slice(gpu, kernels, monkeypatch, path, forward, backward):
    """Three or four products and a pass or two over the tile: its gradient is rounded as it is written."""
    few, many = (launches(gpu, monkeypatch, columns, path) for columns in (128, 64))
    for fewer, more, expected in zip(few, many, (forward, backward), strict=True):
        assert more - fewer == Counter({name: 2 * count for name, count in expected.items()})


def test_a_loss_s_own_upstream_costs_no_pass_over_the_gradients(gpu, kernels):
    """Its kernel leaves rows of factor 1; anything else multiplies them."""
    loss = trained_step(path="packed")
    gpu.launches.clear()
    torch.autograd.backward([loss])
    assert Counter(gpu.launches) == {"ones_like": 1, "clone": 2, "scale_rows": 2}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a, b: torch.mm(a, b.float()),
        lambda a, b: torch.mm(a, b, out_dtype=torch.float64),
        lambda a, b: torch.mm(a.float(), b.float(), out_dtype=torch.bfloat16),
        lambda a, b: torch.mm(a, b, out_dtype=torch.float32, out=a.clone()),
        lambda a, b: torch.addmm(a, a, b, out_dtype=torch.float32),
    ],
)
def test_what_torch_s_products_on_a_gpu_refuse(gpu, wrong):
    a, b = (CudaLike(torch.ones(8, 8, dtype=torch.bfloat16)) for _ in range(2))
    with pytest.raises(RuntimeError, match="product of"):
        wrong(a, b)


def test_what_is_not_aligned(gpu):
    values = CudaLike(torch.ones(9, 24))
    torch.mm(values[:8, :8], values[1:9, :8])
    assert gpu.misaligned == set()
    torch.mm(values[:8, 1:9], values[:8, :8].contiguous().view(-1)[:63].view(9, 7)[:8])
    assert gpu.misaligned == {"elsewhere: a of a product", "elsewhere: b of a product"}
