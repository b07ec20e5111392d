"""On a GPU: ops, torch.compile, CUDA graphs, host synchronisation, memory, wide offsets, compute-sanitizer."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from gpu_inputs import (
    CUDA,
    DEVICE,
    each_backend,
    each_dtype,
    each_kernel_backend,
    importable,
    moved,
    needs_cuda,
    on_gpu,
)
from test_ops import Recorder, through_operators

from spo_kernels import fused_spo_loss, linear_logprob
from spo_kernels.backends.contract import LogitTransform, Tile, TokenGrads, TokenStats
from spo_kernels.backends.registry import load_backend
from spo_kernels.testing import Batch, eager_logprob, random_batch

ROOT = Path(__file__).parent.parent
MIB = 1 << 20
pytestmark = on_gpu
TRAINED = {"trained": ("hidden", "weight"), "frozen": ("hidden",), "weight": ("weight",)}
each_head = pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)

# ---- torch's machinery


def near(ours, expected):
    """Equal up to the order of sums: a product over other rows, or other tiles, rounds elsewhere."""
    ours, expected = ours.detach().double(), expected.detach().double()
    assert (ours - expected).norm() <= 5e-3 * expected.norm() + 1e-6


def loss_of(hidden, weight, labels, reference, backend, path=None):
    options = {"loss": "dpo", "ref_logps": reference, "backend": backend, "path": path}
    value, metrics = fused_spo_loss(hidden, weight, labels, **options)
    return value, metrics["rewards/margins"]


def dpo_inputs(dtype=torch.bfloat16, tokens=33, vocab=2048, width=64, seed=0):
    batch = random_batch((4, tokens), vocab, width, dtype=dtype, ignored=0.3, seed=seed)
    return moved(batch), torch.linspace(-200, -190, 4, device=DEVICE)


@needs_cuda
@each_kernel_backend
@each_dtype
def test_opcheck(monkeypatch, dtype, backend):
    """Every operator with the arguments that a call gives it."""
    batch = moved(random_batch((4, 5), 64, 16, dtype=dtype, bias=True, ignored=0.3))
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    through_operators(monkeypatch)
    with Recorder() as recorder:
        outputs = ("entropy", "log_sum_p2")
        logp, extras = linear_logprob(hidden, batch.head(), batch.labels, outputs=outputs, backend=backend)
        (logp.sum() + extras["entropy"].sum()).backward()
        loss_of(hidden, weight, batch.labels, torch.zeros(4, device=DEVICE), backend, "two_pass")[0].backward()
    names = {func.overloadpacket.__name__ for func, _, _ in recorder.calls}
    assert names >= {"linear_logprob_fwd", "linear_logprob_bwd", "pair_loss"}
    for func, args, kwargs in recorder.calls:
        args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
        torch.library.opcheck(func, tuple(args), kwargs)


@needs_cuda
@each_kernel_backend
@pytest.mark.skipif(not importable("triton"), reason="torch.compile itself needs Triton on a GPU")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_as_one_graph(mode, backend):
    batch, reference = dpo_inputs()
    compiled = torch.compile(loss_of, fullgraph=True, mode=mode)
    results = []
    for function in (loss_of, compiled, compiled, compiled):
        hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
        value, margin = function(hidden, weight, batch.labels, reference, backend)
        value.backward()
        results.append([value.detach().clone(), margin.clone(), hidden.grad.clone(), weight.grad.clone()])
    for compiled_result in results[1:]:
        for ours, expected in zip(compiled_result, results[0], strict=True):
            near(ours, expected)


@needs_cuda
@each_kernel_backend
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_graph_capture(frozen, backend):
    """Forward and backward are recorded once and replayed with other hidden states, labels and ignored positions."""
    batch, reference = dpo_inputs()
    hidden = batch.hidden.clone().requires_grad_()
    weight = batch.weight.clone().requires_grad_(not frozen)
    labels = batch.labels.clamp_min(0)  # none ignored: what is launched is what the recording launches

    def step():
        value, margin = loss_of(hidden, weight, labels, reference, backend)
        hidden.grad = weight.grad = None
        value.backward()
        return value, margin

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    hidden.grad = weight.grad = None
    labels.copy_(batch.labels)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, margin = step()
    for seed in (0, 1):
        other, _ = dpo_inputs(seed=seed)
        with torch.no_grad():
            hidden.copy_(other.hidden)
            labels.copy_(other.labels)
        graph.replay()
        fresh = other.hidden.clone().requires_grad_()
        head = weight.detach().clone().requires_grad_(not frozen)
        expected, expected_margin = loss_of(fresh, head, other.labels, reference, backend)
        expected.backward()
        near(value, expected)
        near(margin, expected_margin)
        near(hidden.grad, fresh.grad)
        if not frozen:
            near(weight.grad, head.grad)


@needs_cuda
@each_kernel_backend
@each_head
def test_the_host_waits_once(trained, backend):
    """For the number of tokens that count, in the forward; the backward knows it. Three products wait for lengths."""
    batch, reference = dpo_inputs()
    hidden = batch.hidden.requires_grad_("hidden" in trained)
    weight = batch.weight.requires_grad_("weight" in trained)
    loss_of(hidden, weight, batch.labels, reference, backend, path="two_pass")[0].backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value, _ = loss_of(hidden, weight, batch.labels, reference, backend, path="two_pass")
        waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
        torch.cuda.set_sync_debug_mode("error")
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) <= 1, waits


@each_backend
@needs_cuda
def test_autocast_and_strides(backend):
    batch, reference = dpo_inputs(torch.float32)
    strided = torch.empty(4, 33, 128, device=DEVICE)[..., ::2].copy_(batch.hidden)
    head = batch.weight.t().contiguous().t()
    with torch.autocast("cuda", torch.bfloat16):
        ours, _ = loss_of(strided.requires_grad_(), head, batch.labels, reference, backend)
    expected, _ = loss_of(batch.hidden.bfloat16(), batch.weight.bfloat16(), batch.labels, reference, "torch")
    near(ours, expected)


@needs_cuda
@each_kernel_backend
@pytest.mark.skipif(CUDA and torch.cuda.device_count() < 2, reason="one GPU")
def test_another_device_than_the_current_one(backend):
    batch = random_batch((2, 5), 300, 16)
    batch = Batch(batch.hidden.to("cuda:1"), batch.weight.to("cuda:1"), batch.labels.to("cuda:1"))
    ours = linear_logprob(batch.hidden, batch.weight, batch.labels, backend=backend)
    torch.testing.assert_close(ours, eager_logprob(batch.hidden, batch.weight, batch.labels))
    assert torch.cuda.current_device() == 0


@needs_cuda
@each_kernel_backend
def test_two_streams_at_once(backend):
    """Each with tiles and gradients of its own, launched in turns: the bits of one alone."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs = [dpo_inputs(tokens=257, vocab=8200, seed=seed) for seed in range(2)]

    def gradients(batch, reference):
        hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
        value, _ = loss_of(hidden, weight, batch.labels, reference, backend)
        value.backward()
        return value.detach(), hidden.grad, weight.grad

    alone = [gradients(*batch) for batch in inputs]
    torch.cuda.synchronize()
    found = [[], []]
    for _ in range(5):
        for stream, batch, results in zip(streams, inputs, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(gradients(*batch))
    torch.cuda.synchronize()
    for expected, results in zip(alone, found, strict=True):
        for result in results:
            assert all(torch.equal(ours, value) for ours, value in zip(result, expected, strict=True))


# ---- memory


@needs_cuda
@each_kernel_backend
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_peak_memory(trained, backend):
    """Gradients, the workspace and per-token rows: 1 GiB of logits would show."""
    n, width, vocab, workspace = 4096, 1024, 65536, 64 * MIB
    hidden = torch.randn(n, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=trained)
    labels = torch.randint(vocab, (n,), device=DEVICE)

    def step():
        linear_logprob(hidden, weight, labels, workspace_bytes=workspace, backend=backend).sum().backward()

    step()
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    extra = torch.cuda.max_memory_allocated() - before
    # dH and the kept d logp/dH in bfloat16; a trained head adds dW
    gradients = 2 * 2 * n * width + (2 * vocab * width if trained else 0)
    assert extra < gradients + workspace + 16 * MIB, f"{extra / MIB:.0f} MiB"


@needs_cuda
@each_kernel_backend
def test_more_than_two_to_the_31_elements(backend):
    """The last rows of a tile of 2.2e9 float32, and of its bfloat16 operand."""
    tiles = load_backend(backend)
    rows, columns = 270_000, 8192
    needed = rows * columns * 6 + 2048 * MIB
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")
    tile = torch.zeros(rows, columns, device=DEVICE)
    tail = torch.randn(4, columns, device=DEVICE)
    tile[-4:] = tail
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    labels = torch.full((rows,), 7, device=DEVICE)
    stats = TokenStats.start(rows, tile[:0, 0], False)
    rescale = torch.empty(rows, device=DEVICE)
    tiles.tile_stats(Tile(tile, labels, LogitTransform(), out=out), stats, rescale=rescale)
    lse = stats.max + stats.sum.log()
    torch.testing.assert_close(lse[-4:], tail.logsumexp(1))
    expected = (tail - tail.amax(1, keepdim=True)).exp()
    expected[:, 7] = 0.0
    torch.testing.assert_close(out[-4:].float(), expected, rtol=1e-2, atol=1e-6)
    grads = TokenGrads(lse, logp=torch.ones(rows, device=DEVICE))
    tiles.tile_grad(Tile(tile, labels, LogitTransform()), grads)
    expected = -tail.softmax(1)
    expected[:, 7] += 1.0
    torch.testing.assert_close(tile[-4:], expected, rtol=1e-4, atol=1e-6)


# ---- the sanitizer


def _sanitizer():
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


# initcheck must see whatever writes what the kernels read, so it watches a run of nothing but them and torch's own
SANITIZED = [("memcheck", "loss", "_"), ("initcheck", "tiles", ""), ("synccheck", "tiles", "_")]
# cuBLAS cannot run under racecheck
SANITIZED += [("racecheck", "tiles", "tile_"), ("racecheck", "pairs", "pair_loss")]


@needs_cuda
@each_kernel_backend
@pytest.mark.skipif(_sanitizer() is None, reason="no compute-sanitizer in PATH or CUDA_HOME")
@pytest.mark.parametrize(("tool", "what", "kernel"), SANITIZED)
def test_sanitizer(tool, what, kernel, backend):
    """Ragged sizes, without torch's caching allocator, so that a stray access is seen. Only our kernels can race."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    command = [_sanitizer(), "--tool", tool, "--error-exitcode", "9"]
    command += ["--kernel-name", f"kns={kernel}"] if kernel else []
    command += [sys.executable, str(ROOT / "tests" / "gpu_short_run.py"), backend, what]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
