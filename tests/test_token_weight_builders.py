"""LD-DPO and SamPO as token weights, SGDPO's pilots: which tokens, how often, and the losses that they make."""

import pytest
import torch

from spo_kernels import fused_spo_loss
from spo_kernels.extras.token_weights import ld_dpo_weights, pilot_subsets, pilots, sampo_weights
from spo_kernels.losses import DPO, SGDPO
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
    "pilots": pilot_subsets,
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


def test_pilot_subset():
    """Shares of the pair's shorter length, rounded down, at least 1, of either response apart."""
    labels = make_labels()
    subsets = pilot_subsets(labels, generator=seeded())
    # shorter lengths 4, 3, 2 and 0: 2.4, 1.8, 1.2 and 0 of the chosen, 3.6, 2.7, 1.8 and 0 of the rejected
    assert subsets.sum(-1).tolist() == [2, 1, 1, 0, 3, 2, 1, 1]
    assert set(subsets.unique().tolist()) == {0.0, 1.0} and not subsets[labels == -100].any()
    again, other = (pilot_subsets(labels, generator=seeded(seed)) for seed in (0, 1))
    assert torch.equal(subsets, again) and not torch.equal(subsets, other)
    assert pilot_subsets(labels, r1=1.0, r2=1.0).sum(-1).tolist() == [4, 3, 2, 0, 4, 3, 2, 1]


def test_pilots_of_a_subset():
    labels = make_labels()
    subsets = pilot_subsets(labels, generator=seeded())
    logp, ref_logp = torch.randn(2, *labels.shape, generator=seeded()).requires_grad_()
    found = pilots(logp, ref_logp, subsets)
    wanted = torch.stack([(a - b)[s > 0].sum() for a, b, s in zip(logp, ref_logp, subsets, strict=True)])
    torch.testing.assert_close(torch.cat([found["chosen_pilot"], found["rejected_pilot"]]), wanted.detach())
    assert not any(value.requires_grad for value in found.values())
    bounds = torch.arange(0, labels.numel() + 1, WIDTH)
    packed = pilots(logp.flatten(), ref_logp.flatten(), subsets.flatten(), cu_seqlens=bounds)
    for name, value in found.items():
        torch.testing.assert_close(packed[name], value)


@pytest.mark.parametrize("r1", [0.6, 1.0])
def test_sgdpo_through_the_loss(r1):
    """Loss and gradient from float64 logits, subsets and pilots written out."""
    labels = make_labels()[[0, 1, 4, 5]]
    policy, other = (random_batch(labels.shape, 13, 8, dtype=torch.float64, seed=seed) for seed in (1, 2))
    subsets = pilot_subsets(labels, r1=r1, generator=seeded())
    hidden = policy.hidden.clone().requires_grad_()
    logp = eager_logprob(hidden, policy.weight, labels, dtype=torch.float64)
    ref_logp = eager_logprob(other.hidden, other.weight, labels, dtype=torch.float64)
    ratio = logp - ref_logp
    (r_w, r_l), (pilot_w, pilot_l) = ratio.sum(-1).chunk(2), (ratio * subsets).sum(-1).detach().chunk(2)
    softplus = torch.nn.functional.softplus
    expected = (softplus(-0.1 * (r_w - pilot_l)) + softplus(-0.1 * (pilot_w - r_l))).mean() / 2
    (wanted,) = torch.autograd.grad(expected, hidden)
    loss, _ = fused_spo_loss(
        hidden,
        policy.weight,
        labels,
        loss=SGDPO(r1=r1),
        ref_logps=ref_logp.sum(-1),
        pair_inputs=pilots(logp, ref_logp, subsets),
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], wanted, rtol=1e-9, atol=1e-14)


@each_builder
@pytest.mark.parametrize("shift", [False, True])
def test_packed_is_padded(build, shift):
    labels = make_labels()
    labels[1, 0] = labels[4, 0] = 7  # a first label, which `shift` leaves out
    padded = build(labels, generator=seeded(), shift=shift)
    bounds = torch.arange(0, labels.numel() + 1, WIDTH)
    packed = build(labels.flatten(), generator=seeded(), shift=shift, cu_seqlens=bounds)
    assert torch.equal(packed, padded.flatten())
    if shift or build is BUILDERS["ld"]:  # the others may drop it by chance
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
    with pytest.raises(ValueError, match=r"r1 must be a number in \(0, 1\], got 1\.5"):
        pilot_subsets(labels, r1=1.5)
    with pytest.raises(ValueError, match=r"r2 must be a number in \(0, 1\], got 0"):
        pilot_subsets(labels, r2=0)
    with pytest.raises(ValueError, match=r"one shape, got \[2\], \[2\] and \[3\]"):
        pilots(torch.zeros(2), torch.zeros(2), torch.zeros(3))
