"""A forward that chooses (token, vocabulary block) pairs, and a backward over those: 1 + 3ρ products, 1 + 2ρ frozen.

ρ is the share of pairs that is kept; see `sparse_blocks.py` for the choice.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spo_kernels.backends.contract import MASS_BLOCK, TokenStats
from spo_kernels.engine.backward import VocabularySlice
from spo_kernels.engine.forward import forward
from spo_kernels.engine.logit_sums import LogitSums
from spo_kernels.engine.plane import Plane
from spo_kernels.engine.sparse_blocks import BlockChooser, KeptBlocks, weights_of
from spo_kernels.engine.token_rows import TokenRows
from spo_kernels.engine.workspace import TileShape, block_width
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
    pairs: float  # of tokens and blocks, in all processes
    expected: float  # those of them that are kept, on average over seeds

    @property
    def pays(self) -> bool:
        """Whether the sparse backward is faster than the exact one.

        Judged by what is expected, not by what was drawn: an exact backward for rich draws only would leave a bias.
        """
        return self.expected <= _WORTH * self.pairs


def possible(shape: TileShape, vocab: int) -> bool:
    """Whether tiles consist of whole blocks."""
    return shape.columns >= min(MASS_BLOCK, vocab)


def sparse_forward(
    plane: Plane,
    shape: TileShape,
    sparsity: Sparsity,
    codes: Tensor,
    *,
    moments: bool,
    logit_sums: LogitSums | None = None,
) -> SparseForward:
    """One product. `codes` (`[blocks, >= n]`, uint8) is where the choice is kept for the backward."""
    n, head = plane.tokens.count, plane.head
    width = block_width(codes.shape[1], head.vocab, plane.hidden.device.type)
    chooser = BlockChooser(sparsity, codes, width, n, head, plane.hidden.new_empty(0, dtype=plane.wide))
    stats = forward(plane, shape, moments=moments, logp_grad=None, chooser=chooser, logit_sums=logit_sums)
    # what all processes have: whether it pays is for all to say together
    every = torch.full_like(chooser.expected, len(codes) * n)
    numbers = head.sum_(torch.stack([chooser.expected, every]))
    # the one wait for the device
    *counts, expected, pairs = torch.cat([chooser.counts.double(), numbers]).tolist()
    kept = KeptBlocks(codes, [int(count) for count in counts], width)
    share = head.sum_(chooser.kept_blocks) / max(pairs / max(n, 1), 1.0)
    return SparseForward(stats, kept, head.sum_(chooser.dropped_mass), share, pairs, expected)


def probe(plane: Plane, shape: TileShape, sparsity: Sparsity) -> bool:
    """Whether a few of the tokens say that a sparse backward pays."""
    tokens, vocab, device = plane.tokens, plane.head.vocab, plane.hidden.device
    few = torch.arange(0, tokens.count, int(1 / _PROBED), device=device)
    some = TokenRows(few if tokens.rows is None else tokens.rows[few], tokens.labels[few])
    blocks = -(-vocab // block_width(some.count, vocab, device.type))
    codes = torch.empty((blocks, some.count), dtype=torch.uint8, device=device)
    return sparse_forward(replace(plane, tokens=some), shape, sparsity, codes, moments=False).pays


def kept_slices(
    kept: KeptBlocks, tokens: int, vocab: int, max_rows: int, dtype: torch.dtype
) -> Iterator[VocabularySlice]:
    """The kept pairs as the backward takes them: a block's tokens, `max_rows` at a time. `dtype` is the gradients'."""
    for block, (members, weights) in enumerate(_members(kept, tokens, dtype)):
        parts = zip(members.split(max_rows), weights.split(max_rows), strict=True)
        start = block * kept.width
        columns = slice(start, min(start + kept.width, vocab))
        yield VocabularySlice(columns, [(rows, factors) for rows, factors in parts if rows.numel()])


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
