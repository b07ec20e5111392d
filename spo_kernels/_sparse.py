"""A forward that chooses (token, vocabulary block) pairs, and a backward over those: 1 + 3ρ products, 1 + 2ρ frozen.

ρ is the share of pairs that is kept; see `_sparse_blocks.py` for the choice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from spo_kernels._backend import Backend
from spo_kernels._driver import Head, TileBuffers, TileShape, TokenRows, forward
from spo_kernels._products import accumulator_dtype, headroom
from spo_kernels._sparse_blocks import BlockChooser, KeptBlocks, block_width, weights_of
from spo_kernels.sparsity import Sparsity
from spo_kernels.tiles.spec import MASS_BLOCK, TokenGrads, TokenStats

# above this share the exact backward is the faster one: products of gathered rows run at about 0.7 of the rate
_WORTH = 0.6
# of a frozen head's tokens, this share is looked at before the forward decides whether to finish hidden's gradient
_PROBED = 1 / 32

# pairs that are listed at a time, 16 bytes each; a GPU waits once for each list
_LISTED_PAIRS = 1 << 20


@dataclass(frozen=True)
class SparseForward:
    """Statistics, and what was chosen."""

    stats: TokenStats
    kept: KeptBlocks
    dropped_mass: Tensor  # [n]
    kept_share: Tensor  # [n]

    @property
    def pays(self) -> bool:
        """Whether the sparse backward is faster than the exact one."""
        return sum(self.kept.counts) <= _WORTH * self.kept_share.numel() * len(self.kept.counts)


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
    counts = codes[:, :n].count_nonzero(1).tolist()
    return SparseForward(stats, KeptBlocks(codes, counts, width), chooser.dropped_mass, chooser.kept_share)


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


def sparse_backward(
    hidden: Tensor,
    head: Head,
    tokens: TokenRows,
    grads: TokenGrads,
    backend: Backend,
    kept: KeptBlocks,
    max_rows: int,
    hidden_out: Tensor | None,
    weight_out: Tensor | None,
    bias_out: Tensor | None,
) -> None:
    """Gradients from the kept blocks: for each, logits of its tokens again, then the gradients' products.

    A block of the weight's gradient is written once; hidden's is accumulated over blocks in the accumulator dtype.
    """
    n, vocab, products = tokens.labels.numel(), head.weight.shape[0], backend.products
    wide, operand_dtype = accumulator_dtype(hidden.dtype), products.operand_dtype(hidden)
    buffers = TileBuffers(hidden, min(n, max_rows) * kept.width, products)
    unit = None
    if buffers.narrow is not None and buffers.narrow.dtype == torch.float16:
        unit = headroom(list(grads.upstream().values()), head.transform.scale)
        grads = grads if unit is None else grads.scale_upstream(1.0 / unit)
    hidden_sum = None if hidden_out is None else hidden.new_zeros((n, hidden.shape[1]), dtype=wide)
    for block, members in enumerate(_members(kept, n)):
        col, stop = block * kept.width, min((block + 1) * kept.width, vocab)
        weight = head.weight[col:stop].to(operand_dtype)
        bias = head.bias_slice(col, stop, wide)
        weight_sum = None
        if weight_out is not None:
            direct = weight_out.dtype == wide
            weight_sum = weight_out[col:stop] if direct else weight.new_empty(weight.shape, dtype=wide)
            if members.numel() == 0:
                weight_sum.zero_()
        for start in range(0, members.numel(), max_rows):
            some = members[start : start + max_rows]
            states = hidden[some if tokens.rows is None else tokens.rows[some]].to(operand_dtype)
            tile, out = buffers.tile(some.numel(), stop - col)
            products.matmul(states, weight.t(), out=tile)
            piece = grads.map(partial(torch.index_select, dim=0, index=some))
            piece = piece.scale_upstream(weights_of(kept.codes[block, some], wide))
            backend.tiles.tile_grad(tile, bias, tokens.labels[some] - col, head.transform, piece, out)
            operand = tile if out is None else out
            if weight_sum is not None:
                products.matmul(operand.t(), states, out=weight_sum, accumulate=start > 0)
            if hidden_sum is not None:
                gradient = hidden_sum.new_empty(states.shape)
                products.matmul(operand, weight, out=gradient)
                hidden_sum.index_add_(0, some, gradient)
            if bias_out is not None:
                bias_out[col:stop] += operand.sum(0, dtype=wide)
        if weight_out is not None and weight_sum is not None and weight_out.dtype != wide:
            weight_out[col:stop] = weight_sum if unit is None else weight_sum.mul_(unit)
    if unit is not None and bias_out is not None:
        bias_out.mul_(unit)
    if hidden_out is not None and hidden_sum is not None:
        tokens.put(hidden_out, 0, n, hidden_sum if unit is None else hidden_sum.mul_(unit))


def _members(kept: KeptBlocks, n: int) -> Iterator[Tensor]:
    """The tokens of each block, ascending."""
    first = 0
    while first < len(kept.counts):
        last, listed = first, 0
        while last < len(kept.counts) and (last == first or listed + kept.counts[last] <= _LISTED_PAIRS):
            listed += kept.counts[last]
            last += 1
        members = kept.codes[first:last, :n].nonzero()[:, 1]
        yield from members.split(kept.counts[first:last])
        first = last
