"""RSO's algorithm 1: its distribution by exhaustive enumeration, and its limits."""

import itertools
import math
from collections import Counter

import pytest
import torch

from spo_kernels.extras.rejection_sampling import rso_select

REWARDS = [0.3, -0.4, 1.1, 0.9]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def chosen_sets(left, needed, beta):
    """Exact probability of every set that one run accepts, given the order in which candidates are visited."""
    if needed == 0:
        return {frozenset(): 1.0}
    largest = max(REWARDS[c] for c in left)
    rates = [math.exp((REWARDS[c] - largest) / beta) for c in left]
    found = Counter()
    for outcome in itertools.product([True, False], repeat=len(left)):
        weight = math.prod(p if taken else 1 - p for p, taken in zip(rates, outcome, strict=True))
        if weight == 0:
            continue
        first = [c for c, taken in zip(left, outcome, strict=True) if taken][:needed]
        rest = [c for c in left if c not in first]
        for others, share in chosen_sets(rest, needed - len(first), beta).items():
            found[others | set(first)] += weight * share
    return found


@pytest.mark.parametrize("num_samples", [1, 2, 3])
@pytest.mark.parametrize("beta", [0.2, 0.5, 3.0])
def test_distribution(num_samples, beta):
    exact = Counter()
    orders = list(itertools.permutations(range(len(REWARDS))))
    for order in orders:
        for names, share in chosen_sets(order, num_samples, beta).items():
            exact[names] += share / len(orders)
    assert math.isclose(sum(exact.values()), 1.0)
    runs, generator, rewards = 4000, seeded(), torch.tensor(REWARDS)
    counts = Counter(frozenset(rso_select(rewards, num_samples, beta, generator).tolist()) for _ in range(runs))
    assert counts.keys() <= exact.keys()
    for names, share in exact.items():
        spread = math.sqrt(runs * share * (1 - share))
        assert abs(counts[names] - runs * share) <= 4.5 * spread + 1, (names, counts[names], runs * share)


@pytest.mark.parametrize("beta", [0, 0.0, 1e-300, 5e-324])
def test_no_temperature_takes_the_top(beta):
    rewards = torch.tensor([1.0, 5.0, -2.0, 4.0, 1e30, -1e30])
    assert rso_select(rewards, 3, beta, seeded()).tolist() == [4, 1, 3]


def test_ties_at_zero_temperature_are_broken_at_random():
    picks = Counter(int(rso_select(torch.zeros(4), 1, 0.0, seeded(seed))) for seed in range(400))
    assert set(picks) == {0, 1, 2, 3} and max(picks.values()) < 150


@pytest.mark.parametrize("beta", [math.inf, 1e300])
def test_infinite_temperature_is_uniform(beta):
    """Sorted candidates must not fill the quota from the front; rewards at float64's ends do no harm."""
    rewards = torch.tensor([1.7e308, 1.0, 0.0, -1.7e308], dtype=torch.float64)
    if beta != math.inf:
        rewards = rewards.clamp(-1, 1)
    generator = seeded()
    counts = Counter(frozenset(rso_select(rewards, 2, beta, generator).tolist()) for _ in range(3000))
    assert len(counts) == 6
    assert all(abs(count - 500) < 4.5 * math.sqrt(500 * 5 / 6) for count in counts.values())


def test_all_none_and_each_once():
    rewards = torch.linspace(-3, 3, 64)
    assert sorted(rso_select(rewards, 64, 0.5).tolist()) == list(range(64))
    assert rso_select(rewards, 0, 0.5).shape == (0,) and rso_select(torch.zeros(0), 0, 0.5).dtype == torch.int64
    some = rso_select(rewards.half(), 8, 0.5)
    assert len(set(some.tolist())) == 8 and some.dtype == torch.int64


def test_the_generator_decides():
    rewards = torch.linspace(-3, 3, 64)
    first, again, other = (rso_select(rewards, 8, 0.5, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(3)
    first = rso_select(rewards, 8, 0.5)
    torch.manual_seed(3)
    assert torch.equal(first, rso_select(rewards, 8, 0.5))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0, 2.0], 1, 0.5), TypeError, "rewards must be a .*Tensor"),
        ((torch.ones(2, 2), 1, 0.5), ValueError, r"rewards must have shape \[candidates\], got \[2, 2\]"),
        ((torch.ones(2, dtype=torch.int64), 1, 0.5), TypeError, "rewards must be floating point, got torch.int64"),
        ((torch.tensor([0.0, torch.nan]), 1, 0.5), ValueError, r"finite, got rewards\[1\] = nan"),
        ((torch.ones(2), 3, 0.5), ValueError, "num_samples must be between 0 and the 2 candidates, got 3"),
        ((torch.ones(2), -1, 0.5), ValueError, "num_samples must be .*got -1"),
        ((torch.ones(2), 1.0, 0.5), ValueError, "num_samples must be .*got 1.0"),
        ((torch.ones(2), True, 0.5), ValueError, "num_samples must be .*got True"),
        ((torch.ones(2), 1, -0.5), ValueError, "beta must be a number >= 0, got -0.5"),
        ((torch.ones(2), 1, math.nan), ValueError, "beta must be a number >= 0, got nan"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        rso_select(*arguments)
