"""Chooses, from block masses, which (token, vocabulary block) pairs a sparse backward multiplies."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spo_kernels.backends.contract import MASS_BLOCK, TokenStats, mass_blocks
from spo_kernels.engine.head_slices import HeadSlices
from spo_kernels.sparsity import Sparsity

# pairs that are chosen at a time: temporaries of 4 MiB at most
_CHOSEN_PAIRS = 1 << 19
# steps of the search for a token's threshold: log2(blocks) octaves, halved seven times, to a tenth of one or less
_BISECTIONS = 7
# masses are float32 and their sum is rounded: room for it
_MARGIN = 1.0 - 2.0**-10
# probabilities are powers of 2^(1/8), the smallest 2^-20
_LEVELS_PER_OCTAVE, _MAX_LEVEL = 8, 160
_MIX = (0x85EBCA6B, 0xC2B2AE35, 0x9E3779B1)


@dataclass(frozen=True)
class KeptBlocks:
    """What was chosen for n tokens.

    `codes` is uint8 `[blocks, >= n]`: 0 where a block is left out for a token, else `1 + 8 log2(1 / probability)`
    of its having been kept. `counts` is the number of tokens of each block, in CPU memory.
    """

    codes: Tensor
    counts: list[int]
    width: int


def weights_of(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """By what the gradient of kept pairs is multiplied: one over their probability."""
    return torch.exp2((codes.to(dtype) - 1.0) / _LEVELS_PER_OCTAVE)


class BlockChooser:
    """Collects the masses of a row of tiles, then chooses for its tokens."""

    def __init__(
        self, sparsity: Sparsity, codes: Tensor, width: int, tokens: int, head: HeadSlices, like: Tensor
    ) -> None:
        """`codes` is filled in; see `KeptBlocks`. `like` has the dtype of the statistics."""
        self._sparsity, self._codes, self._width, self._head = sparsity, codes, width, head
        # processes that hold a part each may leave out a part of the tolerance each
        self._tolerance = sparsity.tolerance * _MARGIN / head.parts
        self._like = like
        self._buffer = like.new_empty(0)
        self.dropped_mass = like.new_zeros(tokens)
        self.kept_blocks = like.new_zeros(tokens)  # how many of each token's
        self.counts = torch.zeros(codes.shape[0], dtype=torch.int64, device=codes.device)  # tokens of each block
        self.expected = like.new_zeros((), dtype=torch.float64)  # pairs that are kept, on average over seeds

    def masses(self, rows: int, start: int, stop: int) -> Tensor:
        """Where the masses of columns start..stop belong; `start` is a multiple of MASS_BLOCK."""
        blocks = mass_blocks(self._head.vocab)
        if self._buffer.shape[:1] != (rows,):
            self._buffer = self._like.new_empty((rows, blocks))
        return self._buffer[:, start // MASS_BLOCK : mass_blocks(stop)]

    def choose(self, start: int, stop: int, stats: TokenStats, labels: Tensor) -> None:
        """Choose for tokens start..stop, whose masses and final statistics are known."""
        lse = stats.max + stats.sum.log()
        rows = max(1, _CHOSEN_PAIRS // self._buffer.shape[1])
        for first in range(0, stop - start, rows):
            part = slice(first, min(first + rows, stop - start))
            mass = self._merge((self._buffer[part] - lse[part, None]).exp_())
            self._choose(slice(start + part.start, start + part.stop), mass, labels[part])

    def _choose(self, tokens: slice, mass: Tensor, labels: Tensor) -> None:
        if self._sparsity.mode == "certified":
            probability = self._certified(mass)
            codes = probability.to(torch.uint8)
        else:
            level = self._level(mass)
            probability = torch.exp2(-level / _LEVELS_PER_OCTAVE)
            drawn = self._uniform(tokens.start, *mass.shape) < probability
            codes = torch.where(drawn, level + 1.0, 0.0).to(torch.uint8)
        self._mark_labels_(codes, labels)
        self.expected += self._mark_labels_(probability, labels).sum(dtype=torch.float64)
        kept = codes != 0
        self._codes[:, tokens] = codes.t()
        self.counts += kept.sum(0)
        self.dropped_mass[tokens] = mass.masked_fill_(kept, 0.0).sum(1)
        self.kept_blocks[tokens] = kept.sum(1).to(mass.dtype)

    def _mark_labels_(self, values: Tensor, labels: Tensor) -> Tensor:
        """`values` `[n, blocks]` with 1 at the blocks that hold the labels."""
        if self._head.whole:
            return values.scatter_(1, labels[:, None] // self._width, 1)
        inside = (labels >= 0) & (labels < self._head.vocab)
        values[inside, labels[inside] // self._width] = 1
        return values

    def _merge(self, mass: Tensor) -> Tensor:
        """Masses of blocks of `width` columns."""
        group = self._width // MASS_BLOCK
        if group == 1:
            return mass
        blocks = self._codes.shape[0]
        padded = torch.nn.functional.pad(mass, (0, blocks * group - mass.shape[1]))
        return padded.view(mass.shape[0], blocks, group).sum(2)

    def _certified(self, mass: Tensor) -> Tensor:
        """1 where a block is kept: the largest threshold is searched below which the masses sum to the tolerance.

        Blocks below tolerance / blocks always fit; one above the tolerance never does. A nan is kept.
        """
        tolerance = self._tolerance
        low = mass.new_full((mass.shape[0], 1), tolerance / mass.shape[1])
        high = torch.full_like(low, tolerance)
        for _ in range(_BISECTIONS):
            middle = (low * high).sqrt_()
            fits = mass.masked_fill(mass >= middle, 0.0).sum(1, keepdim=True) <= tolerance
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return (mass < low).logical_not_().to(mass.dtype)

    def _level(self, mass: Tensor) -> Tensor:
        """8 log2(1 / probability), a whole number: probabilities are rounded up to the next. A nan is kept."""
        level = (mass / self._sparsity.tolerance).log2_().mul_(-_LEVELS_PER_OCTAVE).floor_()
        return level.clamp_(0, _MAX_LEVEL).nan_to_num_(0.0)

    def _uniform(self, first_token: int, tokens: int, blocks: int) -> Tensor:
        """Numbers in [0, 1), float64, by a hash of seed, token and block: no matter how tokens are tiled.

        Blocks are counted from the first class here, so that other processes' have other numbers.
        """
        device = self._codes.device
        token = torch.arange(first_token, first_token + tokens, device=device)[:, None]
        block = torch.arange(self._head.first, self._head.first + blocks, device=device)[None, :]
        low, high = self._sparsity.seed & 0xFFFFFFFF, self._sparsity.seed >> 32
        return _hash(_hash(_hash(_hash(token + 1) + low) + high) + block).double() / 2.0**32


def _hash(x: Tensor) -> Tensor:
    """32 well-mixed bits of an int64: MurmurHash3's finaliser after a multiplication by the golden ratio."""
    x = (x * _MIX[2]) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * _MIX[0]) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * _MIX[1]) & 0xFFFFFFFF
    return x ^ (x >> 16)
