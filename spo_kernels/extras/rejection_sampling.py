"""Statistical rejection sampling (RSO, arXiv 2309.06657, algorithm 1)."""

import math

import torch
from torch import Tensor

from spo_kernels.arguments import is_number, is_whole
from spo_kernels.engine.checks import check_tensor


def rso_select(rewards: Tensor, num_samples: int, beta: float, generator: torch.Generator | None = None) -> Tensor:
    """Choose candidates as if they had been drawn from `π(y) ∝ π_sft(y) exp(reward(y) / β)`, without replacement.

    Algorithm 1 of RSO. Sweep over the candidates that are left; with `r_max` their largest reward at the start of
    the sweep, accept each with probability `exp((reward - r_max) / β)`; until `num_samples` are accepted.
    β = 0 gives the top `num_samples`, β = inf a uniform choice.

    The candidates are put into a random order first. The paper's are independent samples, whose order carries
    nothing; candidates that come sorted would otherwise fill the quota from the front.

    Args:
        rewards: `[candidates]` floating point, finite; one prompt's candidates.
        num_samples: How many to accept, 0 to the number of candidates. The paper accepts 8 of 64.
        beta: β >= 0 in the rewards' unit; `math.inf` is allowed. The paper's is 0.5.
        generator: Source of randomness, on the CPU; torch's default one where None.

    Returns:
        `[num_samples]` int64 indices into `rewards`, on the CPU, in the order of acceptance.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    _check(rewards, num_samples, beta)
    scores = rewards.detach().double().cpu()
    left = torch.randperm(scores.numel(), generator=generator)
    accepted = left[:0]
    while accepted.numel() < num_samples:
        draws = torch.rand(left.numel(), dtype=torch.float64, generator=generator)
        taken = draws < _acceptance(scores[left], beta)  # at least the largest reward's: a draw is below 1
        accepted = torch.cat([accepted, left[taken]])
        left = left[~taken]
    return accepted[:num_samples]


def _acceptance(scores: Tensor, beta: float) -> Tensor:
    """`exp((score - max) / β)`, at its limits for β = 0 and β = inf."""
    gap = scores - scores.max()
    if beta == 0:
        return (gap == 0).double()
    return torch.ones_like(gap) if math.isinf(beta) else (gap / beta).exp()


def _check(rewards: Tensor, num_samples: int, beta: float) -> None:
    check_tensor("rewards", rewards)
    if rewards.ndim != 1:
        raise ValueError(f"rewards must have shape [candidates], got {list(rewards.shape)}")
    if not rewards.is_floating_point():
        raise TypeError(f"rewards must be floating point, got {rewards.dtype}")
    if not bool(rewards.isfinite().all()):
        index = int((~rewards.isfinite()).nonzero()[0])
        raise ValueError(f"rewards must be finite, got rewards[{index}] = {rewards[index].item()}")
    if not is_whole(num_samples) or not 0 <= num_samples <= rewards.numel():
        raise ValueError(f"num_samples must be between 0 and the {rewards.numel()} candidates, got {num_samples!r}")
    if not is_number(beta) or not beta >= 0:
        raise ValueError(f"beta must be a number >= 0, got {beta!r}")
