"""Per-token weights that turn DPO into other methods, from labels alone.

Each function takes the labels that `fused_spo_loss` takes, B chosen sequences and then B rejected ones, and returns
float32 weights of their shape for its `token_weights`, 0 where a label does not count. Random subsets are drawn on
the CPU from `generator` (torch's default one where None), so that they are the same on every device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from spo_kernels.engine.tokens import LabelLayout
from spo_kernels.losses.pairs import check_not_negative


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
    tokens = _PairTokens.of(labels, cu_seqlens, ignore_index, shift)
    starts = tokens.lengths.cumsum(0) - tokens.lengths
    place = torch.arange(tokens.owners.numel(), device=labels.device) - starts[tokens.owners]
    return tokens.spread(torch.where(place < tokens.shorter[tokens.owners], 1.0, float(alpha)), labels)


def sampo_weights(
    labels: Tensor,
    *,
    generator: torch.Generator | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
) -> Tensor:
    """SamPO (Lu et al., arXiv 2406.10957; formula from its code): as many random tokens of each response as the
    pair's shorter one has.

    1 for all tokens of the shorter response and for a uniform subset, without replacement, of the longer one.

    Policy and reference share the subset where one result is passed as `token_weights`. The authors' code draws a
    subset for each: call twice, and pass the second result as `ref_token_weights`.

    Args:
        labels: `[2B, T]` or `[N]` int64.
        generator: Source of randomness, on the CPU.
        cu_seqlens, ignore_index, shift: As in `fused_spo_loss`.

    Returns:
        Weights, float32, labels' shape, each 0 or 1.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    tokens = _PairTokens.of(labels, cu_seqlens, ignore_index, shift)
    return tokens.spread(tokens.random_subset(tokens.shorter, generator), labels)


def sgdpo_weights(
    labels: Tensor,
    *,
    r1: float,
    r2: float,
    pilot: float = 1.0,
    generator: torch.Generator | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
) -> Tensor:
    """A reconstruction of SGDPO (arXiv 2505.12435), not verified against the paper, whose loss was not available.

    From descriptions of its pilot term: sub-sequences drawn at random from both responses, of lengths set by r1 and
    r2, enter the margin once more, `β (r_w - r_l) + β ρ (r̃_w - r̃_l)`, with r̃ the log-ratio summed over the subset.
    As weights: `1 + ρ` on round(r1 n_w) random tokens of the chosen and round(r2 n_l) of the rejected response, drawn
    apart (what the descriptions call Pilot_d). How the paper's term enters its loss, and its values of r1, r2 and ρ,
    are unknown.

    Args:
        labels: `[2B, T]` or `[N]` int64.
        r1, r2: Share of the chosen and of the rejected response's tokens, 0 to 1.
        pilot: ρ >= 0, this library's parameter.
        generator: Source of randomness, on the CPU.
        cu_seqlens, ignore_index, shift: As in `fused_spo_loss`.

    Returns:
        Weights, float32, labels' shape.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    for name, value in (("r1", r1), ("r2", r2)):
        check_not_negative(name, value)
        if value > 1:
            raise ValueError(f"{name} must be a share between 0 and 1, got {value!r}")
    check_not_negative("pilot", pilot)
    tokens = _PairTokens.of(labels, cu_seqlens, ignore_index, shift)
    chosen, rejected = tokens.lengths.chunk(2)
    sizes = torch.cat([r1 * chosen, r2 * rejected]).round().long()
    return tokens.spread(1.0 + pilot * tokens.random_subset(sizes, generator), labels)


@dataclass(frozen=True)
class _PairTokens:
    """The n tokens that count, sequence by sequence."""

    counted: Tensor  # flat, bool: which labels count
    owners: Tensor  # [n], the sequence of each token that does
    lengths: Tensor  # [2B]

    @classmethod
    def of(cls, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, shift: bool) -> "_PairTokens":
        layout = LabelLayout(labels, ignore_index, shift, cu_seqlens)
        layout.check_pairs()
        counted = layout.counted()
        lengths = layout.count(counted)
        owners = torch.arange(layout.sequences, device=labels.device).repeat_interleave(lengths)
        return cls(counted.flatten(), owners, lengths)

    @property
    def shorter(self) -> Tensor:
        """`[2B]` the length of each sequence's pair's shorter response."""
        return self.lengths.view(2, -1).amin(0).repeat(2)

    def random_subset(self, sizes: Tensor, generator: torch.Generator | None) -> Tensor:
        """`[n]` bool: a uniform subset of `sizes[s]` tokens of each sequence s."""
        # sorted by sequence and, inside one, by a random key: the first of each are its subset
        keys = torch.rand(self.owners.numel(), dtype=torch.float64, generator=generator).to(self.owners.device)
        order = (self.owners + keys).argsort()
        owners = self.owners[order]
        starts = self.lengths.cumsum(0) - self.lengths
        rank = torch.arange(owners.numel(), device=owners.device) - starts[owners]
        return torch.empty_like(owners, dtype=torch.bool).scatter_(0, order, rank < sizes[owners])

    def spread(self, values: Tensor, labels: Tensor) -> Tensor:
        """Values of the tokens that count at their labels' places, 0 elsewhere."""
        weights = torch.zeros(labels.numel(), device=labels.device)
        return weights.masked_scatter_(self.counted, values.float()).view(labels.shape)
