"""What a tile backend is given and what it owes: the contract that every backend is tested against.

A tile is a contiguous `[R, C]` matrix of products `hidden @ weight.T` for R tokens and C vocabulary
columns, in float32 (float64 for float64 inputs). `logits = softcap(scale * (tile + bias))` with
`softcap(x) = c * tanh(x / c)`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

# width of the vocabulary blocks whose mass `tile_stats` reports
MASS_BLOCK = 128


def mass_blocks(columns: int) -> int:
    """How many blocks of `MASS_BLOCK` columns a tile has, the last of them maybe ragged."""
    return -(-columns // MASS_BLOCK)


@dataclass(frozen=True)
class LogitTransform:
    """From products to logits: `softcap(scale * (product + bias))`."""

    scale: float = 1.0
    softcap: float | None = None


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
        """Statistics of no column at all."""
        zeros = [like.new_zeros(tokens) if moments else None for _ in range(2)]
        return cls(
            max=like.new_full((tokens,), -torch.inf),
            sum=like.new_zeros(tokens),
            label_logit=like.new_full((tokens,), -torch.inf),
            shifted_sum=zeros[0],
            square_sum=zeros[1],
        )

    @property
    def lse(self) -> Tensor:
        """Log-sum-exp of the logits."""
        return self.max + self.sum.log()

    @property
    def logp(self) -> Tensor:
        """Log-probability of the label."""
        return self.label_logit - self.lse

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


@dataclass(frozen=True)
class TokenGrads:
    """What the backward knows about each token: upstream gradients, and the statistics they need.

    `logp`, `lse`, `entropy` and `log_sum_p2` are upstream gradients `[R]`, or None where nothing flows.
    `entropy_value` and `log_sum_p2_value` accompany the gradients of the same name.
    """

    lse_value: Tensor
    logp: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    entropy_value: Tensor | None = None
    log_sum_p2: Tensor | None = None
    log_sum_p2_value: Tensor | None = None

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


class TileBackend(Protocol):
    """The two passes over a tile. `labels` are relative to the tile's first column and may lie outside it."""

    TEMPORARIES: float  # what a pass needs beside the tile, in tiles

    def tile_stats(
        self,
        tile: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        transform: LogitTransform,
        stats: TokenStats,
        rescale: Tensor | None,
        out: Tensor | None = None,
        block_lse: Tensor | None = None,
    ) -> None:
        """Merge the tile into `stats`, and leave it as it is.

        `block_lse` (`[R, mass_blocks(C)]`, rows may be strided), not together with `rescale`, receives the
        log-sum-exp of the logits of each MASS_BLOCK neighbouring columns; -inf is allowed where that is more than
        87 below the running maximum.

        With `rescale` (`[R]`), also prepare `Σ_v e_v d logit_v/d product_v W_v`:
        the tile becomes `exp(logit - new max) * d logit / d product`, 0 at the label's column, and `rescale`
        receives `exp(old max - new max)`, by which sums over earlier tiles are to be multiplied.

        Where products take half-precision operands, `out` (`[R, C]`) receives that instead of the tile, whose
        values are then undefined.
        """
        ...

    def tile_grad(
        self,
        tile: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        transform: LogitTransform,
        grads: TokenGrads,
        out: Tensor | None = None,
    ) -> None:
        """Replace the tile by d loss / d product, or write that to `out` as in `tile_stats`.

        With p the softmax: `d loss/d logit = logp (onehot - p) + lse p - entropy p (log p + H)
        + 2 log_sum_p2 (p² / Σp² - p)`, then through softcap and scale.
        """
        ...

    def scale_rows(self, matrix: Tensor, factors: Tensor) -> None:
        """Multiply each row of `matrix` (a tile's dtype or a product operand's) by its factor, in place."""
        ...
