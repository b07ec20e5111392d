"""LD-DPO, SamPO and SGDPO as token weights: which tokens, how often, and the losses that they make."""

import pytest
import torch

from spo_kernels import fused_spo_loss
from spo_kernels.extras.token_weights import ld_dpo_weights, sampo_weights, sgdpo_weights
from spo_kernels.losses import DPO
from spo_kernels.testing import eager_logprob, random_batch

LENGTHS = [5, 3, 6, 0, 4, 3, 2, 2]  # four pairs, chosen first
WIDTH = 9
SHORTER = [4, 3, 2, 0] * 2


def make_labels():
    """Two tokens of prompt, the response, and a hole in two of the responses."""
    labels = torch.full((len(LENGTHS), WIDTH), -100)
    for row, length in enumerate(LENGTHS):
        places = torch.arange(2, 2 + length)
        if row in (0, 4):
            places[2:] += 1
        labels[row, places] = 7
    return labels


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


BUILDERS = {
    "ld": lambda labels, generator=None, **options: ld_dpo_weights(labels, 0.3, **options),
    "sampo": sampo_weights,
    "sgdpo": lambda labels, **options: sgdpo_weights(labels, r1=0.5, r2=0.25, pilot=2.0, **options),
}
each_builder = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


def test_ld_dpo_by_hand():
    labels = make_labels()
    weights = ld_dpo_weights(labels, 0.3)
    assert weights.dtype == torch.float32 and weights.shape == labels.shape
    for row, (length, shorter) in enumerate(zip(LENGTHS, SHORTER, strict=True)):
        expected = [1.0] * min(length, shorter) + [0.3] * max(0, length - shorter)
        torch.testing.assert_close(weights[row][labels[row] != -100], torch.tensor(expected))
    assert not weights[labels == -100].any()


def test_sampo_subset():
    labels = make_labels()
    weights = sampo_weights(labels, generator=seeded())
    assert set(weights.unique().tolist()) == {0.0, 1.0}
    assert weights.sum(-1).tolist() == [min(pair) for pair in zip(LENGTHS, SHORTER, strict=True)]
    assert not weights[labels == -100].any()
    again, other = (sampo_weights(labels, generator=seeded(seed)) for seed in (0, 1))
    assert torch.equal(weights, again) and not torch.equal(weights, other)


def test_sampo_draws_each_subset_equally_often():
    labels = torch.zeros(2, 5, dtype=torch.int64)
    labels[1, 2:] = -100  # 10 subsets of two of five
    runs, generator = 4000, seeded()
    counts = {}
    for _ in range(runs):
        subset = tuple(sampo_weights(labels, generator=generator)[0].nonzero()[:, 0].tolist())
        counts[subset] = counts.get(subset, 0) + 1
    assert len(counts) == 10
    assert all(abs(count - runs / 10) < 4.5 * (runs * 0.09) ** 0.5 for count in counts.values())


def test_sgdpo_subset():
    labels = make_labels()
    weights = sgdpo_weights(labels, r1=0.5, r2=1.0, pilot=2.0, generator=seeded())
    sizes = [round(0.5 * length) for length in LENGTHS[:4]] + LENGTHS[4:]
    assert (weights == 3.0).sum(-1).tolist() == sizes
    assert (weights > 0).equal(labels != -100) and set(weights.unique().tolist()) == {0.0, 1.0, 3.0}
    assert "reconstruction" in sgdpo_weights.__doc__ and "not verified" in sgdpo_weights.__doc__


@each_builder
@pytest.mark.parametrize("shift", [False, True])
def test_packed_is_padded(build, shift):
    labels = make_labels()
    labels[1, 0] = labels[4, 0] = 7  # a first label, which `shift` leaves out
    padded = build(labels, generator=seeded(), shift=shift)
    bounds = torch.arange(0, labels.numel() + 1, WIDTH)
    packed = build(labels.flatten(), generator=seeded(), shift=shift, cu_seqlens=bounds)
    assert torch.equal(packed, padded.flatten())
    if shift or build is not sampo_weights:  # which may drop it by chance
        assert bool(padded[1, 0] == 0) == shift
    kept = labels != -100
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(-1).cumsum(0)])
    if not shift:
        assert torch.equal(build(labels[kept], generator=seeded(), cu_seqlens=bounds), padded[kept])


@each_builder
def test_other_ignore_index_and_empty_batches(build):
    labels = make_labels()
    expected = build(labels, generator=seeded())
    assert torch.equal(build(labels.masked_fill(labels == -100, -1), generator=seeded(), ignore_index=-1), expected)
    assert build(labels[:0]).shape == (0, WIDTH)
    assert build(labels[0, :0], cu_seqlens=torch.zeros(1, dtype=torch.int64)).shape == (0,)
    assert not build(torch.full_like(labels, -100)).any()


def test_default_randomness_is_torchs():
    torch.manual_seed(5)
    first = sampo_weights(make_labels())
    torch.manual_seed(5)
    assert torch.equal(first, sampo_weights(make_labels()))


@pytest.mark.parametrize("independent", [False, True], ids=["shared", "independent"])
@pytest.mark.parametrize("name", BUILDERS)
def test_the_loss_that_they_make(name, independent):
    """DPO on the method's own sequence log-probabilities, straight from float64 logits."""
    labels = make_labels()
    policy, other = (random_batch(labels.shape, 13, 8, dtype=torch.float64, seed=seed) for seed in (1, 2))
    weights, ref_weights = (BUILDERS[name](labels, generator=seeded(seed)) for seed in (0, 1))
    logp = eager_logprob(policy.hidden, policy.weight, labels, dtype=torch.float64)
    ref_logp = eager_logprob(other.hidden, other.weight, labels, dtype=torch.float64)
    ratio = (logp * weights - ref_logp * (ref_weights if independent else weights)).sum(-1)
    chosen, rejected = ratio.chunk(2)
    expected = torch.nn.functional.softplus(-0.1 * (chosen - rejected)).mean()
    loss, _ = fused_spo_loss(
        policy.hidden,
        policy.weight,
        labels,
        loss=DPO(beta=0.1),
        ref_hidden=other.hidden,
        ref_head=other.weight,
        token_weights=weights,
        ref_token_weights=ref_weights if independent else None,
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@each_builder
@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        ([[1]], {}, TypeError, "labels must be a torch.Tensor, got list"),
        (torch.zeros(2, 3), {}, TypeError, "labels must be int64, got torch.float32"),
        (torch.zeros(6, dtype=torch.int64), {}, ValueError, r"labels must be \[2B, T\], or \[N\] with cu_seqlens"),
        (torch.zeros(3, 2, dtype=torch.int64), {}, ValueError, "labels must hold .* then B rejected ones; got 3"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            {"cu_seqlens": torch.tensor([0, 3, 6])},
            ValueError,
            r"labels must be packed, \[N\], where cu_seqlens is given; got \[2, 3\]",
        ),
        (
            torch.zeros(6, dtype=torch.int64),
            {"cu_seqlens": torch.tensor([0, 3, 5])},
            ValueError,
            "cu_seqlens must start at 0 and end at N = 6, got 0 and 5",
        ),
        (
            torch.zeros(6, dtype=torch.int64),
            {"cu_seqlens": torch.tensor([0, 6])},
            ValueError,
            "cu_seqlens must hold an even number of sequences.* got 1",
        ),
    ],
)
def test_bad_labels(build, labels, options, error, message):
    with pytest.raises(error, match=message):
        build(labels, **options)


def test_bad_parameters():
    labels = make_labels()
    for alpha in (-0.1, float("nan"), "0.5"):
        with pytest.raises(ValueError, match="alpha must be a number >= 0"):
            ld_dpo_weights(labels, alpha)
    with pytest.raises(ValueError, match=r"r1 must be a share between 0 and 1, got 1\.5"):
        sgdpo_weights(labels, r1=1.5, r2=0.5)
    with pytest.raises(ValueError, match="r2 must be a number >= 0, got -1"):
        sgdpo_weights(labels, r1=0.5, r2=-1)
    with pytest.raises(ValueError, match="pilot must be a number >= 0"):
        sgdpo_weights(labels, r1=0.5, r2=0.5, pilot=-1.0)
