"""The embedding uncertainty against an explicit inverse, and on its way into a loss."""

import pytest
import torch

from spo_kernels import fused_spo_loss
from spo_kernels.extras.uncertainty import EmbeddingUncertainty
from spo_kernels.losses import UncertaintyDPO
from spo_kernels.testing import TensorMeter, random_batch

SIZE = 6


def embeddings(rows, seed=0, dtype=torch.float32):
    return torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("regularization", [1e-3, 1.0, 50.0])
def test_against_the_inverse(regularization, dtype):
    seen, asked = embeddings(40, dtype=dtype), embeddings(9, seed=1, dtype=dtype)
    uncertainty = EmbeddingUncertainty(SIZE, regularization=regularization)
    for batch in (seen[:7], seen[7:7], seen[7:]):
        uncertainty.update(batch)
    inverse = torch.linalg.inv(regularization * torch.eye(SIZE).double() + seen.double().T @ seen.double())
    expected = torch.einsum("nd,de,ne->n", asked.double(), inverse, asked.double()).sqrt()
    found = uncertainty(asked)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_it_falls_where_data_is_seen():
    uncertainty, asked = EmbeddingUncertainty(SIZE), torch.eye(SIZE)
    before = uncertainty(asked)
    torch.testing.assert_close(before, torch.ones(SIZE))
    uncertainty.update(torch.eye(SIZE)[:1].repeat(99, 1))
    after = uncertainty(asked)  # the factor of the first call must not linger
    torch.testing.assert_close(after, torch.tensor([0.1] + [1.0] * (SIZE - 1)))


def test_ill_conditioned():
    """Nearly parallel embeddings of norm 1e4: nothing negative under the root, nothing NaN."""
    uncertainty = EmbeddingUncertainty(SIZE, regularization=1e-6)
    uncertainty.update(1e4 + embeddings(500))
    found = uncertainty(torch.cat([1e4 + embeddings(5, seed=1), torch.zeros(1, SIZE)]))
    assert found.isfinite().all() and (found >= 0).all() and found[-1] == 0


def test_into_the_loss():
    """Its output is a per-pair input: an uncertain chosen response lowers the gradient."""
    batch, gradients = random_batch((4, 5), 17, SIZE), []
    uncertainty = EmbeddingUncertainty(SIZE)
    uncertainty.update(embeddings(20))
    rejected = uncertainty(embeddings(2, seed=1))
    for chosen in (rejected, uncertainty(30 * embeddings(2, seed=1))):
        hidden = batch.hidden.clone().requires_grad_()
        loss, _ = fused_spo_loss(
            hidden,
            batch.weight,
            batch.labels,
            loss=UncertaintyDPO(),
            ref_logps=torch.full((4,), -12.0),
            pair_inputs={"chosen_uncertainty": chosen, "rejected_uncertainty": rejected},
        )
        loss.backward()
        gradients.append(hidden.grad.norm())
    assert 0 < gradients[1] < 0.5 * gradients[0]


@pytest.mark.parametrize("bound", [1.0, 15.0])
def test_the_pessimistic_head_is_the_worst_of_its_region(bound):
    """On the region's edge, at AdvPO's formula, and lower than any other head of the region."""
    uncertainty, draw = EmbeddingUncertainty(SIZE, regularization=0.5), torch.Generator().manual_seed(3)
    uncertainty.update(embeddings(40))
    current, reference = 3 * embeddings(9, seed=1) + 1, embeddings(5, seed=2)
    head = torch.randn(SIZE, generator=draw, dtype=torch.float64)
    found = uncertainty.pessimistic_head(head, current, reference, bound=bound)
    matrix, gap = uncertainty.matrix, (current.double().mean(0) - reference.double().mean(0))
    inverse = torch.linalg.inv(matrix)
    rate = (gap @ inverse @ gap / bound).sqrt()
    torch.testing.assert_close(found, head - inverse @ gap / rate)
    torch.testing.assert_close((found - head) @ matrix @ (found - head), torch.tensor(bound).double())
    worst = gap @ found
    torch.testing.assert_close(worst, gap @ head - (bound * gap @ inverse @ gap).sqrt())
    for _ in range(200):
        step = torch.randn(SIZE, generator=draw, dtype=torch.float64)
        assert gap @ (head + step * (bound / (step @ matrix @ step)).sqrt()) >= worst
    assert torch.equal(uncertainty.pessimistic_head(head, reference, reference), head)


def test_bad_input_of_the_pessimistic_head():
    uncertainty, head, rows = EmbeddingUncertainty(SIZE), torch.ones(SIZE), torch.ones(2, SIZE)
    for arguments, message in (
        ((head[:2], rows, rows), r"head must have shape \[6\], got \[2\]"),
        ((head, rows[0], rows), r"current must have shape \[n, 6\], got \[6\]"),
        ((head, rows, rows[:0]), "reference must hold at least one embedding"),
    ):
        with pytest.raises(ValueError, match=message):
            uncertainty.pessimistic_head(*arguments)
    with pytest.raises(ValueError, match="bound must be a positive number, got 0"):
        uncertainty.pessimistic_head(head, rows, rows, bound=0)


def test_streaming_memory():
    """One [D, D] factor and copies of one batch, whatever was seen before."""
    size, rows = 64, 32
    uncertainty = EmbeddingUncertainty(size)
    with TensorMeter() as meter:
        for _ in range(20):
            uncertainty.update(torch.randn(rows, size))
        uncertainty(torch.randn(rows, size))
    assert meter.peak <= 3 * size * size * 8 + 6 * rows * size * 8


@pytest.mark.parametrize("method", ["update", "__call__"])
def test_bad_input(method):
    call = getattr(EmbeddingUncertainty(SIZE), method)
    for wrong, error, message in (
        ([[1.0]], TypeError, "embeddings must be a torch.Tensor"),
        (torch.ones(SIZE), ValueError, r"embeddings must have shape \[n, 6\], got \[6\]"),
        (torch.ones(2, 5), ValueError, r"got \[2, 5\]"),
        (torch.ones(2, SIZE).long(), TypeError, "embeddings must be floating point, got torch.int64"),
        (torch.ones(2, SIZE).index_fill(0, torch.tensor(1), torch.nan), ValueError, "finite, but row 1 is not"),
    ):
        with pytest.raises(error, match=message):
            call(wrong)


def test_bad_arguments():
    for size in (0, 1.5, True):
        with pytest.raises(ValueError, match="size must be a whole number of at least 1"):
            EmbeddingUncertainty(size)
    with pytest.raises(ValueError, match="regularization must be a positive number, got 0"):
        EmbeddingUncertainty(3, regularization=0)
