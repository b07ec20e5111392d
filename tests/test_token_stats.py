"""The merge of running softmaxes, against one look at all columns in float64."""

import pytest
import torch

from spo_kernels.backends.contract import LogitTransform, Tile, TokenStats
from spo_kernels.backends.torch_backend import TorchBackend

ROWS = 7
INF = torch.inf


def seen(logits, moments=True, labels=None):
    """Statistics of these logits alone."""
    stats = TokenStats.start(logits.shape[0], logits, moments)
    labels = torch.full((logits.shape[0],), -1) if labels is None else labels
    if logits.shape[1]:
        TorchBackend().tile_stats(Tile(logits, labels, LogitTransform()), stats)
    return stats


def logits_of(columns, seed=0, dtype=torch.float64):
    """Rows of ordinary logits, one of -inf alone, one with -inf among others, one far above, one far below."""
    logits = 5.0 * torch.randn(ROWS, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    logits[0] = -INF
    logits[1, ::2] = -INF
    logits[2] += 1e4
    logits[3] -= 1e4
    return logits


def assert_same(stats, expected, tolerance=1e-12):
    for name, value in vars(expected).items():
        found = getattr(stats, name)
        if value is None:
            assert found is None
        else:
            torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("columns", [(9,), (1, 1), (5, 3), (4, 0, 6), (0, 5), (2, 3, 4, 5)], ids=str)
def test_merged_is_one_pass_over_all_columns(columns, moments):
    logits = logits_of(sum(columns))
    labels = torch.arange(ROWS) % (sum(columns) + 2) - 1
    total, start = TokenStats.start(ROWS, logits, moments), 0
    for part in logits.split(columns, 1):
        other = seen(part.contiguous(), moments, labels - start)
        before = {name: value.clone() for name, value in vars(other).items() if value is not None}
        total.merge_(other)
        assert all(torch.equal(getattr(other, name), value) for name, value in before.items())
        start += part.shape[1]
    assert_same(total, seen(logits, moments, labels))


def test_order_does_not_matter():
    """Maxima rise in one order and fall in the other, in float32 by more than its exponential spans."""
    parts = [logits_of(6, seed, torch.float32) + shift for seed, shift in ((1, 0.0), (2, 200.0), (3, -200.0))]
    whole = seen(torch.cat(parts, 1).double())
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        total = TokenStats.start(ROWS, parts[0], True)
        for index in order:
            total.merge_(seen(parts[index]))
        for name, value in vars(whole).items():
            torch.testing.assert_close(getattr(total, name).double(), value, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("moments", [False, True])
def test_nothing_joined_with_nothing(moments):
    total = TokenStats.start(ROWS, torch.empty(0), moments)
    total.merge_(TokenStats.start(ROWS, torch.empty(0), moments))
    assert (total.max == -INF).all() and (total.sum == 0).all() and (total.label_logit == -INF).all()
    if moments:
        assert (total.shifted_sum == 0).all() and (total.square_sum == 0).all()
    assert (total.base == 0).all() and (total.lse()[0] == -INF).all()


@pytest.mark.parametrize("value", [torch.nan, INF])
def test_what_is_not_finite_shows(value):
    for first in (True, False):
        parts = [logits_of(4), logits_of(4, 1)]
        parts[not first][5, 2] = value
        total = seen(parts[0])
        total.merge_(seen(parts[1]))
        assert not total.lse()[0][5].isfinite()
        assert total.lse()[0][[1, 2, 3, 4, 6]].isfinite().all()


@pytest.mark.parametrize("moments", [False, True])
def test_rebase(moments):
    """By the factor that it returns, for the sums of others too; where the maximum is no larger, nothing changes."""
    logits = logits_of(5)
    stats, before = seen(logits, moments), seen(logits, moments)
    raised = torch.tensor([-INF, 40.0, 1e4 + 50.0, -INF, 0.0, 3.0, 100.0], dtype=torch.float64)
    factor = stats.rebase_(raised)
    new = torch.maximum(before.max, raised)
    assert torch.equal(stats.max, new)
    expected = (before.max - new).exp().where(new != -INF, 0.0)
    torch.testing.assert_close(factor, expected)
    torch.testing.assert_close(stats.sum, before.sum * expected)
    torch.testing.assert_close(stats.lse()[0][1:], before.lse()[0][1:], rtol=1e-12, atol=1e-12)
    assert stats.lse()[0][0] == -INF
    if moments:
        shifted = logits - new.where(new != -INF, 0.0)[:, None]
        terms = torch.where(shifted == -INF, 0.0, shifted.exp() * shifted)
        torch.testing.assert_close(stats.shifted_sum, terms.sum(1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(stats.square_sum, (2 * shifted).exp().sum(1), rtol=1e-12, atol=1e-12)
    again = {name: value.clone() for name, value in vars(stats).items() if value is not None}
    assert torch.equal(stats.rebase_(stats.max - 1.0)[1:], torch.ones(ROWS - 1, dtype=torch.float64))
    assert all(torch.equal(getattr(stats, name), value) for name, value in again.items())


def test_moments_on_one_side_only_are_refused():
    with pytest.raises(ValueError):
        seen(logits_of(3), True).merge_(seen(logits_of(3), False))
