"""Losses per token on top of `linear_logprob`: GRPO's clipped surrogate, its advantages, and APA's squared error.

All are plain torch functions. `logp` is `linear_logprob(...)`, `old_logp` the same when the responses were sampled::

    advantages = leave_one_out_advantages(rewards.view(prompts, group)).flatten()
    losses = clipped_surrogate(logp, old_logp, advantages[:, None])
    loss = reduce_tokens(losses, labels != -100)
"""

import torch
from torch import Tensor

from spo_kernels.arguments import check_choice, check_positive
from spo_kernels.engine.checks import check_tensor
from spo_kernels.engine.label_layout import checked_bounds, sum_sequences


def group_advantages(rewards: Tensor, *, scale: bool = True, epsilon: float = 1e-4) -> Tensor:
    """GRPO (arXiv 2402.03300): `(r - mean) / (std + epsilon)` over the responses to one prompt.

    Args:
        rewards: `[..., G]` floating point; the G >= 2 responses to a prompt along the last dimension.
        scale: Divide by the standard deviation (unbiased, as TRL's). Without it, Dr. GRPO's (arXiv 2503.20783).
        epsilon: > 0, added to the standard deviation; TRL's value.

    Returns:
        Advantages, detached, in the shape of `rewards`; 0 in a group of equal rewards.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    rewards = _check_rewards(rewards)
    check_positive("epsilon", epsilon)
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, keepdim=True) + epsilon) if scale else centred


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """RLOO (arXiv 2402.14740), also LOOP's (arXiv 2503.00897): `r_i - mean of the others' rewards` for each prompt.

    Args:
        rewards: `[..., G]` floating point; the G >= 2 responses to a prompt along the last dimension.

    Returns:
        Advantages, detached, in the shape of `rewards`.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    rewards = _check_rewards(rewards)
    group = rewards.shape[-1]
    return (rewards - rewards.mean(-1, keepdim=True)) * (group / (group - 1))


def clipped_surrogate(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, *, epsilon: float = 0.2, epsilon_high: float | None = None
) -> Tensor:
    """PPO's clipped surrogate, per token: `-min(ρ A, clip(ρ, 1 - ε, 1 + ε_high) A)` with `ρ = exp(logp - old_logp)`.

    A ratio too large for its dtype does no harm where it is clipped.

    Args:
        logp: Log-probabilities under the policy, any shape; differentiable.
        old_logp: Those under the policy that sampled, same shape; taken as constants.
        advantages: Broadcast to that shape, such as `[S, 1]` for `[S, T]`; taken as constants.
        epsilon: 0 < ε < 1.
        epsilon_high: > 0; ε where None. DAPO (arXiv 2503.14476) takes 0.28 with ε = 0.2.

    Returns:
        Losses, logp's shape; see `reduce_tokens`.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    check_positive("epsilon", epsilon)
    if epsilon >= 1:
        raise ValueError(f"epsilon must be below 1, got {epsilon!r}")
    high = epsilon if epsilon_high is None else epsilon_high
    check_positive("epsilon_high", high)
    log_ratio, advantages = _difference(logp, "old_logp", old_logp, advantages)
    ratio = log_ratio.detach().exp()
    clipped = torch.where(advantages < 0, ratio < 1 - epsilon, ratio > 1 + high)
    # not torch.minimum: the gradient of the branch that it drops would be 0 * inf
    moving = log_ratio.masked_fill(clipped, 0.0).exp()
    return -advantages * torch.where(clipped, ratio.clamp(1 - epsilon, 1 + high), moving)


def apa_squared_error(logp: Tensor, init_logp: Tensor, advantages: Tensor, *, coefficient: float) -> Tensor:
    """Advantage-Induced Policy Alignment (arXiv 2306.02231), per token: `(logp - init_logp - c A)²`.

    As in the authors' code, whose `old_logprobs` are those of the initial (reference) model.

    Args:
        logp: Log-probabilities under the policy, any shape; differentiable.
        init_logp: Those under the initial model, same shape; taken as constants.
        advantages: Broadcast to that shape; taken as constants. The paper's are GAE's, whitened.
        coefficient: c = 1/λ > 0. The authors' runs on HH and TL;DR have 10.

    Returns:
        Losses, logp's shape; the paper takes their mean over tokens, see `reduce_tokens`.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    check_positive("coefficient", coefficient)
    log_ratio, advantages = _difference(logp, "init_logp", init_logp, advantages)
    return (log_ratio - coefficient * advantages).square()


def reduce_tokens(losses: Tensor, mask: Tensor, *, per: str = "token", cu_seqlens: Tensor | None = None) -> Tensor:
    """Mean loss over the tokens where `mask` is True (0 where there are none).

    Args:
        losses: `[S, T]` padded, or `[N]` packed with `cu_seqlens`.
        mask: Same shape, bool. What stands elsewhere is not looked at, and gets no gradient.
        per: "token" (all tokens weigh the same: DAPO, APA) or "sequence" (GRPO: the mean over sequences of each
            one's mean, so that tokens of short responses weigh more; a sequence without tokens counts as 0).
        cu_seqlens: `[S + 1]` bounds of packed sequences.

    Returns:
        The loss, 0-d.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    check_choice("per", per, ("token", "sequence"))
    for name, value in (("losses", losses), ("mask", mask)):
        check_tensor(name, value)
    cu_seqlens = checked_bounds("losses", losses, cu_seqlens, "S, T")
    if mask.shape != losses.shape or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, {list(losses.shape)} like losses; got {mask.dtype} {list(mask.shape)}")
    sums = sum_sequences(torch.where(mask, losses, 0.0), cu_seqlens)
    counts = sum_sequences(mask.double(), cu_seqlens)
    if per == "token":
        return sums.sum() / counts.sum().clamp_min(1).to(sums.dtype)
    return (sums / counts.clamp_min(1).to(sums.dtype)).sum() / max(sums.numel(), 1)


def _check_rewards(rewards: Tensor) -> Tensor:
    check_tensor("rewards", rewards)
    if not rewards.is_floating_point():
        raise TypeError(f"rewards must be floating point, got {rewards.dtype}")
    if rewards.ndim < 1 or rewards.shape[-1] < 2:
        raise ValueError(f"rewards must have shape [..., G] with G >= 2 responses a prompt, got {list(rewards.shape)}")
    return rewards.detach()


def _difference(logp: Tensor, name: str, constant: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """`logp - constant`, and the advantages in its shape."""
    for argument, value in (("logp", logp), (name, constant), ("advantages", advantages)):
        check_tensor(argument, value)
        if not value.is_floating_point():
            raise TypeError(f"{argument} must be floating point, got {value.dtype}")
    if constant.shape != logp.shape:
        raise ValueError(f"{name} must have logp's shape {list(logp.shape)}, got {list(constant.shape)}")
    try:
        advantages = advantages.detach().expand(logp.shape)
    except RuntimeError:
        raise ValueError(
            f"advantages must broadcast to logp's shape {list(logp.shape)}, got {list(advantages.shape)}"
        ) from None
    return logp - constant.detach(), advantages.to(logp.dtype)
