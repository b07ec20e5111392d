"""The (token, vocabulary) plane, and one tile of it at a time.

Tokens here are those that count: `rows[i]` is the row of `hidden` that predicts `labels[i]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spo_kernels.backends.contract import Backend, LogitTransform, Tile, TokenStats
from spo_kernels.backends.products import Products, accumulator_dtype
from spo_kernels.engine.head_slices import HeadSlices
from spo_kernels.engine.token_rows import TokenRows
from spo_kernels.engine.workspace import row_stride, tile_of


@dataclass(frozen=True)
class Plane:
    """What is walked: every token that counts with every column of the head, and who computes."""

    hidden: Tensor  # [rows, H]
    head: HeadSlices
    tokens: TokenRows
    backend: Backend

    @property
    def wide(self) -> torch.dtype:
        """The dtype of products, statistics and sums."""
        return accumulator_dtype(self.hidden.dtype)

    def tile(self, states: Tensor, labels: Tensor, columns: slice, buffers: TileBuffers) -> tuple[Tile, Tensor]:
        """Logits of some tokens with some columns, one product; and the weight's rows in it."""
        weight = self.head.rows(columns, states.dtype)
        found, out = buffers.tile(len(labels), columns.stop - columns.start)
        self.backend.products.matmul(states, weight.t(), out=found)
        bias = self.head.bias_rows(columns, self.wide)
        return Tile(found, relative(labels, columns), self.head.transform, bias, out), weight


class TileBuffers:
    """One tile of products and, where the next product takes narrower operands, one of those; used over and over."""

    def __init__(self, hidden: Tensor, rows: int, columns: int, products: Products | None) -> None:
        """For tiles of at most that size. Without `products`, they enter no other product."""
        cells = rows * row_stride(columns, hidden.device.type)
        self.wide = hidden.new_empty(cells, dtype=accumulator_dtype(hidden.dtype))
        self.narrow: Tensor | None = None
        if products is not None and products.tile_dtype(hidden) != self.wide.dtype:
            self.narrow = hidden.new_empty(cells, dtype=products.tile_dtype(hidden))

    def tile(self, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
        """The products' tile, and what a tile pass is to write instead of it."""
        out = None if self.narrow is None else tile_of(self.narrow, rows, columns)
        return tile_of(self.wide, rows, columns), out


def relative(labels: Tensor, columns: slice) -> Tensor:
    """Labels counted from the first of some columns."""
    return labels - columns.start if columns.start else labels


def label_slope(stats: TokenStats, transform: LogitTransform) -> Tensor:
    """d logp / d product at each token's label, `(1 - p) d logit / d product`."""
    # not by way of the log-sum-exp, whose rounding a confident token's 1 - p would feel
    rest = torch.expm1(stats.label_logit - stats.max - stats.sum.log()).mul_(-transform.scale)
    return rest if transform.softcap is None else rest * (1.0 - (stats.label_logit / transform.softcap).square())
