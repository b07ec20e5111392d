"""A forward that chooses (token, vocabulary block) pairs, and a backward over those: 1 + 3ρ products, 1 + 2ρ frozen.

ρ is the share of pairs that is kept; see `sparse_blocks.py` for the choice.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spo_kernels.backends.contract import MASS_BLOCK, Backend, TokenStats
from spo_kernels.backends.products import accumulator_dtype
from spo_kernels.engine.exact import Head, TileShape, TokenRows, VocabularySlice, forward
from spo_kernels.engine.sparse_blocks import BlockChooser, KeptBlocks, block_width, weights_of
from spo_kernels.sparsity import Sparsity

# above this share the exact backward is the faster one: products of gathered rows run at about 0.7 of the rate
_WORTH = 0.6
# of a frozen head's tokens, this share is looked at before the forward decides whether to finish hidden's gradient
_PROBED = 1 / 32

# pairs that are listed at a time, 28 bytes each; a GPU waits once for each list
_LISTED_PAIRS = 1 << 19


@dataclass(frozen=True)
class SparseForward:
    """Statistics, and what was chosen."""

    stats: TokenStats
    kept: KeptBlocks
    dropped_mass: Tensor  # [n]
    kept_share: Tensor  # [n]
    expected: float  # pairs that are kept, on average over seeds

    @property
    def pays(self) -> bool:
        """Whether the sparse backward is faster than the exact one.

        Judged by what is expected, not by what was drawn: an exact backward for rich draws only would leave a bias.
        """
        return self.expected <= _WORTH * self.kept_share.numel() * len(self.kept.counts)


def possible(tile_shape: TileShape, vocab: int) -> bool:
    """Whether tiles consist of whole blocks."""
    return tile_shape.columns >= min(MASS_BLOCK, vocab)


def sparse_forward(
    hidden: Tensor,
    head: Head,
    tokens: TokenRows,
    backend: Backend,
    tile_shape: TileShape,
    sparsity: Sparsity,
    codes: Tensor,
    *,
    moments: bool,
) -> SparseForward:
    """One product. `codes` (`[blocks, >= n]`, uint8) is where the choice is kept for the backward."""
    n, vocab = tokens.labels.numel(), head.weight.shape[0]
    width = block_width(codes.shape[1], vocab, hidden.device.type)
    like = hidden.new_empty(0, dtype=accumulator_dtype(hidden.dtype))
    chooser = BlockChooser(sparsity, codes, width, n, vocab, like)
    stats = forward(hidden, head, tokens, backend, tile_shape, moments=moments, logp_grad=None, chooser=chooser)
    # the one wait for the device
    *counts, expected = torch.cat([chooser.counts.double(), chooser.expected[None]]).tolist()
    kept = KeptBlocks(codes, [int(count) for count in counts], width)
    return SparseForward(stats, kept, chooser.dropped_mass, chooser.kept_share, expected)


def probe(
    hidden: Tensor, head: Head, tokens: TokenRows, backend: Backend, tile_shape: TileShape, sparsity: Sparsity
) -> bool:
    """Whether a few of the tokens say that a sparse backward pays."""
    n = tokens.labels.numel()
    few = torch.arange(0, n, int(1 / _PROBED), device=hidden.device)
    some = TokenRows(few if tokens.rows is None else tokens.rows[few], tokens.labels[few])
    blocks = -(-head.weight.shape[0] // block_width(few.numel(), head.weight.shape[0], hidden.device.type))
    codes = torch.empty((blocks, few.numel()), dtype=torch.uint8, device=hidden.device)
    return sparse_forward(hidden, head, some, backend, tile_shape, sparsity, codes, moments=False).pays


def kept_slices(
    kept: KeptBlocks, tokens: int, vocab: int, max_rows: int, dtype: torch.dtype
) -> Iterator[VocabularySlice]:
    """The kept pairs as the backward takes them: a block's tokens, `max_rows` at a time. `dtype` is the gradients'."""
    for block, (members, weights) in enumerate(_members(kept, tokens, dtype)):
        parts = zip(members.split(max_rows), weights.split(max_rows), strict=True)
        start = block * kept.width
        stop = min(start + kept.width, vocab)
        yield VocabularySlice(start, stop, [(rows, factors) for rows, factors in parts if rows.numel()])


def _members(kept: KeptBlocks, tokens: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens of each block, ascending, and their weights."""
    first = 0
    while first < len(kept.counts):
        last, listed = first, 0
        while last < len(kept.counts) and (last == first or listed + kept.counts[last] <= _LISTED_PAIRS):
            listed += kept.counts[last]
            last += 1
        codes = kept.codes[first:last, :tokens]
        blocks, members = codes.nonzero().unbind(1)
        weights, sizes = weights_of(codes[blocks, members], dtype), kept.counts[first:last]
        yield from zip(members.contiguous().split(sizes), weights.split(sizes), strict=True)
        first = last
