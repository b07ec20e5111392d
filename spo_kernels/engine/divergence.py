"""Walks tiles of two models at once, for the KL divergence of one from the other; see `kl.py`.

With reference logits a, policy logits b and p, q their softmaxes, KL(p‖q) = Σ p (a - b) - lse(a) + lse(b): three sums
that are merged tile by tile. Backward: d KL / d b = q - p, from the same two tiles recomputed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spo_kernels.backends.contract import Backend, LogitTransform
from spo_kernels.backends.products import accumulator_dtype, headroom
from spo_kernels.backends.torch_backend import TorchBackend, logit_slope, to_logits
from spo_kernels.engine.exact import Head, TokenRows, plan_tiles

# rows of a tile handled at a time, so that temporaries stay small
_PIECES = 16


@dataclass(frozen=True)
class Models:
    """Both models and how their tiles are made."""

    hidden: Tensor  # [rows, H]
    head: Head
    ref_hidden: Tensor  # [rows, H_ref]
    ref_head: Head
    backend: Backend  # its products; what happens between them is torch's on every backend
    workspace_bytes: int | None

    def tiles(self, tokens: TokenRows) -> Iterator["_Tile"]:
        """Every tile of the plane, a slice of the vocabulary after the other."""
        n, vocab = tokens.labels.numel(), self.head.weight.shape[0]
        sides = ((self.hidden, self.head), (self.ref_hidden, self.ref_head))
        beside = TorchBackend.temporaries
        shapes = [
            plan_tiles(n, states, head, self.backend, self.workspace_bytes, models=2, temporaries=beside)
            for states, head in sides
        ]
        rows, columns = (min(getattr(shape, name) for shape in shapes) for name in ("rows", "columns"))
        wide = accumulator_dtype(self.hidden.dtype)
        buffers = [self.hidden.new_empty(min(n, rows) * columns, dtype=wide) for _ in sides]
        for col in range(0, vocab, columns):
            span = slice(col, min(col + columns, vocab))
            operands = [self.backend.products.operand_dtype(states) for states, _ in sides]
            weights = [head.weight[span].to(dtype) for (_, head), dtype in zip(sides, operands, strict=True)]
            biases = [head.bias_slice(span.start, span.stop, wide) for _, head in sides]
            for row in range(0, n, rows):
                part = slice(row, min(row + rows, n))
                products, taken = [], []
                for (states, _), weight, buffer in zip(sides, weights, buffers, strict=True):
                    taken.append(tokens.take(states, part.start, part.stop, weight.dtype))
                    tile = buffer[: (part.stop - row) * weight.shape[0]].view(-1, weight.shape[0])
                    self.backend.products.matmul(taken[-1], weight.t(), out=tile)
                    products.append(tile)
                yield _Tile(part, span, taken[0], weights[0], products[0], products[1], biases[0], biases[1])


@dataclass(frozen=True)
class _Tile:
    """Products of both models for the same tokens and columns."""

    rows: slice
    columns: slice
    states: Tensor  # the policy's hidden states of the tokens
    weight: Tensor  # the policy's head in the columns
    products: Tensor
    ref_products: Tensor
    bias: Tensor | None
    ref_bias: Tensor | None

    def logits(self, transform: LogitTransform) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Piece by piece: its rows in the tile, the reference's logits and the policy's."""
        step = max(1, -(-self.products.shape[0] // _PIECES))
        for start in range(0, self.products.shape[0], step):
            piece = slice(start, min(start + step, self.products.shape[0]))
            ref_logits = to_logits(self.ref_products[piece], self.ref_bias, transform)
            yield piece, ref_logits, to_logits(self.products[piece], self.bias, transform)


def _merge(maximum: Tensor, total: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Merge logits into a running softmax in place; their exponentials, and by how much earlier sums shrink."""
    new = torch.maximum(maximum, logits.amax(1))
    # a row whose columns so far are all -inf would otherwise give exp(-inf + inf) = nan
    finite = new.masked_fill(new == -torch.inf, 0.0)
    shrink = (maximum - finite).exp()
    exponential = (logits - finite[:, None]).exp_()
    total.mul_(shrink).add_(exponential.sum(1))
    maximum.copy_(new)
    return exponential, shrink


def forward(models: Models, tokens: TokenRows) -> tuple[Tensor, Tensor, Tensor]:
    """Divergences, and both models' log-sum-exps, of the tokens."""
    n = tokens.labels.numel()
    like = models.hidden.new_zeros(n, dtype=accumulator_dtype(models.hidden.dtype))
    maxima, sums = [torch.full_like(like, -torch.inf) for _ in range(2)], [torch.zeros_like(like) for _ in range(2)]
    gap = torch.zeros_like(like)  # Σ e^(a - max a) (a - b)
    for tile in models.tiles(tokens):
        for piece, ref_logits, logits in tile.logits(models.head.transform):
            at = slice(tile.rows.start + piece.start, tile.rows.start + piece.stop)
            _merge(maxima[1][at], sums[1][at], logits)
            exponential, shrink = _merge(maxima[0][at], sums[0][at], ref_logits)
            # where the reference gives no probability, the policy's may be anything
            difference = ref_logits.sub_(logits).masked_fill_(exponential == 0, 0.0)
            gap[at] = gap[at] * shrink + exponential.mul_(difference).sum(1)
    ref_lse, lse = (maximum + total.log() for maximum, total in zip(maxima, sums, strict=True))
    return gap / sums[0] - ref_lse + lse, ref_lse, lse


def backward(
    models: Models,
    tokens: TokenRows,
    ref_lse: Tensor,
    lse: Tensor,
    grad: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the policy's hidden states, head and bias."""
    hidden, head, products = models.hidden, models.head, models.backend.products
    wide = accumulator_dtype(hidden.dtype)
    unit = None
    if products.tile_dtype(hidden) == torch.float16:
        unit = headroom([grad], head.transform.scale)
        grad = grad if unit is None else grad / unit
    need_hidden, need_weight, need_bias = needs
    n, width = tokens.labels.numel(), hidden.shape[1]
    d_hidden = hidden.new_zeros((n, width), dtype=wide) if need_hidden else None
    d_weight = torch.zeros_like(head.weight, memory_format=torch.contiguous_format) if need_weight else None
    d_bias = head.weight.new_zeros(head.weight.shape[0], dtype=wide) if need_bias else None
    slice_sum = None
    for tile in models.tiles(tokens):
        for piece, ref_logits, logits in tile.logits(head.transform):
            at = slice(tile.rows.start + piece.start, tile.rows.start + piece.stop)
            slope = logit_slope(logits, head.transform)
            p = ref_logits.sub_(ref_lse[at, None]).exp_()
            q = logits.sub_(lse[at, None]).exp_()
            tile.products[piece] = q.sub_(p).mul_(slope).mul_(grad[at, None])
        if d_hidden is not None:
            products.matmul(tile.products, tile.weight, out=d_hidden[tile.rows], accumulate=True)
        if d_bias is not None:
            d_bias[tile.columns] += tile.products.sum(0)
        if d_weight is not None:
            if tile.rows.start == 0:
                slice_sum = tile.weight.new_empty(tile.weight.shape, dtype=wide)
            assert slice_sum is not None
            products.matmul(tile.products.t(), tile.states, out=slice_sum, accumulate=tile.rows.start > 0)
            if tile.rows.stop == n:
                d_weight[tile.columns] = slice_sum if unit is None else slice_sum * unit
    factor = 1.0 if unit is None else unit
    full = None
    if d_hidden is not None:
        full = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        tokens.put(full, 0, n, d_hidden * factor)
    return full, d_weight, None if d_bias is None else (d_bias * factor).to(head.weight.dtype)
