"""The contract of a backend: what it is given, what it owes, and what every backend is tested against.

A tile is a contiguous `[R, C]` matrix of products `hidden @ weight.T` for R tokens and C vocabulary columns, in
float32 (float64 for float64 inputs). `logits = softcap(scale * (products + bias))` with `softcap(x) = c * tanh(x / c)`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import ClassVar

import torch
from torch import Tensor

from spo_kernels.backends.pair_form import PairForm, PairTensors
from spo_kernels.backends.products import Products, accumulator_dtype

# width of the vocabulary blocks whose mass `tile_stats` reports
MASS_BLOCK = 128


def mass_blocks(columns: int) -> int:
    """How many blocks of `MASS_BLOCK` columns a tile has, the last of them maybe ragged."""
    return -(-columns // MASS_BLOCK)


class Scalar(IntEnum):
    """What a matrix holds, by the numbers of `csrc/tile.h`."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Scalar":
        """The number of a dtype.

        Raises:
            KeyError: The extensions know no such dtype.
        """
        return SCALARS[dtype]


SCALARS = {torch.float32: Scalar.FLOAT32, torch.bfloat16: Scalar.BFLOAT16, torch.float16: Scalar.FLOAT16}


@dataclass(frozen=True)
class LogitTransform:
    """From products to logits: `softcap(scale * (product + bias))`."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Tile:
    """Products of R tokens and C vocabulary columns, and what turns them into logits."""

    products: Tensor  # [R, C]; rows may be apart, columns not
    labels: Tensor  # [R], relative to the tile's first column; may lie outside the tile
    transform: LogitTransform
    bias: Tensor | None = None  # [C]
    # [R, C], where products take half-precision operands: receives what otherwise replaces `products`, whose values
    # are undefined afterwards
    out: Tensor | None = None

    @property
    def written(self) -> Tensor:
        """The matrix that a pass writes."""
        return self.products if self.out is None else self.out

    def rows(self, start: int, stop: int) -> "Tile":
        """A view of some of the tokens."""
        out = None if self.out is None else self.out[start:stop]
        return Tile(self.products[start:stop], self.labels[start:stop], self.transform, self.bias, out)


@dataclass(frozen=True)
class TokenStats:
    """Running softmax statistics of R tokens, merged tile by tile; each tensor is `[R]`.

    With m the running maximum over the columns seen so far and `e_v = exp(logit_v - m)`:
    `sum = Σ e_v`, `shifted_sum = Σ e_v (logit_v - m)`, `square_sum = Σ e_v²`. The last two are
    None unless entropy or log Σ p² were asked for.
    """

    max: Tensor
    sum: Tensor
    label_logit: Tensor
    shifted_sum: Tensor | None
    square_sum: Tensor | None

    @classmethod
    def start(cls, tokens: int, like: Tensor, moments: bool) -> "TokenStats":
        """Statistics of no column at all, with the last two sums if `moments`; dtype and device are those of `like`."""
        zeros = [like.new_zeros(tokens) if moments else None for _ in range(2)]
        return cls(
            max=like.new_full((tokens,), -torch.inf),
            sum=like.new_zeros(tokens),
            label_logit=like.new_full((tokens,), -torch.inf),
            shifted_sum=zeros[0],
            square_sum=zeros[1],
        )

    def lse(self) -> tuple[Tensor, Tensor]:
        """Log-sum-exp of the logits, and what rounding took from it, which at a logit of 1000 is 3e-5."""
        log_sum = self.sum.log()
        lse = self.max + log_sum
        return lse, (self.max - lse) + log_sum

    @property
    def logp(self) -> Tensor:
        """Log-probability of the label: from the maximum, since near 0 a rounded log-sum-exp would be all of it."""
        return (self.label_logit - self.base) - self.sum.log()

    @property
    def entropy(self) -> Tensor:
        """`-Σ p log p`; only with moments."""
        assert self.shifted_sum is not None
        return self.sum.log() - self.shifted_sum / self.sum

    @property
    def log_sum_p2(self) -> Tensor:
        """`log Σ p²`; only with moments."""
        assert self.square_sum is not None
        return self.square_sum.log() - 2.0 * self.sum.log()

    def rows(self, start: int, stop: int) -> "TokenStats":
        """A view of some of the tokens."""
        shifted = None if self.shifted_sum is None else self.shifted_sum[start:stop]
        square = None if self.square_sum is None else self.square_sum[start:stop]
        return TokenStats(
            max=self.max[start:stop],
            sum=self.sum[start:stop],
            label_logit=self.label_logit[start:stop],
            shifted_sum=shifted,
            square_sum=square,
        )

    @property
    def base(self) -> Tensor:
        """What the sums are relative to: the maximum, or 0 where all columns so far are -inf.

        Relative to -inf an exponential would be exp(-inf + inf) = nan.
        """
        return _finite(self.max)

    def rebase_(self, maximum: Tensor) -> Tensor:
        """Make the sums relative to `max(self.max, maximum)`, the new maximum.

        Returns:
            `exp(old maximum - new maximum)` (`[R]`): the factor of `sum`, and of every other sum that is kept
            relative to the maximum. 0 where no column was seen before.
        """
        new = torch.maximum(self.max, maximum)
        moved, factor = self._relative_to(_finite(new))
        for mine, value in zip(self._sums(), moved, strict=True):
            mine.copy_(value)
        self.max.copy_(new)
        return factor

    def merge_(self, other: "TokenStats") -> None:
        """Statistics of further columns of the same tokens join; `other` stays as it is.

        `label_logit` is -inf on the side that did not see the label. Both have the last two sums, or neither.
        """
        self.rebase_(other.max)
        moved, _ = other._relative_to(self.base)
        for mine, value in zip(self._sums(), moved, strict=True):
            mine.add_(value)
        self.label_logit.copy_(torch.maximum(self.label_logit, other.label_logit))

    def _sums(self) -> list[Tensor]:
        if self.shifted_sum is None or self.square_sum is None:
            return [self.sum]
        return [self.sum, self.shifted_sum, self.square_sum]

    def _relative_to(self, base: Tensor) -> tuple[list[Tensor], Tensor]:
        """The sums relative to another base, and the factor of the first of them."""
        drop = self.max - base
        factor = drop.exp()
        moved = [self.sum * factor]
        if self.shifted_sum is not None and self.square_sum is not None:
            # with no column seen, drop is -inf and nothing moves
            carried = self.sum * drop.masked_fill(self.sum == 0, 0.0)
            moved += [(self.shifted_sum + carried) * factor, self.square_sum * factor.square()]
        return moved, factor


def _finite(maximum: Tensor) -> Tensor:
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


@dataclass(frozen=True)
class TokenGrads:
    """What the backward knows about each token: upstream gradients, and the statistics they need.

    `logp`, `lse`, `entropy` and `log_sum_p2` are upstream gradients `[R]`, or None where nothing flows.
    `entropy_value` and `log_sum_p2_value` accompany the gradients of the same name. A probability is
    `exp((logit - lse_value) - lse_rest)`; without `lse_rest` nothing was lost.
    """

    lse_value: Tensor
    logp: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    entropy_value: Tensor | None = None
    log_sum_p2: Tensor | None = None
    log_sum_p2_value: Tensor | None = None
    lse_rest: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "TokenGrads":
        """The same record with every tensor replaced by `function(tensor)`."""
        present = {name: function(value) for name, value in vars(self).items() if value is not None}
        return replace(self, **present)

    def rows(self, start: int, stop: int) -> "TokenGrads":
        """A view of some of the tokens."""
        return self.map(lambda values: values[start:stop])

    def upstream(self) -> dict[str, Tensor]:
        """The upstream gradients that are there, without the values that go with them."""
        names = ("logp", "lse", "entropy", "log_sum_p2")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def scale_upstream(self, factor: Tensor) -> "TokenGrads":
        """The same record with the upstream gradients multiplied."""
        return replace(self, **{name: gradient * factor for name, gradient in self.upstream().items()})

    @property
    def only_logp(self) -> bool:
        """Whether nothing flows into the optional outputs."""
        return self.lse is None and self.entropy is None and self.log_sum_p2 is None


def add_at_labels_(tile: Tensor, labels: Tensor, value: Tensor) -> None:
    """Add `value` (`[R]`) at each row's label, where the label lies inside the tile."""
    inside = (labels >= 0) & (labels < tile.shape[1])
    # not by scatter_add_, which on a CPU takes 0.5 us a row
    place = torch.arange(tile.shape[0], device=tile.device), labels.clamp(0, tile.shape[1] - 1)
    tile[place] = tile[place] + value.masked_fill(~inside, 0.0).to(tile.dtype)


class Backend(ABC):
    """How one kind of machine multiplies (`products`), and what it does to a tile between two products (the rest)."""

    name: ClassVar[str]
    # what a pass over a tile needs beside the tile, in tiles
    temporaries: ClassVar[float] = 0.0
    # whether `pair_loss` is there
    pair_loss_available: ClassVar[bool] = False

    products: Products

    def cell_bytes(self, inputs: Tensor, temporaries: float | None = None) -> int:
        """Workspace of one cell of a tile: the cell, what a pass needs beside it, and its rounded copy for a product.

        `temporaries` is given where passes of another backend run between this one's products.
        """
        wide = accumulator_dtype(inputs.dtype)
        rounded = self.products.tile_dtype(inputs)
        beside = self.temporaries if temporaries is None else temporaries
        return math.ceil(wide.itemsize * (1.0 + beside)) + (rounded.itemsize if rounded != wide else 0)

    @abstractmethod
    def tile_stats(
        self, tile: Tile, stats: TokenStats, *, rescale: Tensor | None = None, block_lse: Tensor | None = None
    ) -> None:
        """Merge the tile's columns into `stats`, and leave `tile.products` as they are.

        `block_lse` (`[R, mass_blocks(C)]`, rows may be strided), not together with `rescale`, receives the log-sum-exp
        of the logits of each MASS_BLOCK neighbouring columns; -inf is allowed where that is more than 87 below the
        running maximum.

        With `rescale` (`[R]`), also prepare `Σ_v e_v d logit_v/d product_v W_v`: `tile.written` becomes
        `exp(logit - new max) * d logit / d product`, 0 at the label's column, and `rescale` receives
        `exp(old max - new max)`, by which sums over earlier tiles are to be multiplied.
        """

    @abstractmethod
    def tile_grad(self, tile: Tile, grads: TokenGrads) -> None:
        """`tile.written` becomes d loss / d product.

        With p the softmax: `d loss/d logit = logp (onehot - p) + lse p - entropy p (log p + H)
        + 2 log_sum_p2 (p² / Σp² - p)`, then through softcap and scale.
        """

    @abstractmethod
    def scale_rows(self, matrix: Tensor, factors: Tensor) -> None:
        """Multiply each row of `matrix` (a tile's dtype or a product operand's) by its factor, in place."""

    def pair_loss(self, pairs: PairTensors, form: PairForm, factor: float) -> tuple[Tensor, Tensor]:
        """From token log-probs to the losses of B pairs and each token's coefficient, in one launch.

        Args:
            pairs: The pairs.
            form: Which of the formulas.
            factor: What the coefficients are multiplied by.

        Returns:
            `(summary [7, B], coefficients)`: loss, rewards of chosen and rejected, their difference and order,
            log-probs of chosen and rejected; and `factor * d loss / d logp` in logp's shape.

        Raises:
            NotImplementedError: `pair_loss_available` is False.
        """
        raise NotImplementedError(f"the {self.name} backend has no kernel for the pair loss")
