"""Walks tiles of two models at once, for the KL divergence of one from the other; see `kl.py`.

With reference logits a, policy logits b and p, q their softmaxes, KL(p‖q) = Σ p (a - b) - lse(a) + lse(b): three sums
that are merged tile by tile. Backward: d KL / d b = q - p, from the same two tiles recomputed. A log-sum-exp stays in
two parts, the maximum and the logarithm of a sum: at logits of 1000, their float32 sum would be off by 3e-5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spo_kernels.backends.contract import TokenStats
from spo_kernels.backends.products import headroom
from spo_kernels.backends.torch_backend import TorchBackend, logit_slope, pieces, to_logits
from spo_kernels.engine.gradients import HeadGradient, SliceGradient
from spo_kernels.engine.plane import Plane
from spo_kernels.engine.workspace import plan_tiles, row_stride, spans, tile_of


@dataclass(frozen=True)
class Models:
    """Both models, for the same tokens and vocabulary. Between the products run torch's operations on any backend."""

    policy: Plane
    reference: Plane
    workspace_bytes: int | None

    def tiles(self) -> Iterator[_Tile]:
        """Every tile of the plane, a slice of the vocabulary after the other."""
        sides = (self.policy, self.reference)
        n = self.policy.tokens.count
        shapes = [
            plan_tiles(
                n, side.hidden, side.head, side.backend, self.workspace_bytes,
                exponentials=False, models=2, temporaries=TorchBackend.temporaries,
            )
            for side in sides
        ]  # fmt: skip
        rows, columns = (min(getattr(shape, name) for shape in shapes) for name in ("rows", "columns"))
        cells = min(n, rows) * row_stride(columns, sides[0].hidden.device.type)
        buffers = [side.hidden.new_empty(cells, dtype=side.wide) for side in sides]
        for span in spans(self.policy.head.vocab, columns):
            weights = [side.head.rows(span, side.backend.products.operand_dtype(side.hidden)) for side in sides]
            biases = [side.head.bias_rows(span, side.wide) for side in sides]
            for part in spans(n, rows):
                found, taken = [], []
                for side, weight, buffer in zip(sides, weights, buffers, strict=True):
                    taken.append(side.tokens.take(side.hidden, part.start, part.stop, weight.dtype))
                    tile = tile_of(buffer, part.stop - part.start, weight.shape[0])
                    side.backend.products.matmul(taken[-1], weight.t(), out=tile)
                    found.append(tile)
                yield _Tile(self, part, span, taken[0], weights[0], found[0], found[1], biases[0], biases[1])


@dataclass(frozen=True)
class _Tile:
    """Products of both models for the same tokens and columns."""

    models: Models
    rows: slice
    columns: slice
    states: Tensor  # the policy's hidden states of the tokens
    weight: Tensor  # the policy's head in the columns
    products: Tensor
    ref_products: Tensor
    bias: Tensor | None
    ref_bias: Tensor | None

    def logits(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Piece by piece: its rows in the tile and among all tokens, the reference's logits and the policy's."""
        first = self.rows.start
        for piece in pieces(*self.products.shape):
            ref_logits = to_logits(self.ref_products[piece], self.ref_bias, self.models.reference.head.transform)
            logits = to_logits(self.products[piece], self.bias, self.models.policy.head.transform)
            yield piece, slice(first + piece.start, first + piece.stop), ref_logits, logits


def _absorb(stats: TokenStats, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Merge logits into a running softmax; their exponentials, and by how much earlier sums shrink."""
    shrink = stats.rebase_(logits.amax(1))
    exponential = (logits - stats.base[:, None]).exp_()
    stats.sum.add_(exponential.sum(1))
    return exponential, shrink


class Normalisers(NamedTuple):
    """Both models' log-sum-exps, of each token: the largest logit, and the logarithm of the sum relative to it."""

    ref_max: Tensor
    ref_log_sum: Tensor
    max: Tensor
    log_sum: Tensor


def forward(models: Models) -> tuple[Tensor, Normalisers]:
    """Divergences of the tokens, and what the backward reads."""
    policy, n = models.policy, models.policy.tokens.count
    like = policy.hidden.new_empty(0, dtype=policy.wide)
    stats, ref_stats = (TokenStats.start(n, like, moments=False) for _ in range(2))
    gap = like.new_zeros(n)  # Σ e^(a - max a) (a - b)
    for tile in models.tiles():
        for _, at, ref_logits, logits in tile.logits():
            _absorb(stats.rows(at.start, at.stop), logits)
            exponential, shrink = _absorb(ref_stats.rows(at.start, at.stop), ref_logits)
            # where the reference gives no probability, the policy's may be anything
            difference = ref_logits.sub_(logits).masked_fill_(exponential == 0, 0.0)
            gap[at] = gap[at] * shrink + exponential.mul_(difference).sum(1)
    policy.head.join_(stats)
    moved = models.reference.head.join_(ref_stats)
    if moved is not None:
        models.reference.head.sum_(gap.mul_(moved))
    found = Normalisers(ref_stats.max, ref_stats.sum.log(), stats.max, stats.sum.log())
    return (gap / ref_stats.sum - (found.ref_max - found.max)) - (found.ref_log_sum - found.log_sum), found


def backward(
    models: Models, found: Normalisers, grad: Tensor, hidden_out: Tensor | None, head_out: HeadGradient
) -> None:
    """Gradients of the policy's hidden states, head and bias."""
    policy, n = models.policy, models.policy.tokens.count
    transform, products = policy.head.transform, policy.backend.products
    unit = None
    if products.tile_dtype(policy.hidden) == torch.float16:
        unit = headroom([grad], transform.scale)
        grad = grad if unit is None else grad / unit
    hidden_sum = None if hidden_out is None else policy.hidden.new_zeros((n, policy.head.width), dtype=policy.wide)
    weight_sum, narrow = SliceGradient(head_out, products, policy.wide), None
    if n == 0:
        head_out.zero_()
    for tile in models.tiles():
        for piece, at, ref_logits, logits in tile.logits():
            slope = logit_slope(logits, transform)
            ref_max, ref_log_sum, largest, log_sum = (values[at, None] for values in found)
            p = ref_logits.sub_(ref_max).sub_(ref_log_sum).exp_()
            q = logits.sub_(largest).sub_(log_sum).exp_()
            tile.products[piece] = q.sub_(p).mul_(slope).mul_(grad[at, None])
        operand = tile.products
        if operand.is_cuda and products.tile_dtype(policy.hidden) != operand.dtype:
            # both products would cast it
            if narrow is None:
                cells = operand.shape[0] * operand.stride(0)
                narrow = operand.new_empty(cells, dtype=products.tile_dtype(policy.hidden))
            operand = tile_of(narrow, *operand.shape).copy_(operand)
        if hidden_sum is not None:
            products.matmul(operand, tile.weight, out=hidden_sum[tile.rows], accumulate=True)
        if tile.rows.start == 0:
            weight_sum.begin(tile.columns, tile.weight)
        weight_sum.add(operand, tile.states)
        if tile.rows.stop == n:
            weight_sum.finish(unit)
    if hidden_out is not None and hidden_sum is not None:
        policy.head.sum_(hidden_sum)
        policy.tokens.put(hidden_out, 0, n, hidden_sum if unit is None else hidden_sum * unit)
