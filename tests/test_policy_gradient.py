"""Advantages, the clipped surrogate and APA's squared error, against loops in float64 and through linear_logprob."""

import math

import pytest
import torch

from spo_kernels import linear_logprob
from spo_kernels.extras.policy_gradient import (
    apa_squared_error,
    clipped_surrogate,
    group_advantages,
    leave_one_out_advantages,
    reduce_tokens,
)
from spo_kernels.extras.token_weights import pilots
from spo_kernels.testing import TensorMeter, eager_logprob, random_batch

SEQUENCES, TOKENS, VOCAB, HIDDEN = 6, 5, 29, 8


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_group_advantages():
    rewards = random(3, 4)
    scaled, centred = group_advantages(rewards), group_advantages(rewards, scale=False)
    for prompt in range(3):
        values = rewards[prompt].tolist()
        mean = sum(values) / 4
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 3)
        for i, value in enumerate(values):
            assert math.isclose(scaled[prompt, i], (value - mean) / (spread + 1e-4), rel_tol=1e-12)
            assert math.isclose(centred[prompt, i], value - mean, rel_tol=1e-12)
    assert group_advantages(torch.full((2, 3), 0.5)).eq(0).all()


def test_leave_one_out_advantages():
    rewards = random(3, 4)
    found = leave_one_out_advantages(rewards)
    for prompt in range(3):
        for i in range(4):
            others = [rewards[prompt, j].item() for j in range(4) if j != i]
            assert math.isclose(found[prompt, i], rewards[prompt, i] - sum(others) / 3, rel_tol=1e-12)


def surrogate_by_hand(logp, old_logp, advantage, low=0.2, high=0.2):
    """One token's loss and its derivative by logp."""
    ratio = math.exp(logp - old_logp)
    bounded = min(max(ratio, 1 - low), 1 + high)
    if ratio * advantage <= bounded * advantage:
        return -ratio * advantage, -ratio * advantage
    return -bounded * advantage, 0.0


@pytest.mark.parametrize("high", [None, 0.28])
def test_clipped_surrogate(high):
    old_logp, advantages = -random(200, seed=1).abs(), random(200, seed=2)
    logp = (old_logp + 0.4 * random(200, seed=3)).requires_grad_()
    losses = clipped_surrogate(logp, old_logp, advantages, epsilon_high=high)
    losses.sum().backward()
    flat = 0
    for i in range(200):
        value, slope = surrogate_by_hand(logp[i].item(), old_logp[i].item(), advantages[i].item(), high=high or 0.2)
        assert math.isclose(losses[i].item(), value, rel_tol=1e-12)
        assert math.isclose(logp.grad[i].item(), slope, rel_tol=1e-12, abs_tol=0)
        flat += slope == 0
    assert 20 < flat < 180


def test_extreme_ratios():
    """exp(500) is infinite in float32: harmless where it is clipped, visible where it is not."""
    logp = torch.tensor([0.0, -500.0, 0.0, -500.0], requires_grad=True)
    old_logp = torch.tensor([-500.0, 0.0, -500.0, 0.0])
    losses = clipped_surrogate(logp, old_logp, torch.tensor([2.0, -2.0, 0.0, 2.0]))
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), torch.tensor([-2.4, 1.6, 0.0, 0.0]))
    assert not logp.grad.any()
    assert clipped_surrogate(logp, old_logp, torch.full((4,), -1.0))[0] == torch.inf
    assert clipped_surrogate(logp * torch.nan, old_logp, torch.ones(4)).isnan().all()


def test_apa_squared_error():
    logp, initial, advantages = random(50).requires_grad_(), random(50, seed=1), random(50, seed=2)
    losses = apa_squared_error(logp, initial, advantages, coefficient=10.0)
    losses.sum().backward()
    for i in range(50):
        gap = logp[i].item() - initial[i].item() - 10.0 * advantages[i].item()
        assert math.isclose(losses[i].item(), gap**2, rel_tol=1e-12)
        assert math.isclose(logp.grad[i].item(), 2 * gap, rel_tol=1e-12)


def test_constants_get_no_gradient():
    logp, other, advantages = (random(4, seed=seed).requires_grad_() for seed in range(3))
    for loss in (clipped_surrogate(logp, other, advantages), apa_squared_error(logp, other, advantages, coefficient=1)):
        loss.sum().backward()
    assert other.grad is None and advantages.grad is None
    for function in (group_advantages, leave_one_out_advantages):
        assert not function(logp).requires_grad


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("per", ["token", "sequence"])
def test_reduce_tokens(per, layout):
    losses, mask = random(4, 6), torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[2] = False
    losses[~mask] = torch.nan
    leaf = losses.clone().requires_grad_()
    rows = [losses[i][mask[i]].tolist() for i in range(4)]
    if per == "token":
        expected = sum(map(sum, rows)) / sum(map(len, rows))
    else:
        expected = sum(sum(row) / max(len(row), 1) for row in rows) / 4
    if layout == "padded":
        found = reduce_tokens(leaf, mask, per=per)
    else:
        found = reduce_tokens(leaf.flatten(), mask.flatten(), per=per, cu_seqlens=torch.arange(5) * 6)
    assert math.isclose(found.item(), expected, rel_tol=1e-12)
    found.backward()
    assert leaf.grad.isfinite().all() and not leaf.grad[~mask].any() and leaf.grad[mask].all()


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_reduce_nothing(per):
    assert reduce_tokens(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool), per=per) == 0
    assert reduce_tokens(torch.ones(0, 3), torch.zeros(0, 3, dtype=torch.bool), per=per) == 0


LOSSES = {
    "grpo": (lambda logp, old, adv: clipped_surrogate(logp, old, adv), "sequence"),
    "apa": (lambda logp, old, adv: apa_squared_error(logp, old, adv, coefficient=2.0), "token"),
}


@pytest.mark.parametrize(("loss_of", "per"), LOSSES.values(), ids=LOSSES)
def test_through_the_head(loss_of, per):
    """Loss and gradients of hidden states and head equal eager autograd through full logits."""
    batch = random_batch((SEQUENCES, TOKENS), VOCAB, HIDDEN, dtype=torch.float64, ignored=0.2)
    mask = batch.labels != -100
    old_logp = eager_logprob(batch.hidden, batch.weight, batch.labels, dtype=torch.float64) + 0.3 * random(
        SEQUENCES, TOKENS
    )
    advantages = leave_one_out_advantages(random(2, 3, seed=5)).flatten()[:, None]

    def run(logprob, **options):
        leaves = [tensor.clone().requires_grad_() for tensor in (batch.hidden, batch.weight)]
        loss = reduce_tokens(loss_of(logprob(*leaves, batch.labels, **options), old_logp, advantages), mask, per=per)
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    expected = run(eager_logprob, dtype=torch.float64)
    for found, truth in zip(run(linear_logprob), expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-13)


def test_no_logits():
    tokens, vocab = 512, 4096
    batch = random_batch((4, tokens // 4), vocab, 16)
    leaves = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    with TensorMeter() as meter:
        logp = linear_logprob(*leaves, batch.labels, workspace_bytes=1 << 20)
        reduce_tokens(clipped_surrogate(logp, logp.detach(), torch.ones(4, 1)), batch.labels >= 0).backward()
    assert meter.peak < tokens * vocab * 4 / 2


ONES = torch.ones(3)
WRONG = {
    "rewards-list": (lambda: group_advantages([1.0]), TypeError, "rewards must be a torch.Tensor"),
    "rewards-int": (lambda: leave_one_out_advantages(torch.ones(2, 2).long()), TypeError, "rewards must be floating"),
    "one-response": (lambda: group_advantages(torch.ones(4, 1)), ValueError, r"with G >= 2 .* got \[4, 1\]"),
    "epsilon-zero": (lambda: group_advantages(ONES, epsilon=0.0), ValueError, "epsilon must be a positive number"),
    "epsilon-one": (lambda: clipped_surrogate(ONES, ONES, ONES, epsilon=1.0), ValueError, "epsilon must be below 1"),
    "high": (
        lambda: clipped_surrogate(ONES, ONES, ONES, epsilon_high=-0.1),
        ValueError,
        "epsilon_high must be a positive number, got -0.1",
    ),
    "old-shape": (
        lambda: clipped_surrogate(ONES, torch.ones(2), ONES),
        ValueError,
        r"old_logp must have logp's shape \[3\], got \[2\]",
    ),
    "old-list": (lambda: clipped_surrogate(ONES, [1.0], ONES), TypeError, "old_logp must be a torch.Tensor"),
    "advantages-shape": (
        lambda: clipped_surrogate(ONES, ONES, torch.ones(2)),
        ValueError,
        r"advantages must broadcast to logp's shape \[3\], got \[2\]",
    ),
    "advantages-int": (lambda: clipped_surrogate(ONES, ONES, ONES.long()), TypeError, "advantages must be floating"),
    "init-shape": (
        lambda: apa_squared_error(ONES, torch.ones(2), ONES, coefficient=1.0),
        ValueError,
        "init_logp must have logp's shape",
    ),
    "coefficient": (
        lambda: apa_squared_error(ONES, ONES, ONES, coefficient=0.0),
        ValueError,
        "coefficient must be a positive number",
    ),
    "per": (lambda: reduce_tokens(torch.ones(1, 3), torch.ones(1, 3) > 0, per="batch"), ValueError, "per must be one"),
    "mask-dtype": (lambda: reduce_tokens(torch.ones(1, 3), torch.ones(1, 3)), ValueError, "mask must be bool"),
    "mask-shape": (lambda: reduce_tokens(torch.ones(1, 3), ONES > 0), ValueError, r"mask must be bool, \[1, 3\]"),
    "losses-1d": (lambda: reduce_tokens(ONES, ONES > 0), ValueError, r"losses must be \[S, T\], or \[N\] with"),
}

BOUNDS = {
    "far": (
        torch.tensor([0, 3, 10_000_000]),
        ValueError,
        r"at N = 6, got 0 and 10000000 \(losses have shape \[6\]\)",
    ),
    "one more": (torch.tensor([0, 3, 7]), ValueError, "end at N = 6, got 0 and 7"),
    "short": (torch.tensor([0, 3, 5]), ValueError, "end at N = 6, got 0 and 5"),
    "late": (torch.tensor([1, 3, 6]), ValueError, "start at 0 and end at N = 6, got 1 and 6"),
    "back": (torch.tensor([0, 4, 2, 6]), ValueError, r"must not decrease, got cu_seqlens\[2\] = 2 after 4"),
    "none": (torch.tensor([]).long(), ValueError, r"must have shape \[S \+ 1\], got \[0\]"),
    "2-d": (torch.tensor([[0, 3, 6]]), ValueError, r"must have shape \[S \+ 1\], got \[1, 3\]"),
    "floats": (torch.tensor([0.0, 3.0, 6.0]), TypeError, "must be int32 or int64"),
    "list": ([0, 3, 6], TypeError, "must be a torch.Tensor"),
}


@pytest.mark.parametrize(("bounds", "error", "message"), BOUNDS.values(), ids=BOUNDS)
def test_bad_bounds(bounds, error, message):
    """Some of them were read out of bounds, or gave a plausible mean."""
    with pytest.raises(error, match=f"^cu_seqlens .*{message}"):
        reduce_tokens(torch.ones(6), torch.ones(6) > 0, cu_seqlens=bounds)
    with pytest.raises(error, match=r"^cu_seqlens must"):
        pilots(torch.ones(6), torch.ones(6), torch.ones(6), cu_seqlens=bounds)


@pytest.mark.parametrize(("call", "error", "message"), WRONG.values(), ids=WRONG)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
