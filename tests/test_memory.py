"""What is created and multiplied: no [N, V] tensor, the byte budget kept, masked rows in no product."""

import subprocess
import sys
import textwrap

import pytest
import torch

from spo_kernels import fused_spo_loss, linear_logprob
from spo_kernels.engine.memory import in_huge_pages
from spo_kernels.testing import TensorMeter, eager_logprob, evaluate, random_batch, random_upstream

N, V, H = 128, 2048, 32
LOGITS = N * V * 4
KIB = 1 << 10


def metered(function, batch, **options):
    upstream = random_upstream(batch)
    with TensorMeter() as meter:
        evaluate(function, batch, upstream, **options)
    return meter


def products(meter, rows):
    """Matrix products in units of one [rows, H] x [H, V] product."""
    return meter.flops / (2 * rows * V * H)


TRAINED = {"trained": ("hidden", "weight"), "frozen": ("hidden",), "weight-only": ("weight",)}
each_head = pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)


def test_the_meter_sees_eager_logits():
    meter = metered(eager_logprob, random_batch((N,), V, H))
    assert meter.largest >= LOGITS
    assert meter.peak >= 2 * LOGITS
    assert products(meter, N) == 3


@each_head
@pytest.mark.parametrize("workspace", [160 * KIB, 384 * KIB], ids=lambda size: f"{size // KIB}K")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_workspace_is_respected(backend, trained, workspace, dtype):
    """Beyond the gradients, a row of statistics and copies of the kept rows, nothing exceeds the budget."""
    batch = random_batch((N,), V, H, dtype=dtype)
    meter = metered(linear_logprob, batch, trained=trained, backend=backend, workspace_bytes=workspace)
    gradients = sum(getattr(batch, name).nbytes for name in trained)
    rows = 3 * N * H * 4  # kept hidden rows, their gradient in float32, one product of a tile with the weight
    statistics = 16 * N * 8 + N * (V // 128) * 4  # a few scalars and the block masses per token
    assert meter.peak <= gradients + rows + statistics + workspace
    assert meter.largest <= max(V * H * batch.weight.element_size(), workspace, N * H * 4)
    assert meter.largest < LOGITS / 2


@each_head
def test_the_default_workspace(backend, trained):
    """32 MiB: a [N, V] of 64 MiB does not appear."""
    batch = random_batch((2048,), 8192, 8)
    meter = metered(linear_logprob, batch, trained=trained, backend=backend)
    assert meter.peak <= (32 << 20) + (4 << 20)


def test_no_second_gradient_of_the_weight(backend):
    """bfloat16: dW is accumulated slice by slice, with no float32 [V, H] beside it."""
    batch = random_batch((32,), V, 256, dtype=torch.bfloat16)
    meter = metered(linear_logprob, batch, trained=("hidden", "weight"), backend=backend, workspace_bytes=256 * KIB)
    assert meter.peak < 1.5 * batch.weight.nbytes


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_loss_keeps_the_budget_too(backend, layout):
    batch = random_batch((4, N // 4), V, H)
    hidden, labels, options = batch.hidden, batch.labels, {}
    if layout == "packed":
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
        options = dict(cu_seqlens=torch.arange(5) * (N // 4))
    leaves = hidden.requires_grad_(), batch.weight.requires_grad_()
    with TensorMeter() as meter:
        loss, _ = fused_spo_loss(
            *leaves,
            labels,
            ref_hidden=hidden.detach(),
            ref_head=batch.weight.detach(),
            token_metrics=True,
            workspace_bytes=256 * KIB,
            backend=backend,
            **options,
        )
        loss.backward()
    assert meter.peak < LOGITS / 2
    assert meter.largest <= V * H * 4


@pytest.mark.parametrize(
    ("trained", "expected"),
    [((), 1), (("hidden",), 2), (("hidden", "weight"), 4), (("hidden", "weight", "bias"), 4), (("weight",), 3)],
    ids=["inference", "frozen", "trained", "trained-bias", "weight-only"],
)
@pytest.mark.parametrize("workspace_bytes", [160 * KIB, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_number_of_products(trained, expected, workspace_bytes, dtype):
    """Two for a frozen head, four for a trained one, one without gradients; ignored rows are in none."""
    batch = random_batch((N,), V, H, dtype=dtype, bias=True, ignored=0.5)
    rows = int((batch.labels != -100).sum())
    options = dict(backend="torch", workspace_bytes=workspace_bytes)
    if trained:
        meter = metered(linear_logprob, batch, trained=trained, **options)
    else:
        with TensorMeter() as meter, torch.no_grad():
            linear_logprob(batch.hidden, batch.head(), batch.labels, **options)
    assert products(meter, rows) == expected


def test_native_products_cover_kept_rows_only(backend):
    """Whatever a backend leaves to torch's matrix products is made of kept rows."""
    batch = random_batch((N,), V, H, ignored=0.75)
    rows = int((batch.labels != -100).sum())
    meter = metered(linear_logprob, batch, trained=("hidden", "weight"), backend=backend)
    assert products(meter, rows) <= 4


def test_all_ignored_makes_no_product(backend):
    meter = metered(linear_logprob, random_batch((N,), V, H, ignored=1.0), backend=backend)
    assert meter.flops == 0


def test_the_frozen_reference_saves_nothing(backend):
    """Inference keeps no tensor beside its result."""
    batch = random_batch((N,), V, H)
    with TensorMeter() as meter:
        result = linear_logprob(batch.hidden, batch.weight, batch.labels, backend=backend)
        assert meter.live <= result.nbytes


def test_graph_holds_no_logits(backend):
    """Between forward and backward: the inputs, a few numbers a token, and at most one [N, H]."""
    batch = random_batch((N,), V, H)
    batch.hidden.requires_grad_()
    batch.weight.requires_grad_()
    with TensorMeter() as meter:
        result = linear_logprob(batch.hidden, batch.weight, batch.labels, backend=backend)
        assert meter.live <= result.nbytes + N * H * 4 + 8 * N * 8 + N * (V // 128) * 4


_RSS = """
    import resource, sys
    import torch
    from spo_kernels import linear_logprob
    from spo_kernels.testing import random_batch

    def step(tokens, vocab):
        batch = random_batch((tokens,), vocab, 16)
        hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
        logp = linear_logprob(hidden, weight, batch.labels, backend=sys.argv[1], workspace_bytes=8 << 20)
        logp.backward(torch.ones(tokens))

    torch.set_num_threads(1)
    step(64, 4096)  # load every library
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(2048, 16384)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_process_stays_small(backend):
    """Native buffers count as well: 128 MiB of float32 logits, and the process grows by less than half of that."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_RSS), backend], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) * KIB < 2048 * 16384 * 4 / 2


def test_huge_pages_leave_the_values_alone():
    for elements in (0, 1, 1 << 18, 3 << 20):
        buffer = in_huge_pages(torch.empty(elements))
        buffer.fill_(2.0)
        assert buffer.sum().item() == 2.0 * elements
