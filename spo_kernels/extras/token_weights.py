"""Per-token weights that turn DPO into other methods, and the random tokens of SGDPO's pilots, from labels alone.

Each function takes the labels that `fused_spo_loss` takes, B chosen sequences and then B rejected ones, and returns
float32 weights of their shape, 0 where a label does not count; those of LD-DPO and SamPO are for its `token_weights`.
Random subsets are drawn on the CPU from `generator` (torch's default one where None), so that they are the same on
every device.
"""

import torch
from torch import Tensor

from spo_kernels.arguments import check_in, check_not_negative
from spo_kernels.engine.checks import check_tensor
from spo_kernels.engine.label_layout import LabelLayout, checked_bounds, sum_sequences
from spo_kernels.engine.subsets import PairTokens
from spo_kernels.losses.pairs import by_side


def ld_dpo_weights(
    labels: Tensor,
    alpha: float,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
) -> Tensor:
    """LD-DPO (arXiv 2409.06411, eq. 11 and 12; TRL's `ld_alpha`): α beyond the length of the pair's shorter response.

    `log π̂(y) = Σ_{t <= min(n_w, n_l)} log p_t + α Σ_{t > min(n_w, n_l)} log p_t`, for policy and reference.

    Args:
        labels: `[2B, T]` or `[N]` int64.
        alpha: α >= 0; 1 is DPO, 0 cuts both responses to one length. The paper's best are 0.3 to 0.6.
        cu_seqlens, ignore_index, shift: As in `fused_spo_loss`.

    Returns:
        Weights, float32, labels' shape.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    check_not_negative("alpha", alpha)
    tokens = PairTokens.of(LabelLayout(labels, ignore_index, shift, cu_seqlens))
    starts = tokens.lengths.cumsum(0) - tokens.lengths
    place = torch.arange(tokens.owners.numel(), device=labels.device) - starts[tokens.owners]
    return tokens.spread(torch.where(place < tokens.shorter[tokens.owners], 1.0, float(alpha)))


def sampo_weights(
    labels: Tensor,
    *,
    generator: torch.Generator | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
) -> Tensor:
    """SamPO (Lu et al., arXiv 2406.10957): as many random tokens of each response as the pair's shorter one has.

    1 for all tokens of the shorter response and for a uniform subset, without replacement, of the longer one.

    Agrees with the authors' code (LuJunru/SamPO 25e9631f, dpo_trainer.py:1023-1058), which draws a subset for the
    policy and another one for the reference: call twice, and pass the second result as `ref_token_weights`. Policy and
    reference share the subset where one result is passed as `token_weights`. Their β: 0.1 (8B), 0.5 (2.8B).

    Args:
        labels: `[2B, T]` or `[N]` int64.
        generator: Source of randomness, on the CPU.
        cu_seqlens, ignore_index, shift: As in `fused_spo_loss`.

    Returns:
        Weights, float32, labels' shape, each 0 or 1.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    tokens = PairTokens.of(LabelLayout(labels, ignore_index, shift, cu_seqlens))
    return tokens.spread(tokens.random_subset(tokens.shorter, generator))


def pilot_subsets(
    labels: Tensor,
    *,
    r1: float = 0.6,
    r2: float = 0.9,
    generator: torch.Generator | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
) -> Tensor:
    """The random tokens of SGDPO's pilots (arXiv 2505.12435), for `pilots`.

    1 for `max(⌊r1 min(n_w, n_l)⌋, 1)` tokens of the chosen response and `max(⌊r2 min(n_w, n_l)⌋, 1)` of the rejected
    one, uniform without replacement and drawn apart; all of a response that has fewer. Agrees with the authors' code
    (WNQzhu/SGDPO, code/scripts/pdpo_trainer_v4.py, get_pilot_logps), which draws anew for every batch.

    Args:
        labels: `[2B, T]` or `[N]` int64.
        r1, r2: 0 < r <= 1; 0.6 and 0.9 in that code.
        generator: Source of randomness, on the CPU.
        cu_seqlens, ignore_index, shift: As in `fused_spo_loss`.

    Returns:
        Weights, float32, labels' shape, each 0 or 1.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    check_in("r1", r1, "(0, 1]")
    check_in("r2", r2, "(0, 1]")
    return PairTokens.of(LabelLayout(labels, ignore_index, shift, cu_seqlens)).pilot_subsets(r1, r2, generator)


def pilots(logp: Tensor, ref_logp: Tensor, subsets: Tensor, *, cu_seqlens: Tensor | None = None) -> dict[str, Tensor]:
    """SGDPO's `ρ = sg[Σ_{t∈S} (log πθ - log πref)_t]` of each response, as `pair_inputs` of the objective `SGDPO`.

    Args:
        logp, ref_logp: Log-probabilities of the labels under policy and reference, `[2B, T]` or `[N]`, finite.
        subsets: S as 0 and 1, the same shape; from `pilot_subsets`.
        cu_seqlens: `[2B + 1]` bounds of packed sequences.

    Returns:
        "chosen_pilot" and "rejected_pilot", `[B]`, no gradient.

    Raises:
        TypeError, ValueError: An argument is wrong, or shapes differ; the message names them.
    """
    for name, value in (("logp", logp), ("ref_logp", ref_logp), ("subsets", subsets)):
        check_tensor(name, value)
    if not logp.shape == ref_logp.shape == subsets.shape:
        raise ValueError(
            f"logp, ref_logp and subsets must have one shape, got {list(logp.shape)}, {list(ref_logp.shape)} and "
            f"{list(subsets.shape)}"
        )
    cu_seqlens = checked_bounds("logp", logp, cu_seqlens, "2B, T")
    sums = sum_sequences(logp.detach() - ref_logp.detach(), cu_seqlens, subsets)
    return by_side({"pilot": sums})
