"""linear_logprob gives the same bits: run to run, from many threads, whatever stands in ignored rows."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from spo_kernels import linear_logprob
from spo_kernels.testing import check_linear_logprob, evaluate, random_batch, random_upstream

ALL_OUTPUTS = ("lse", "entropy", "correct", "log_sum_p2")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def same_bits(left, right):
    """Bit for bit, so NaN equals NaN and 0 differs from -0."""

    def bits(tensor):
        return tensor.contiguous().flatten().view(torch.uint8)

    return left.keys() == right.keys() and all(torch.equal(bits(left[name]), bits(right[name])) for name in left)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",)], ids=["trained", "frozen"])
def test_same_inputs_same_bits(backend, threads, count, dtype, trained):
    threads(count)
    batch = random_batch((4, 65), 1031, 48, dtype=dtype, bias=True, ignored=0.2)
    upstream = random_upstream(batch)
    runs = [evaluate(linear_logprob, batch, upstream, trained=trained, backend=backend) for _ in range(3)]
    assert same_bits(runs[0], runs[1])
    assert same_bits(runs[0], runs[2])


@pytest.mark.parametrize("count", [1, 2])
def test_any_number_of_threads_gives_the_answer(backend, threads, count):
    threads(count)
    batch = random_batch((4, 33), 515, 48, bias=True, ignored=0.2)
    check_linear_logprob(linear_logprob, batch, backend=backend, workspace_bytes=400_000, outputs=ALL_OUTPUTS)


def test_calls_from_many_threads_at_once(backend):
    """The native code releases the GIL: callers must not share buffers."""
    batches = [random_batch((4, 33), 257, 24, bias=True, ignored=0.2, seed=seed) for seed in range(6)]
    upstreams = [random_upstream(batch) for batch in batches]

    def run(index):
        return evaluate(linear_logprob, batches[index], upstreams[index], backend=backend)

    alone = [run(index) for index in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(run, list(range(6)) * 4))
    assert all(same_bits(found, alone[index % 6]) for index, found in enumerate(together))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",)], ids=["trained", "frozen"])
def test_ignored_rows_may_hold_anything(backend, shift, trained):
    """A prompt's hidden states never enter a product: NaN there changes nothing and gets gradient 0."""
    batch = random_batch((4, 6), 53, 12, bias=True, ignored=0.5)
    unused = batch.labels == -100
    if shift:
        unused = unused.roll(-1, dims=-1)
        unused[:, -1] = True
    upstream = random_upstream(batch)
    clean = evaluate(linear_logprob, batch, upstream, trained=trained, shift=shift, backend=backend)
    batch.hidden[unused] = torch.nan
    upstream["logp"][batch.labels == -100] = torch.nan
    spoiled = evaluate(linear_logprob, batch, upstream, trained=trained, shift=shift, backend=backend)
    assert same_bits(clean, spoiled)
    assert not spoiled["hidden.grad"][unused].any()


def test_environment_chooses_the_backend(backend, monkeypatch):
    batch = random_batch((4, 33), 257, 24)
    upstream = random_upstream(batch)
    asked = evaluate(linear_logprob, batch, upstream, backend=backend)
    monkeypatch.setenv("SPO_BACKEND", backend)
    assert same_bits(evaluate(linear_logprob, batch, upstream), asked)
