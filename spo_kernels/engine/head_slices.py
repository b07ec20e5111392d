"""The head as the engine sees it: something that yields slices of the vocabulary and takes their gradients.

What is particular to a kind of head (how its rows are stored, which of them this process holds, where their gradients
go) is known here and in `gradients.py` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spo_kernels.backends.contract import LogitTransform, TokenStats
from spo_kernels.backends.products import Products
from spo_kernels.engine.gradients import HeadGradient, SliceGradient
from spo_kernels.engine.row_stream import RowStream, StreamedGradient
from spo_kernels.engine.vocab_shard import VocabShard

Shard = VocabShard | RowStream

_SUMMED_ROWS = 4096


@dataclass(frozen=True)
class HeadSlices:
    """The rows of the vocabulary in this process: of one tensor, or of a frozen one beside a trained one.

    With a base, rows are `[base, weight]`, and put together a slice at a time: `weight` is what an adapter's last step
    multiplies the last entries of the hidden states with. Gradients are of `weight` alone.
    With a shard, other processes have the rest. Of a `VocabShard` labels are counted from this process's first class,
    and lie outside [0, V) where they are another's; of a `RowStream` the others' rows come in `pieces`.
    """

    weight: Tensor  # [V, H], or [V, r] beside a base
    bias: Tensor | None  # [V]
    transform: LogitTransform
    base: Tensor | None = None  # [V, H - r], a constant
    shard: Shard | None = None

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        transform: Tensor,
        base: Tensor | None,
        shard: Shard | None = None,
    ) -> HeadSlices:
        """From the tensors that an op takes; see `ModelInputs.tensors`."""
        scale, softcap = transform.tolist()
        return cls(weight, bias, LogitTransform(scale, softcap or None), base, shard)

    @property
    def vocab(self) -> int:
        """V, how many rows this process has."""
        return self.weight.shape[0]

    @property
    def streams(self) -> bool:
        """Whether rows come from other processes, slice by slice."""
        return isinstance(self.shard, RowStream)

    def pieces(self, step: int) -> Iterator[tuple[slice, HeadSlices]]:
        """The rows to multiply with, as many as are here at once, and their classes as labels count them.

        All of them; or, where they are streamed, at most `step` at a time, good until the one after the next.
        """
        if not isinstance(self.shard, RowStream):
            yield slice(0, self.vocab), self
            return
        own = (self.weight,) if self.bias is None else (self.weight, self.bias)
        for classes, (weight, *bias) in self.shard.bring(step, *own):
            yield classes, HeadSlices(weight, bias[0] if bias else None, self.transform)

    @property
    def whole(self) -> bool:
        """Whether these are all rows that there are."""
        return self.shard is None

    @property
    def classes(self) -> int:
        """V of all processes together."""
        return self.vocab if self.shard is None else self.shard.vocab

    @property
    def parts(self) -> int:
        """How many processes have rows."""
        return 1 if self.shard is None else len(self.shard.rows)

    @property
    def first(self) -> int:
        """The class of the first row."""
        return 0 if self.shard is None else self.shard.first

    @property
    def widest(self) -> int:
        """The largest V of all processes: what they plan with, so that all have the same tiles of tokens."""
        return self.vocab if self.shard is None else max(self.shard.rows)

    @property
    def stop(self) -> int:
        """The class after the last one that this process multiplies with, as labels count them."""
        return self.classes if self.streams else self.vocab

    def tokens_of_pieces(self, labels: Tensor, step: int) -> Iterator[Tensor]:
        """Of a head that is streamed: the tokens whose labels' rows come with each of `pieces(step)`."""
        assert isinstance(self.shard, RowStream)
        return iter(self.shard.tokens_of_slices(labels, step))

    def join_(self, stats: TokenStats) -> Tensor | None:
        """Statistics of these rows become those of all; see `VocabShard.join_`. None where these are all."""
        return None if self.shard is None else self.shard.join_(stats)

    def sum_(self, values: Tensor) -> Tensor:
        """Sums over these rows, which become those over all."""
        return values if self.shard is None else self.shard.sum_(values)

    @property
    def width(self) -> int:
        """H."""
        return self.trained_width + (0 if self.base is None else self.base.shape[1])

    @property
    def trained_width(self) -> int:
        """Entries of a row that have a gradient."""
        return self.weight.shape[1]

    @property
    def weight_bytes(self) -> int:
        """Of one entry of the weight as it is stored."""
        return self.weight.dtype.itemsize

    def copied_bytes(self, itemsize: int) -> int:
        """What an entry of `rows`, in a dtype of that size, costs where rows are cast or put together; else 0."""
        return itemsize if self.base is not None or itemsize != self.weight_bytes else 0

    def rows(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Rows of the weight that are a slice of the vocabulary, in the dtype of the products."""
        rows = self._whole(self.weight, part).to(dtype)
        return rows if self.base is None else torch.cat([self._whole(self.base, part).to(dtype), rows], 1)

    def bias_rows(self, part: slice, dtype: torch.dtype) -> Tensor | None:
        """The same of the bias."""
        return None if self.bias is None else self._whole(self.bias, part).to(dtype).contiguous()

    def _whole(self, values: Tensor, part: slice) -> Tensor:
        return values if part.stop - part.start == self.vocab else values[part]

    def label_rows(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """The labels' rows of the weight, `[n, H]`; 0 where another process has them."""
        inside = None if self.whole else ((labels >= 0) & (labels < self.vocab))[:, None]
        labels = labels if inside is None else labels.clamp(0, self.vocab - 1)
        rows = self.weight[labels].to(dtype)
        rows = rows if self.base is None else torch.cat([self.base[labels].to(dtype), rows], 1)
        return rows if inside is None else rows.masked_fill_(~inside, 0.0)

    def summed_rows(self, dtype: torch.dtype) -> Tensor:
        """The sum of all rows of the weight, `[H]`."""
        parts = [self.weight] if self.base is None else [self.base, self.weight]
        # slices: a sum in another dtype copies what it sums on a CPU
        found = torch.cat([torch.stack([r.to(dtype).sum(0) for r in p.split(_SUMMED_ROWS)]).sum(0) for p in parts])
        return found if self.shard is None else self.shard.over_rows(found)

    def summed_bias(self, dtype: torch.dtype) -> Tensor | None:
        """The same of the bias, 0-d."""
        found = None if self.bias is None else self.bias.sum(dtype=dtype)
        return found if found is None or self.shard is None else self.shard.over_rows(found)

    def of_classes(self, classes: Tensor, dtype: torch.dtype) -> HeadSlices:
        """A head that has these rows alone, cast."""
        bias = None if self.bias is None else self.bias[classes].to(dtype)
        return HeadSlices(self.label_rows(classes, dtype), bias, self.transform)

    def gradient(self, wide: torch.dtype, *, weight: bool, bias: bool, onto: Tensor | None = None) -> HeadGradient:
        """Where the gradients of weight and bias, if they are wanted, are to be collected. Not written yet.

        The weight's is added to `onto`, where that is given.
        """
        found = HeadGradient.empty(self.weight, wide, weight=weight and onto is None, bias=bias)
        return found if onto is None else replace(found, weight=onto, adds=True)

    def collect(self, gradient: HeadGradient, products: Products, wide: torch.dtype, step: int) -> SliceGradient:
        """What takes its slices, those of `pieces(step)` where they are streamed."""
        if isinstance(self.shard, RowStream):
            return StreamedGradient(gradient, products, wide, self.shard, step)
        return SliceGradient(gradient, products, wide)
