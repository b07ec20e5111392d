"""sequence_logps against float64 sums from full logits."""

import itertools

import pytest
import torch
from loss_oracle import (
    HIDDEN,
    PAIRS,
    TOKENS,
    VOCAB,
    assert_near,
    make_batch,
    oracle_sums,
)

from spo_kernels import sequence_logps
from spo_kernels.testing import Batch, random_batch, worst_error


@pytest.mark.parametrize("bounds_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_sequence_logps(backend, layout, shift, dtype, bounds_dtype):
    batch = make_batch(dtype)
    batch.labels[2] = -100
    options = dict(shift=shift, backend=backend)
    leaf = batch.hidden.requires_grad_()
    if layout == "padded":
        sums = sequence_logps(leaf, batch.weight, batch.labels, **options)
    else:
        bounds = torch.arange(0, 2 * PAIRS * TOKENS + 1, TOKENS, dtype=bounds_dtype)
        sums = sequence_logps(leaf.flatten(0, 1), batch.weight, batch.labels.flatten(), cu_seqlens=bounds, **options)
    assert sums.shape == (2 * PAIRS,) and sums.dtype == torch.float32
    assert sums[2] == 0
    assert_near(sums.detach(), oracle_sums(batch, shift=shift).detach(), "sums")
    coefficients = torch.arange(1.0, 2 * PAIRS + 1)
    sums.backward(coefficients)
    found, leaf.grad = leaf.grad, None
    double = batch.hidden.detach().double().requires_grad_()
    oracle_sums(Batch(double, batch.weight, batch.labels), shift=shift).backward(coefficients.double())
    assert worst_error(found, double.grad) <= 2 * torch.finfo(dtype).eps * double.grad.abs().max()


def test_packed_shift_stays_inside_its_sequence(backend):
    """The last hidden state of a sequence predicts nothing, least of all the next one's first label."""
    batch = random_batch((9,), VOCAB, HIDDEN)
    bounds = torch.tensor([0, 4, 4, 5, 9])
    found = sequence_logps(batch.hidden, batch.weight, batch.labels, cu_seqlens=bounds, shift=True, backend=backend)
    for sequence, (start, stop) in enumerate(itertools.pairwise(bounds)):
        part = Batch(batch.hidden[start:stop], batch.weight, batch.labels[start:stop])
        assert_near(found[sequence], oracle_sums(part, shift=True), f"sequence {sequence}")
    assert found[1] == 0 and found[2] == 0


def test_no_sequences(backend):
    batch = random_batch((0,), VOCAB, HIDDEN)
    bounds = torch.zeros(1, dtype=torch.int64)
    found = sequence_logps(batch.hidden, batch.weight, batch.labels, cu_seqlens=bounds, backend=backend)
    assert found.shape == (0,)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_long_sums_keep_their_last_digits(backend, layout):
    """32,768 tokens: the sum is good to a few float32 roundings, not to one for each token."""
    tokens = 1 << 15
    batch = random_batch((2, tokens), 17, 8, dtype=torch.bfloat16)
    hidden, labels, bounds = batch.hidden, batch.labels, None
    if layout == "packed":
        hidden, labels, bounds = hidden.flatten(0, 1), labels.flatten(), torch.arange(3) * tokens
    found = sequence_logps(hidden, batch.weight, labels, cu_seqlens=bounds, backend=backend)
    truth = oracle_sums(batch)
    assert ((found - truth) / truth).abs().max() < 5e-7
